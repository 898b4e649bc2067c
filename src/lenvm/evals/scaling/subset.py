"""Subsets of trajectory files: fewer training prompts, fewer completions of each."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from lenvm.data.trajectory import read_trajectories
from lenvm.errors import DataError
from lenvm.files import JsonlWriter


def write_subset(
    paths: Sequence[Path],
    target: Path,
    *,
    num_prompts: int | None = None,
    completions: int | None = None,
    seed: int = 0,
) -> Path:
    """Write the subset to `target` and return it; what is there already is left alone.

    Training prompts and completions are taken in an order that `seed` and their names fix, so that
    a smaller subset lies inside a larger one, and not in the files' order, where the short answers,
    which end first, often come first; other splits stay whole. Raises DataError for too few.
    """
    if target.exists():
        return target
    hashes: dict[str, list[str]] = {}
    for trajectory in read_trajectories(*paths):
        if trajectory.split == "train":
            hashes.setdefault(trajectory.prompt_hash, []).append(trajectory.id)
    if num_prompts is not None and num_prompts > len(hashes):
        raise DataError(f"num_prompts is {num_prompts}, the files hold {len(hashes)} for training")

    def place(name: str) -> int:
        return zlib.crc32(f"{seed}/{name}".encode())

    kept = sorted(hashes, key=place)[:num_prompts]
    short = sum(len(hashes[h]) < (completions or 1) for h in kept)
    if short:
        raise DataError(
            f"completions is {completions}, but {short} training prompts have fewer; lower it"
        )
    chosen = {i for h in kept for i in sorted(hashes[h], key=place)[:completions]}
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    with JsonlWriter(part) as writer:
        for trajectory in read_trajectories(*paths):
            if trajectory.split != "train" or trajectory.id in chosen:
                writer.write(trajectory.to_json())
    part.replace(target)
    return target
