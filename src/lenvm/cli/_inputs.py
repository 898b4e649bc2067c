"""Prompts and value models as the commands take them."""

import sys
from pathlib import Path
from typing import Any

from lenvm.errors import InputError


def read_prompts(texts: list[str] | None, file: Path | None, limit: int | None) -> list[Any]:
    """Prompts of the command line: texts, a file, or `-` for standard input."""
    from lenvm.data.prompts import Prompt, load_prompts

    if texts and file:
        raise InputError("prompts are given both as arguments and by --prompts; use one of the two")
    if file:
        return load_prompts(str(file), limit=limit)
    if texts == ["-"]:
        texts = [sys.stdin.read()]
    if not texts:
        raise InputError("no prompt: give one or more texts, or --prompts FILE")
    return [Prompt.from_text(text) for text in texts]


def load_value_model(name: str | None, *, device: str) -> Any:
    """A value model by folder; None takes the one in the package, for the default generator."""
    from lenvm.model.bundled import bundled_value_model
    from lenvm.model.device import pick_dtype
    from lenvm.model.value_model import LengthValueModel

    return LengthValueModel.from_pretrained(
        name or bundled_value_model(), device=device, dtype=pick_dtype(device)
    )


def name_value_model(name: str | None) -> str:
    """What results call a value model: its folder, with the parent where that is just `model`."""
    if name is None:
        return "bundled"
    path = Path(name).resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name
