"""Length statistics of trajectory files, and down-sampling by prompts and by completions.

One pass, a few bytes a completion: files larger than memory are fine.
"""

import math
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lenvm import returns
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.errors import DataError, InputError
from lenvm.files import claim, replace_jsonl

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
MANY_TRUNCATED = 0.05
"""Share of truncated completions from which on leaving them out is worth a warning."""


@dataclass(frozen=True)
class LengthStats:
    """Completions of one domain and split (or of all); lengths in tokens."""

    domain: str
    split: str
    num_prompts: int
    num_completions: int
    num_truncated: int
    num_tokens: int
    mean: float
    max: int
    percentiles: dict[int, int]
    """Of all completions; those of truncated ones are lower bounds."""
    histogram: dict[int, int] = field(default_factory=dict)
    """Lower edge of a bin of lengths -> completions in it (`compute_histogram`)."""

    @property
    def truncated_share(self) -> float:
        return self.num_truncated / self.num_completions


@dataclass(frozen=True)
class TrajectoryStats:
    """What trajectory files hold."""

    groups: list[LengthStats]
    """One for each domain and split, then one over all ("all", "all")."""
    num_prompt_tokens: int
    completions_per_prompt: tuple[int, float, int]
    """Least, mean, most."""
    gamma: float | None
    """Suggested: 1 - gamma^(L99) = 0.99 over the train split's complete completions (all splits
    where there is no train split); None where every completion is truncated."""
    finish_reasons: dict[str, int]
    models: dict[str, int]
    controlled: int
    """Completions that were sampled under a length control."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Group:
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    complete: "array[int]" = field(default_factory=lambda: array("I"))
    prompts: set[str] = field(default_factory=set)

    def add(self, trajectory: Trajectory) -> None:
        self.lengths.append(trajectory.length)
        self.prompts.add(trajectory.prompt_hash)
        if trajectory.is_complete:
            self.complete.append(trajectory.length)

    def summarise(self, domain: str, split: str) -> LengthStats:
        lengths = sorted(self.lengths)
        return LengthStats(
            domain=domain,
            split=split,
            num_prompts=len(self.prompts),
            num_completions=len(lengths),
            num_truncated=len(lengths) - len(self.complete),
            num_tokens=sum(lengths),
            mean=sum(lengths) / len(lengths),
            max=lengths[-1],
            percentiles={p: compute_percentile(lengths, p) for p in PERCENTILES},
            histogram=compute_histogram(lengths),
        )


def describe_truncated(where: str, num_truncated: int, num_completions: int) -> str:
    """A warning of truncated completions that training leaves out; empty where they are few."""
    if num_truncated < MANY_TRUNCATED * num_completions or not num_truncated:
        return ""
    return (
        f"{where}: {num_truncated} of {num_completions} completions "
        f"({100 * num_truncated / num_completions:.0f}%) are truncated, and training leaves them "
        'out (censoring = "drop"): the short answers remain, so lengths are underestimated. '
        "Sample with a higher --max-tokens, or train with --set censoring=one_sided (or bootstrap)"
    )


def compute_histogram(lengths: Iterable[int]) -> dict[int, int]:
    """Lower edge -> number of lengths, in bins of a quarter octave."""
    counts = Counter(int(4 * math.log2(length) + 1e-9) for length in lengths)
    merged: Counter[int] = Counter()
    for index, count in counts.items():
        merged[math.ceil(2 ** (index / 4) - 1e-9)] += count
    return dict(sorted(merged.items()))


def compute_percentile(sorted_lengths: Sequence[int], percent: float) -> int:
    """Least length that at least `percent` of the (sorted) lengths do not exceed."""
    index = -(-len(sorted_lengths) * percent // 100) - 1
    return sorted_lengths[max(0, min(len(sorted_lengths) - 1, int(index)))]


def compute_stats(trajectories: Iterable[Trajectory]) -> TrajectoryStats:
    """Statistics in one pass. DataError where there is no trajectory."""
    groups: defaultdict[tuple[str, str], _Group] = defaultdict(_Group)
    whole, counts = _Group(), Counter[str]()
    reasons, models = Counter[str](), Counter[str]()
    num_prompt_tokens = num_controlled = 0
    for t in trajectories:
        groups[t.domain, t.split].add(t)
        whole.add(t)
        counts[t.prompt_hash] += 1
        reasons[t.finish_reason] += 1
        models[t.model] += 1
        num_prompt_tokens += len(t.prompt_token_ids)
        num_controlled += t.length_control is not None
    if not counts:
        raise DataError("no trajectories")
    train = [g for (_, split), g in groups.items() if split == "train"] or [whole]
    complete = [length for g in train for length in g.complete]
    per_prompt = counts.values()
    return TrajectoryStats(
        groups=[groups[key].summarise(*key) for key in sorted(groups)]
        + [whole.summarise("all", "all")],
        num_prompt_tokens=num_prompt_tokens,
        completions_per_prompt=(
            min(per_prompt),
            sum(per_prompt) / len(per_prompt),
            max(per_prompt),
        ),
        gamma=returns.compute_gamma(complete) if complete else None,
        finish_reasons=dict(reasons),
        models=dict(models),
        controlled=num_controlled,
    )


def downsample(
    sources: Sequence[Path],
    output: Path,
    *,
    prompts: int | None = None,
    per_prompt: int | None = None,
    seed: int = 0,
) -> Mapping[str, int]:
    """Write `prompts` random prompts of the sources, `per_prompt` random completions of each.

    Which prompts and completions are chosen follows from the seed and their ids alone, so that 4
    completions are among 8 of the same seed: curves over either number compare like with like.
    Returns counts (prompts, completions, and both as they were). Two passes; memory grows with the
    number of prompts and completions by some 100 bytes each.

    Raises InputError where more is asked for than there is, or `output` was made otherwise.
    """
    for name, value in (("prompts", prompts), ("per_prompt", per_prompt)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    ids: defaultdict[str, list[int]] = defaultdict(list)
    for t in read_trajectories(*sources):
        ids[t.prompt_hash].append(t.sample_index)
    if prompts is not None and prompts > len(ids):
        raise InputError(f"asked for {prompts} prompts, but there are {len(ids)}")
    kept = set(sorted(ids, key=lambda h: _rank(seed, h))[:prompts])
    chosen = {h: _choose(seed, h, ids[h], per_prompt) for h in kept}
    config = {
        "downsample_of": [str(p) for p in sources],
        "prompts": prompts,
        "per_prompt": per_prompt,
        "seed": seed,
    }
    claim(output, "trajectories", config)
    with replace_jsonl(output) as writer:
        for t in _select(read_trajectories(*sources), chosen):
            writer.write_lines([t.to_json_line()])
    return {
        "prompts": len(chosen),
        "completions": sum(len(c) for c in chosen.values()),
        "prompts_before": len(ids),
        "completions_before": sum(len(c) for c in ids.values()),
    }


def _select(
    trajectories: Iterable[Trajectory], chosen: Mapping[str, set[int]]
) -> Iterator[Trajectory]:
    return (t for t in trajectories if t.sample_index in chosen.get(t.prompt_hash, ()))


def _choose(seed: int, prompt_hash: str, indices: list[int], count: int | None) -> set[int]:
    if count is not None and count > len(indices):
        raise InputError(
            f"asked for {count} completions a prompt, but {prompt_hash} has {len(indices)}"
        )
    return set(sorted(indices, key=lambda i: _rank(seed, f"{prompt_hash}-{i}"))[:count])


def _rank(seed: int, name: str) -> float:
    return random.Random(f"{seed}/{name}").random()
