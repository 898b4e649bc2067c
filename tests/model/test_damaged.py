"""Checkpoints and generators with a file missing, cut, or of other contents: one sentence each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from lenvm.engines.transformers import TransformersEngine
from lenvm.engines.values import build_head_of, load_head
from lenvm.errors import CheckpointError, LenVMError
from lenvm.model.value_model import LengthValueModel, LenVMConfig, read_vocab_size
from tiny import tiny_generator, tiny_pair, tiny_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A generator, a whole value model with a guide, and one that is an adapter."""
    root = tmp_path_factory.mktemp("made")
    tiny_generator().save_pretrained(root / "generator")
    tiny_tokenizer().save_pretrained(root / "generator")
    pair = tiny_pair()
    pair.tokenizer = tiny_tokenizer()
    pair.save_pretrained(root / "whole")
    base = str(root / "generator")
    model = LengthValueModel.build(base, LenVMConfig(gamma=0.99, base_model=base))
    lora = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=base)
    model.backbone = get_peft_model(model.backbone, lora)
    model.save_pretrained(root / "adapter")
    return root


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hold(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def change(**values: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path) -> object:
    if folder.name == "generator":
        return TransformersEngine.load(str(folder))
    return LengthValueModel.from_pretrained(folder).guide


WEIGHTS, HEAD, CONFIG = "model.safetensors", "value_head.safetensors", "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("adapter", ADAPTER, Path.unlink, "but no adapter_model.safetensors"),
    ("adapter", ADAPTER, cut, "adapter_model.safetensors is damaged: .*incomplete"),
    ("adapter", ADAPTER_CONFIG, hold("{}"), "an adapter .*: 'peft_type'"),
    ("adapter", ADAPTER_CONFIG, hold("{"), "adapter_config.json is damaged: JSONDecodeError"),
    ("adapter", ADAPTER_CONFIG, hold("[]"), "adapter_config.json is damaged: no JSON object"),
    ("adapter", ADAPTER_CONFIG, Path.unlink, "neither config.json .* nor adapter_config.json"),
    ("adapter", ADAPTER_CONFIG, change(r="x"), "cannot load an adapter from"),
    ("whole", WEIGHTS, cut, "model.safetensors is damaged: .*incomplete"),
    ("whole", WEIGHTS, Path.unlink, "cannot load a model from .* model.safetensors"),
    ("whole", HEAD, cut, "value_head.safetensors is damaged: .*incomplete"),
    ("whole", CONFIG, hold("null"), "config.json is damaged: no JSON object"),
    ("whole", CONFIG, change(hidden_size="x"), "cannot load a model .*hidden_size"),
    ("whole", CONFIG, change(hidden_size=16), "other shapes than its config.json says"),
    ("whole", "lenvm.json", hold("{"), "lenvm.json is not JSON"),
    ("whole", "lenvm.json", hold("[]"), "lenvm.json: the whole: "),
    ("whole", "tokenizer.json", hold("{}"), "a tokenizer .*'added_tokens'"),
    ("whole", "guide/lenvm.json", Path.unlink, "guide should hold .* has no lenvm.json"),
    ("whole", "guide/model.safetensors", cut, "guide: model.safetensors is damaged"),
    ("generator", WEIGHTS, cut, "model.safetensors is damaged: .*incomplete"),
    ("generator", CONFIG, cut, "config.json is damaged: JSONDecodeError"),
    ("generator", "tokenizer_config.json", hold("[]"), "tokenizer_config.json is damaged"),
    ("generator", "generation_config.json", cut, "generation_config.json is damaged"),
]


@pytest.mark.parametrize(("kind", "file", "damage", "says"), CASES)
def test_a_damaged_folder_is_named_with_the_file(made, tmp_path, kind, file, damage, says):
    folder = tmp_path / kind
    shutil.copytree(made / kind, folder)
    damage(folder / file)
    with pytest.raises(LenVMError, match=says) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code in (3, 4)


def test_an_adapter_without_a_base_is_told_how_to_name_one(made, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(made / "adapter", folder)
    change(base_model=None)(folder / "lenvm.json")
    for text in ("{}", "[]", '{"base_model_name_or_path": null}'):
        (folder / ADAPTER_CONFIG).write_text(text)
        with pytest.raises(CheckpointError, match=r"names no base .* FOLDER@BASE"):
            LengthValueModel.from_pretrained(folder)


def test_the_other_engines_readers_say_it_too(made, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(made / "whole", folder)
    head, _ = build_head_of(folder, 32)
    cut(folder / HEAD)
    with pytest.raises(CheckpointError, match=r"value_head.safetensors is damaged"):
        load_head(head, folder, head.fc.weight.device)
    hold("{}")(folder / "lenvm.json")
    with pytest.raises(CheckpointError, match="gamma"):
        build_head_of(folder, 32)
    other = tmp_path / "generator"
    shutil.copytree(made / "generator", other)
    hold("{}")(other / CONFIG)
    with pytest.raises(CheckpointError, match="'vocab_size'"):
        read_vocab_size(other)
