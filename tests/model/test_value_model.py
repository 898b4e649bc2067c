import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lenvm.errors import CheckpointError, InputError
from lenvm.model.config import CONFIG_FILE
from lenvm.model.tokenization import hash_tokenizer
from lenvm.model.value_model import HEAD_FILE, LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer

IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def build(head: str = "scalar", **overrides: object) -> LengthValueModel:
    config = LenVMConfig(gamma=0.99, head=head)  # type: ignore[arg-type]
    return LengthValueModel.build(tiny_backbone(**overrides), config).eval()


@pytest.mark.parametrize("head", ["scalar", "distribution"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reload_gives_identical_values(tmp_path: Path, head: str, family: str):
    model = build(head, family=family)
    model.save_pretrained(tmp_path / "m")
    again = LengthValueModel.from_pretrained(tmp_path / "m")
    for before, after in zip(model.read(IDS), again.read(IDS), strict=True):
        assert torch.equal(before, after)
    assert again.config == model.config


def test_head_has_the_published_key_names(tmp_path: Path):
    build().save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / HEAD_FILE)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "v_head.fc.weight": (32, 32),
        "v_head.fc.bias": (32,),
        "v_head.summary.weight": (1, 32),
        "v_head.summary.bias": (1,),
    }


def test_published_checkpoint_loads_with_its_gamma_given(tmp_path: Path):
    generator = tiny_generator()  # a causal-LM folder, as the published system saves
    generator.save_pretrained(tmp_path / "m")
    model = LengthValueModel(generator.model, LenVMConfig(gamma=0.997))
    other = tmp_path / "other"
    model.save_pretrained(other)
    (other / HEAD_FILE).rename(tmp_path / "m" / HEAD_FILE)
    with pytest.raises(CheckpointError, match=r"download OWNER/NAME .* --gamma 0\.997") as caught:
        LengthValueModel.from_pretrained(tmp_path / "m")
    loaded = LengthValueModel.from_pretrained(tmp_path / "m", gamma=0.997)
    assert torch.equal(loaded.read(IDS)[0], model.eval().read(IDS)[0])
    smallest = re.search(r"\{.*\}", str(caught.value)).group()  # what the message tells to write
    (tmp_path / "m" / CONFIG_FILE).write_text(smallest)
    loaded = LengthValueModel.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.read(IDS)[0], model.eval().read(IDS)[0])


def test_reading_a_batch_equals_reading_alone():
    model = build()
    together = model.read(IDS)
    for ids, raw in zip(IDS, together, strict=True):
        torch.testing.assert_close(model.read([ids])[0], raw, rtol=1e-4, atol=1e-5)


def test_saving_replaces_an_older_checkpoint_whole(tmp_path: Path):
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "stale.txt").write_text("old")
    build("distribution").save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "stale.txt").exists()
    assert LengthValueModel.from_pretrained(tmp_path / "m").config.head == "distribution"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_lora_checkpoint_merges_at_load(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    tiny_backbone(seed=3).save_pretrained(tmp_path / "base")
    config = LenVMConfig(gamma=0.99, base_model=str(tmp_path / "base"))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = LengthValueModel(get_peft_model(tiny_backbone(seed=3), lora), config).eval()
    model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "model.safetensors").exists()
    merged = LengthValueModel.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(merged.read(IDS)[0], model.read(IDS)[0], rtol=1e-4, atol=1e-5)
    kept = LengthValueModel.from_pretrained(tmp_path / "m", merge_adapter=False)
    torch.testing.assert_close(kept.read(IDS)[0], model.read(IDS)[0], rtol=1e-4, atol=1e-5)
    (tmp_path / "base").rename(tmp_path / "moved")
    named = LengthValueModel.from_pretrained(f"{tmp_path / 'm'}@{tmp_path / 'moved'}")
    torch.testing.assert_close(named.read(IDS)[0], model.read(IDS)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_first_layers_alone_are_a_model_of_their_own(tmp_path: Path, family: str):
    """Cut, saved and read again: what the whole model's hidden states after those layers say."""
    whole = tiny_generator(family, num_hidden_layers=3)
    whole.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = LenVMConfig(gamma=0.99, num_layers=2)
    model = LengthValueModel.build(str(tmp_path / "base"), config).eval()
    model.save_pretrained(tmp_path / "m")
    again = LengthValueModel.from_pretrained(tmp_path / "m")
    assert again.backbone.config.num_hidden_layers == len(again.backbone.layers) == 2
    ids = torch.tensor([IDS[0]])
    backbone = whole.model
    with torch.no_grad():
        states = backbone(ids, output_hidden_states=True).hidden_states[2]
        expected = model.head(backbone.norm(states))[0]
    torch.testing.assert_close(again.read([IDS[0]])[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="num_layers is 4; the backbone has 3 layers"):
        LengthValueModel.build(str(tmp_path / "base"), LenVMConfig(gamma=0.99, num_layers=4))


def test_build_from_a_folder_records_generator_tokenizer_and_eos(tmp_path: Path):
    tiny_generator().save_pretrained(tmp_path / "g")
    tiny_tokenizer().save_pretrained(tmp_path / "g")
    model = LengthValueModel.build(str(tmp_path / "g"), LenVMConfig(gamma=0.99))
    assert model.config.generator == str(tmp_path / "g")
    assert model.config.eos_token_ids == [EOS]
    assert model.config.tokenizer_hash == hash_tokenizer(tiny_tokenizer())


def test_what_a_gguf_file_fills_the_vocabulary_up_with_makes_no_other_tokenizer():
    filled = tiny_tokenizer()
    size = len(filled.get_vocab())
    filled.add_tokens([f"[PAD{i}]" for i in range(size, size + 3)])
    assert len(filled.get_vocab()) == size + 3
    assert hash_tokenizer(filled) == hash_tokenizer(tiny_tokenizer())
    filled.add_tokens(["[PAD7]"])
    assert hash_tokenizer(filled) != hash_tokenizer(tiny_tokenizer())


def test_another_tokenizer_is_refused_with_the_difference(tmp_path: Path):
    tiny_generator().save_pretrained(tmp_path / "g")
    tiny_tokenizer().save_pretrained(tmp_path / "g")
    model = LengthValueModel.build(str(tmp_path / "g"), LenVMConfig(gamma=0.99))
    model.check_tokenizer(tiny_tokenizer())
    with pytest.raises(
        CheckpointError, match=r"64 against 60 tokens; 'w60' is 60 there and absent"
    ):
        model.check_tokenizer(tiny_tokenizer(60))


def write_checkpoint(folder: Path) -> Path:
    build().save_pretrained(folder)
    return folder


def test_missing_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="not a folder"):
        LengthValueModel.from_pretrained(tmp_path / "nothing")


def test_folder_without_head(tmp_path: Path):
    (write_checkpoint(tmp_path / "m") / HEAD_FILE).unlink()
    with pytest.raises(CheckpointError, match="lenvm train"):
        LengthValueModel.from_pretrained(tmp_path / "m")


def test_damaged_head(tmp_path: Path):
    (write_checkpoint(tmp_path / "m") / HEAD_FILE).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        LengthValueModel.from_pretrained(tmp_path / "m")


def test_head_of_another_width(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "m")
    build(hidden_size=16).save_pretrained(tmp_path / "narrow")
    (folder / HEAD_FILE).write_bytes((tmp_path / "narrow" / HEAD_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="does not fit the backbone"):
        LengthValueModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 99}, "upgrade"), ({"gamma": 1.5}, "gamma"), ({"colour": 1}, "colour")],
)
def test_bad_config(tmp_path: Path, change: dict[str, object], message: str):
    path = write_checkpoint(tmp_path / "m") / "lenvm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        LengthValueModel.from_pretrained(tmp_path / "m")


def test_reading_at_another_gamma_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "m")
    with pytest.raises(InputError, match="gamma"):
        LengthValueModel.from_pretrained(folder, gamma=0.5)


@pytest.mark.parametrize("ids", [[], [64], [-1]])
def test_tokens_outside_the_vocabulary_are_named(ids: list[int]):
    with pytest.raises(InputError, match="sequence 1"):
        build().read([[1], ids])
