"""What libraries raise over a model that is damaged or incomplete, as one CheckpointError.

A truncated file is a SafetensorError, a KeyError, a TypeError or whatever else its reader stumbles
over, and none of them names the file. Every model, adapter, head and tokenizer is loaded in here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lenvm.errors import CheckpointError, LenVMError

OBJECTS = ("config.json", "tokenizer.json")
"""Endings of the files that hold a JSON object and nothing else."""


@contextmanager
def reading(what: str, place: str | Path) -> Iterator[None]:
    """Raises CheckpointError: `what` (a model, a tokenizer) cannot be loaded from `place`, why, and
    which file is to blame where one can be named. Our own errors and a full memory pass."""
    try:
        yield
    except (LenVMError, MemoryError):
        raise
    except Exception as error:  # tokenizers, safetensors and peft raise untyped errors of their own
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
        found = find_damage(folder)
        reason = f"{found}; copy or download it again" if found else describe(error)
        raise CheckpointError(f"cannot load {what} from {place}: {reason}") from error


def find_damage(folder: Path) -> str | None:
    """The first JSON or safetensors file of a folder that cannot be read, with the reason."""
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if path.name.endswith(OBJECTS) and not isinstance(data, dict):
                return f"{path.name} is damaged: no JSON object"
        except ValueError as error:
            return f"{path.name} is damaged: {describe(error)}"
    for path in sorted(folder.glob("*.safetensors")):
        if (fault := _open(path)) is not None:
            return f"{path.name} is damaged: {fault}"
    return None


def describe(error: Exception) -> str:
    """An error in words: a library's KeyError says only a name, some say nothing at all."""
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:  # transformers has printed which
        return "its weights have other shapes than its config.json says; copy or download it again"
    if isinstance(error, KeyError):
        return f"its files lack an entry, or have an unknown one: {text}"
    if text and (isinstance(error, OSError | RuntimeError) or type(error) is ValueError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _open(path: Path) -> str | None:
    from safetensors import safe_open

    opened: Any = safe_open
    try:
        with opened(path, framework="pt"):
            return None
    except Exception as error:  # safetensors raises its own untyped SafetensorError
        return str(error)
