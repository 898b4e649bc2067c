"""Backbones from disk: whole, cut to their first layers, or with a LoRA adapter on them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from lenvm.errors import CheckpointError, InputError
from lenvm.files import read_json
from lenvm.model.bundled import resolve_model
from lenvm.model.reading import reading

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def load_backbone(path: str, dtype: torch.dtype | str, num_layers: int | None = None) -> nn.Module:
    """A decoder without its LM head; of its layers the first `num_layers` and its last norm.

    Raises CheckpointError where there is no model, InputError where it has fewer layers.
    """
    with reading("a model", path):
        model: nn.Module = AutoModel.from_pretrained(path, dtype=dtype)
    if num_layers is not None:
        keep_layers(model, num_layers)
    return model


def load_adapter(backbone: nn.Module, folder: Path, base: str, *, merge: bool) -> nn.Module:
    """The backbone with the LoRA adapter of a folder, merged into it or on top.

    base: the backbone's name, for the CheckpointError where the adapter is another one's.
    """
    from peft import PeftModel

    if not any((folder / name).exists() for name in ADAPTER_FILES):
        raise CheckpointError(
            f"{folder} has an adapter_config.json, but no {ADAPTER_FILES[0]}, the adapter's "
            "weights; copy or download the whole folder again"
        )
    with reading("an adapter", folder):
        try:
            adapted: Any = PeftModel.from_pretrained(backbone, str(folder), is_trainable=not merge)
        except RuntimeError as error:  # peft's list of every weight whose size differs
            reason = str(error).partition("\n\t")[2].partition("\n")[0]
            raise CheckpointError(
                f"the adapter in {folder} does not fit {base}: {reason or error}; name the base "
                "that it was trained on"
            ) from error
    merged: nn.Module = adapted.merge_and_unload() if merge else adapted
    return merged


def find_base(folder: Path, named: str | None) -> str:
    """Path or hub id of the model that an adapter goes on: the `named` one, else its own.

    Raises CheckpointError where it names none.
    """
    if named is None:
        found = read_json(folder / "adapter_config.json")
        named = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not isinstance(named, str) or not named:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} names no base (base_model_name_or_path), so it is "
            "damaged or incomplete; copy the folder again, or name the base: FOLDER@BASE"
        )
    return resolve_model(named)


def read_head(path: Path) -> dict[str, Tensor]:
    """A value head's weights by name, in fp32. CheckpointError for a file that is damaged."""
    with reading("a value head", path):
        return {k.removeprefix("v_head."): v.float() for k, v in load_file(path).items()}


def split_name(name: str | Path) -> tuple[Path, str | None]:
    """(folder, base) of `FOLDER@BASE`; a folder that is there is one, whatever its name."""
    if Path(name).is_dir() or "@" not in str(name):
        return Path(name), None
    folder, _, base = str(name).rpartition("@")
    return Path(folder), base


def hidden_size(backbone: nn.Module) -> int:
    """Width H of the last hidden state, of decoders and VLMs alike."""
    config: Any = backbone.config
    return int(config.get_text_config().hidden_size)


def keep_layers(backbone: Any, num_layers: int) -> None:
    """Drop all decoder layers but the first `num_layers`, in the module and in its config."""
    layers = find_layers(backbone)
    if num_layers > len(layers):
        raise InputError(f"num_layers is {num_layers}; the backbone has {len(layers)} layers")
    config = backbone.config.get_text_config()
    del layers[num_layers:]
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]
    config.num_hidden_layers = num_layers


def find_layers(backbone: Any) -> nn.ModuleList:
    """The decoder layers, under LoRA and in VLMs alike. Raises InputError where there are none."""
    lists = [
        module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rsplit(".", 1)[-1] == "layers"
        and len(module)
        and hasattr(module[0], "self_attn")
        and "visual" not in name
        and "vision" not in name
    ]
    if not lists:
        raise InputError(f"{type(backbone).__name__} has no decoder layers that lenvm knows")
    return max(lists, key=len)


def find_norm(backbone: Any) -> nn.Module:
    """The norm after the last layer."""
    norms = [m for name, m in backbone.named_modules() if name.rsplit(".", 1)[-1] == "norm"]
    if not norms:
        raise InputError(f"{type(backbone).__name__} has no final norm that lenvm knows")
    norm: nn.Module = norms[-1]
    return norm
