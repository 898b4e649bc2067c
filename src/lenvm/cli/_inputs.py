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
        try:
            texts = [sys.stdin.read()]
        except UnicodeDecodeError as error:
            raise _not_utf8("standard input", error.object[error.start]) from None
        check_text("standard input", texts[0])
    if not texts:
        raise InputError("no prompt: give one or more texts, or --prompts FILE")
    for text in texts:
        check_text("the prompt", text)
    return [Prompt.from_text(text) for text in texts]


def check_text(what: str, text: str) -> None:
    """InputError where a text of the command line was no UTF-8. Python keeps such a byte as half a
    surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _not_utf8(what, ord(text[error.start]) & 0xFF) from None


def _not_utf8(what: str, byte: int) -> InputError:
    return InputError(
        f"{what} is not UTF-8: it has the byte 0x{byte:02x}; convert it, such as with "
        "iconv -f latin1 -t utf-8"
    )


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
