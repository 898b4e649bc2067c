"""A checkpoint's guide: a shallower value model of the same generator, in its folder `guide/`.

It scores candidates and follows the answer during guided decoding, where every layer costs at every
token. The folder's own model foretells lengths from the prompt and reads whole texts.
"""

from pathlib import Path

from lenvm.errors import CheckpointError
from lenvm.model.config import CONFIG_FILE, HEAD_FILE, LenVMConfig, load_config
from lenvm.model.loading import split_name

GUIDE_FOLDER = "guide"


def find_guide(name: str | Path) -> str | None:
    """The guide of a checkpoint FOLDER or FOLDER@BASE, named likewise; None where it has none."""
    folder, base = split_name(name)
    if not (folder / GUIDE_FOLDER).is_dir():
        return None
    return str(folder / GUIDE_FOLDER) + (f"@{base}" if base else "")


def check_guide(model: LenVMConfig, place: Path) -> None:
    """CheckpointError where the folder at `place` holds no guide for a model of that config."""
    if not (place / HEAD_FILE).exists():
        raise CheckpointError(
            f"{place} should hold a guide, a value model, but has no {HEAD_FILE}; put a whole "
            "checkpoint there, or remove the folder"
        )
    if not (place / CONFIG_FILE).exists() and model.head != "scalar":  # the published one's head
        raise CheckpointError(
            f"{place} should hold a guide, a value model, but has no {CONFIG_FILE}, which says how "
            "its head is read; put a whole checkpoint there, or remove the folder"
        )
    check_fit(model, load_config(place, None if (place / CONFIG_FILE).exists() else model.gamma))


def check_fit(model: LenVMConfig, guide: LenVMConfig) -> None:
    """CheckpointError that names what a guide has otherwise than its model."""
    for name, what, known in (
        ("tokenizer_hash", "tokenizer", model.tokenizer_hash and guide.tokenizer_hash),
        ("head", "head", True),
        ("gamma", "gamma", True),
    ):
        own, asked = getattr(guide, name), getattr(model, name)
        if known and own != asked:
            raise CheckpointError(
                f"the guide does not fit the value model: its {what} is {own}, the model's is "
                f"{asked}; a guide has the model's generator, tokenizer, head and gamma. "
                + _advice(what, model)
            )


def _advice(what: str, model: LenVMConfig) -> str:
    if what == "tokenizer":
        generator = model.generator or "the model's generator"
        return f"Train one on completions of {generator}, or remove the folder {GUIDE_FOLDER}/"
    if what == "gamma" and model.head == "distribution":
        return (
            f"A distribution head can be read at any gamma: write {model.gamma} into the guide's "
            f"{CONFIG_FILE}"
        )
    asked = f"{what}={getattr(model, what)}"
    return f"Train one with `--set {asked}`, or remove the folder {GUIDE_FOLDER}/"
