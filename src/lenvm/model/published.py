"""Checkpoints of the published system: a Hugging Face folder and `value_head.safetensors`.

Ours differ from them by `lenvm.json`, which says what the head's numbers mean: theirs store no
gamma. `describe_published` adds that file, after which every command takes the folder as it is.
"""

from dataclasses import dataclass
from pathlib import Path

from lenvm.errors import InputError
from lenvm.files import write_json
from lenvm.model.config import CONFIG_FILE, HEAD_FILE, LenVMConfig
from lenvm.model.tokenization import find_eos_token_ids, hash_tokenizer, load_tokenizer


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What is known about one that the paper's authors offer."""

    gamma: float
    generator: str


CHECKPOINTS = {
    "namezz/lvm-a-qwen2.5-7b-instruct-b-qwen2.5-0.5b-instruct": PublishedCheckpoint(
        0.997, "Qwen/Qwen2.5-7B-Instruct"
    ),
}
"""By repository on the hub."""


def is_published(folder: Path) -> bool:
    """True for a folder with a value head that does not say what its numbers mean."""
    return (folder / HEAD_FILE).is_file() and not (folder / CONFIG_FILE).exists()


def describe_published(folder: Path, repo: str, gamma: float | None = None) -> LenVMConfig:
    """Write `lenvm.json` into a published checkpoint's folder; returns what it holds.

    gamma None: the one known for `repo`. Raises InputError where none is known, or another one.
    """
    known = CHECKPOINTS.get(repo)
    if known is not None and gamma not in (None, known.gamma):
        raise InputError(f"{repo} was trained at gamma {known.gamma}, not {gamma}")
    gamma = known.gamma if known is not None else gamma
    if gamma is None:
        raise InputError(
            f"{folder} holds a checkpoint of the published system, which stores no gamma: name it, "
            "--gamma 0.997 for its Qwen2.5 models, 0.9998 for Qwen3"
        )
    if not 0 < gamma < 1:
        raise InputError(f"gamma is {gamma}; allowed: above 0, below 1")
    tokenizer = load_tokenizer(str(folder))
    config = LenVMConfig(
        gamma=gamma,
        generator=known.generator if known else "",
        tokenizer_hash=hash_tokenizer(tokenizer),
        eos_token_ids=find_eos_token_ids(str(folder), tokenizer),
    )
    write_json(folder / CONFIG_FILE, config.model_dump())
    return config
