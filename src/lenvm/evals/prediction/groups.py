"""Trajectories grouped by prompt: what a prediction is measured against (paper, Eq. 13-15)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lenvm.data.images import read_with_images
from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError, InputError
from lenvm.returns import log_discount


@dataclass
class PromptGroup:
    """A prompt and its unguided completions."""

    id: str
    domain: str
    text: str
    prompt_token_ids: list[int]
    completions: list[list[int]] = field(default_factory=list)
    """Token ids of the completions that ended by themselves, in the order of their numbers: in a
    sampler's file the short ones, which end first, often come first."""
    numbers: list[int] = field(default_factory=list)
    """The `sample_index` of each."""
    images: list[str] = field(default_factory=list)
    """Image files of the prompt."""
    censored: list[int] = field(default_factory=list)
    """Tokens seen of each completion that was cut off: it is longer than that. Such completions
    count where that decides (is it outside an interval?), and are left out of true lengths."""

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.completions]


@dataclass(frozen=True)
class Groups:
    """The prompts of a run: those that are measured, those that baselines are fitted on, counts."""

    evaluated: list[PromptGroup]
    training: list[PromptGroup]
    num_guided: int
    num_too_few: int
    """Prompts left out for fewer complete completions than asked for."""


def load_groups(
    paths: Iterable[Path],
    *,
    split: str = "test",
    min_completions: int = 2,
    limit: int | None = None,
) -> Groups:
    """Group trajectory files by prompt. `split` "all" measures every prompt.

    Guided completions are left out and counted. Raises DataError where nothing is left to measure.
    """
    if split not in ("train", "validation", "test", "all"):
        raise InputError(f"split is {split!r}; allowed: train, validation, test, all")
    if min_completions < 1:
        raise InputError(f"min_completions is {min_completions}; it must be at least 1")
    found: dict[str, PromptGroup] = {}
    training: dict[str, PromptGroup] = {}
    num_guided, splits = 0, set()
    for trajectory in read_with_images(*paths):
        splits.add(trajectory.split)
        if trajectory.length_control is not None:
            num_guided += 1
        elif split in ("all", trajectory.split):
            _add(found, trajectory)
        elif trajectory.split == "train":
            _add(training, trajectory)
    for group in found.values():
        order = sorted(range(len(group.numbers)), key=lambda i: group.numbers[i])
        group.numbers = [group.numbers[i] for i in order]
        group.completions = [group.completions[i] for i in order]
    kept = [g for g in found.values() if len(g.completions) >= min_completions][:limit]
    if not kept:
        raise DataError(
            f"no prompt of split {split!r} has {min_completions} or more complete, unguided "
            f"completions; the files hold the splits {', '.join(sorted(splits))}, "
            f"{len(found)} prompts of this one and {num_guided} guided completions"
        )
    short = sum(len(g.completions) < min_completions for g in found.values())
    fit = [g for g in training.values() if g.completions]
    return Groups(kept, fit, num_guided, short)


def true_length(lengths: Sequence[int], gamma: float) -> float:
    """L_GT = ln(1 - mean u) / ln(gamma) with u = 1 - gamma^L, exact for any length (Eq. 13-14)."""
    rate = log_discount(gamma)
    scaled = -rate * np.asarray(lengths, dtype=np.float64)
    most = scaled.max()
    return float(-(most + np.log(np.exp(scaled - most).mean())) / rate)


def _add(groups: dict[str, PromptGroup], trajectory: Trajectory) -> None:
    group = groups.get(trajectory.prompt_hash)
    if group is None:
        prompt = Prompt(messages=trajectory.messages, prompt_text=trajectory.prompt_text)
        group = groups[trajectory.prompt_hash] = PromptGroup(
            id=trajectory.prompt_hash,
            domain=trajectory.domain,
            text=prompt.text,
            prompt_token_ids=trajectory.prompt_token_ids,
            images=trajectory.images,
        )
    if trajectory.is_complete:
        group.completions.append(trajectory.completion_token_ids)
        group.numbers.append(trajectory.sample_index)
    else:
        group.censored.append(len(trajectory.completion_token_ids))
