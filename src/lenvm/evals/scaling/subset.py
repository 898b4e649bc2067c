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

    Training prompts are taken in an order that `seed` and their hash fix, so that a smaller subset
    lies inside a larger one; other splits stay whole. Raises DataError for too few prompts.
    """
    if target.exists():
        return target
    hashes = {t.prompt_hash for t in read_trajectories(*paths) if t.split == "train"}
    if num_prompts is not None and num_prompts > len(hashes):
        raise DataError(f"num_prompts is {num_prompts}, the files hold {len(hashes)} for training")
    kept = set(sorted(hashes, key=lambda h: zlib.crc32(f"{seed}/{h}".encode()))[:num_prompts])
    taken: dict[str, int] = {}
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    with JsonlWriter(part) as writer:
        for trajectory in read_trajectories(*paths):
            if trajectory.split == "train":
                count = taken.get(trajectory.prompt_hash, 0)
                if trajectory.prompt_hash not in kept or count >= (completions or count + 1):
                    continue
                taken[trajectory.prompt_hash] = count + 1
            writer.write(trajectory.to_json())
    short = sum(count < (completions or 1) for count in taken.values())
    if short:
        part.unlink()
        raise DataError(
            f"completions is {completions}, but {short} training prompts have fewer; lower it"
        )
    part.replace(target)
    return target
