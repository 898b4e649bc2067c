"""A checkpoint's guide: loaded, kept, checked, never claimed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lenvm.errors import CheckpointError
from lenvm.model.guide import find_guide
from lenvm.model.tokenization import hash_tokenizer
from lenvm.model.value_model import HEAD_FILE, LengthValueModel, LenVMConfig
from tiny import tiny_backbone, tiny_pair, tiny_tokenizer

IDS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_pair().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(path: Path, **values: object) -> None:
    path = path / "lenvm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_pair_is_saved_and_loaded_and_reads_as_before(folder: Path):
    model = LengthValueModel.from_pretrained(folder, dtype=torch.float64)
    assert model.guide is model.guide
    for found, before in ((model, tiny_pair()), (model.guide, tiny_pair().guide)):
        for a, b in zip(found.read(IDS), before.read(IDS), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert next(model.guide.backbone.parameters()).dtype == torch.float64
    assert not any("guide" in name for name in model.state_dict())
    assert len(list(model.parameters())) == len(list(tiny_pair().parameters()))


def test_the_guides_weights_are_read_when_they_are_asked_for(folder: Path, monkeypatch):
    loaded = []
    plain = LengthValueModel.from_pretrained.__func__
    monkeypatch.setattr(
        LengthValueModel,
        "from_pretrained",
        classmethod(lambda cls, *a, **k: loaded.append(Path(a[0]).name) or plain(cls, *a, **k)),
    )
    model = LengthValueModel.from_pretrained(folder)
    assert loaded == ["m"]
    model.read_ends(IDS)
    assert loaded == ["m"]
    assert model.guide is model.guide is not None
    assert loaded == ["m", "guide"]


def test_a_checkpoint_without_a_guide_has_none(tmp_path: Path):
    model = tiny_pair()
    model.set_guide(None)
    model.save_pretrained(tmp_path / "m")
    assert LengthValueModel.from_pretrained(tmp_path / "m").guide is None
    assert not (tmp_path / "m" / "guide").exists()
    assert find_guide(tmp_path / "m") is None


def test_the_guide_of_a_folder_that_is_replaced_stays_and_the_log_says_so(folder: Path, caplog):
    before = {p.name: p.read_bytes() for p in (folder / "guide").iterdir()}
    model = tiny_pair()
    model.set_guide(None)
    model.save_pretrained(folder)
    assert "guide stays" in caplog.text
    assert {p.name: p.read_bytes() for p in (folder / "guide").iterdir()} == before
    assert model.guide is None
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"gamma": 0.5}, r"its gamma is 0\.5, the model's is 0\.98;.* write 0\.98 into"),
        ({"head": "scalar"}, r"its head is scalar, the model's is distribution;.*--set head="),
        ({"tokenizer_hash": "cd"}, r"its tokenizer is cd, the model's is ab;.* completions of gen"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_with_what_to_do(folder: Path, other, message):
    for place in (folder, folder / "guide"):
        change(place, tokenizer_hash="ab", generator="gen")
    LengthValueModel.from_pretrained(folder)
    change(folder / "guide", **other)
    with pytest.raises(CheckpointError, match=message):
        LengthValueModel.from_pretrained(folder)


def test_a_scalar_head_has_the_gamma_that_it_was_trained_at(tmp_path: Path):
    tiny_pair("scalar").save_pretrained(tmp_path / "m")
    change(tmp_path / "m" / "guide", gamma=0.5)
    with pytest.raises(CheckpointError, match=r"--set gamma=0\.98"):
        LengthValueModel.from_pretrained(tmp_path / "m")


def test_a_model_is_not_paired_with_what_does_not_fit():
    with pytest.raises(CheckpointError, match="its head is scalar"):
        tiny_pair().set_guide(tiny_pair("scalar"))


def test_a_folder_that_is_no_checkpoint_is_no_guide(folder: Path):
    (folder / "guide" / HEAD_FILE).unlink()
    with pytest.raises(CheckpointError, match="should hold a guide"):
        LengthValueModel.from_pretrained(folder)


def test_the_guides_tokenizer_is_held_against_the_generators_too():
    """Where the model itself does not say which one it knows."""
    model = tiny_pair()
    model.guide.config.tokenizer_hash = hash_tokenizer(tiny_tokenizer())
    model.guide.tokenizer = tiny_tokenizer()
    model.check_tokenizer(tiny_tokenizer())
    with pytest.raises(CheckpointError, match="64 against 60 tokens"):
        model.check_tokenizer(tiny_tokenizer(60))


def test_adapters_of_both_go_on_a_base_that_is_named(tmp_path: Path):
    tiny_backbone(seed=3, num_hidden_layers=3).save_pretrained(tmp_path / "moved")
    expected = []
    for name, num_layers in (("m", None), ("m/guide", 2)):
        backbone = tiny_backbone(seed=3, num_hidden_layers=3)
        if num_layers:
            del backbone.layers[num_layers:]
        config = LenVMConfig(gamma=0.98, base_model="/nowhere", num_layers=num_layers)
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = LengthValueModel(get_peft_model(backbone, lora), config).eval()
        model.save_pretrained(tmp_path / name)
        expected.append(model.read(IDS)[0])
    name = f"{tmp_path / 'm'}@{tmp_path / 'moved'}"
    assert find_guide(name) == f"{tmp_path / 'm' / 'guide'}@{tmp_path / 'moved'}"
    model = LengthValueModel.from_pretrained(name)
    for found, raw in zip((model, model.guide), expected, strict=True):
        torch.testing.assert_close(found.read(IDS)[0], raw, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_stores_no_gamma_gives_its_guide_the_one_named(folder: Path):
    for place in (folder, folder / "guide"):
        (place / "lenvm.json").unlink()
    scalar = tiny_pair("scalar")
    scalar.save_pretrained(folder.parent / "scalar")
    for place in ("", "guide"):
        shutil.copy(folder.parent / "scalar" / place / HEAD_FILE, folder / place / HEAD_FILE)
    model = LengthValueModel.from_pretrained(folder, gamma=0.9)
    assert model.guide is not None
    assert model.guide.config.gamma == 0.9
