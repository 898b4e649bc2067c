"""Accuracy against length: pass@k, curves per family, the Pareto front, areas between curves. Pure.

A family (all tilts, all budgets ...) is a curve: its points sorted by mean length, the unguided arm
among them, straight lines between. Nothing is said outside the lengths that a curve reaches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from lenvm.errors import InputError
from lenvm.evals.bootstrap import Array, Estimate, average

MIN_RANGE = 0.05
"""Least width of a common range of lengths, as a share of its end, that has an area: over less, a
gap is that between two points, and another draw of the prompts moves it anywhere."""


@dataclass(frozen=True)
class Point:
    """An arm on the plane."""

    arm: str
    length: Estimate
    accuracy: Estimate


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k of one item: 1 - C(n-c, k) / C(n, k). Chen et al. 2021, Eq. 1.

    Raises InputError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise InputError(f"pass@{k} needs 1 <= k <= n; got {num_correct} of n = {num_samples}")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def pareto_front(points: Sequence[Point]) -> list[str]:
    """Arms that no other arm beats in both length and accuracy, the shortest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.length.value, -p.accuracy.value)):
        if not front or point.accuracy.value > front[-1].accuracy.value:
            front.append(point)
    return [point.arm for point in front]


def accuracy_at(curve: Sequence[Point], length: Estimate) -> Estimate | None:
    """Accuracy of a curve at a length, also on every resample; None outside its reach."""
    reach = [p.length.value for p in curve]
    if not curve or not min(reach) <= length.value <= max(reach):
        return None
    return Estimate(
        float(_interpolate(curve, None)(np.array([length.value]))[0]),
        np.array([_interpolate(curve, b)(n[None])[0] for b, n in enumerate(length.samples)]),
        min(e.num_clusters for e in (length, *(p.length for p in curve))),
    )


def area_between(
    one: Sequence[Point], two: Sequence[Point], *, num_points: int = 101
) -> tuple[float, float, Estimate] | None:
    """(from, to, mean of accuracy one minus two) over the lengths both curves reach, or None. The
    mean is NaN where that range is narrower than MIN_RANGE of its end."""
    low = max(min(p.length.value for p in curve) for curve in (one, two))
    high = min(max(p.length.value for p in curve) for curve in (one, two))
    if not high > low:
        return None
    if high - low < MIN_RANGE * high:
        return low, high, average([])
    grid = np.linspace(low, high, num_points)

    def gap(b: int | None) -> float:
        difference = _interpolate(one, b)(grid) - _interpolate(two, b)(grid)
        return float(np.trapezoid(difference, grid) / (high - low))

    samples = np.array([gap(b) for b in range(len(one[0].length.samples))])
    num = min(e.num_clusters for p in (*one, *two) for e in (p.length, p.accuracy))
    return low, high, Estimate(gap(None), samples, num)


def group_curves(points: Mapping[str, Sequence[Point]], unguided: Point) -> dict[str, list[Point]]:
    """Each family's points by length, with the unguided arm."""
    return {
        family: sorted([*row, unguided], key=lambda p: p.length.value)
        for family, row in points.items()
        if row
    }


class _Interpolation:
    def __init__(self, lengths: Array, accuracies: Array) -> None:
        order = np.argsort(lengths, kind="stable")
        self.lengths, self.accuracies = lengths[order], accuracies[order]

    def __call__(self, at: Array) -> Array:
        return np.asarray(np.interp(at, self.lengths, self.accuracies))


def _interpolate(curve: Sequence[Point], resample: int | None) -> _Interpolation:
    """The curve on the data (None) or on one resample; NaN points are left out."""
    rows = [
        (p.length.value, p.accuracy.value)
        if resample is None
        else (float(p.length.samples[resample]), float(p.accuracy.samples[resample]))
        for p in curve
    ]
    known = np.array([row for row in rows if np.isfinite(row).all()] or [(np.nan, np.nan)])
    return _Interpolation(known[:, 0], known[:, 1])
