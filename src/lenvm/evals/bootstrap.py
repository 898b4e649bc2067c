"""Estimates with intervals: the bootstrap over clusters (prompts), in numpy.

One `Resampler` per evaluation draws the resamples once; every statistic is computed on the same
ones, so differences of estimates are paired. Source: Efron and Tibshirani 1993, percentiles.

Shape legend: B resamples, C clusters, N values.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MAX_ELEMENTS = 4_000_000
MAX_PAIRS_FROM = 3_000
MIN_CLUSTERS = 4
"""Fewer have no interval: more than 2.5% of the resamples of 3 are one cluster three times, so that
the percentiles would be the least and the greatest cluster, whatever the level."""


@dataclass(frozen=True)
class Estimate:
    """A statistic: on the data (`value`) and on every resample (`samples` [B])."""

    value: float
    samples: Array
    num_clusters: float = math.inf
    """Clusters with a value, the fewer where it is made of several estimates; inf: not known."""

    def __sub__(self, other: "Estimate") -> "Estimate":
        num = min(self.num_clusters, other.num_clusters)
        return Estimate(self.value - other.value, self.samples - other.samples, num)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.float64(self.value) / np.float64(other.value)
            num = min(self.num_clusters, other.num_clusters)
            return Estimate(float(value), self.samples / other.samples, num)

    def to_json(self, level: float = 0.95) -> dict[str, float | None] | None:
        """{"value", "low", "high"}; the bounds None where fewer than MIN_CLUSTERS clusters have a
        value; None for all where the statistic is not defined on the data."""
        known = self.samples[np.isfinite(self.samples)]
        if not np.isfinite(self.value):
            return None
        if not len(known) or self.num_clusters < MIN_CLUSTERS:
            return {"value": float(self.value), "low": None, "high": None}
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        return {"value": float(self.value), "low": float(low), "high": float(high)}


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of several estimates (macro average); NaN for none."""
    if not estimates:
        return Estimate(float("nan"), np.array([np.nan]))
    return Estimate(
        float(np.mean([e.value for e in estimates])),
        np.mean([e.samples for e in estimates], 0),
        min(e.num_clusters for e in estimates),
    )


class Resampler:
    """Resamples of whole clusters. `clusters` names all clusters of an evaluation."""

    def __init__(self, clusters: Sequence[str], *, num: int = 1000, seed: int = 0) -> None:
        names = sorted(set(clusters))
        self._index = {name: i for i, name in enumerate(names)}
        count = max(len(names), 1)
        generator = np.random.default_rng(seed)
        self.weights_BC: Array = generator.multinomial(
            count, np.full(count, 1 / count), size=num
        ).astype(np.float64)

    def mean(self, values: Sequence[float], clusters: Sequence[str]) -> Estimate:
        """Mean over values (each value counts the same, clusters are resampled). NaN for none."""
        width = self.weights_BC.shape[1]
        rows = self._rows(clusters)
        sums = np.bincount(rows, np.asarray(values, dtype=np.float64), minlength=width)
        counts = np.bincount(rows, minlength=width).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = sums.sum() / counts.sum() if len(rows) else np.nan
            samples = (self.weights_BC @ sums) / (self.weights_BC @ counts)
        return Estimate(float(value), samples, int((counts > 0).sum()))

    def quantile(
        self, values: Sequence[float], clusters: Sequence[str], q: float = 0.5
    ) -> Estimate:
        """Least value with at least a share q of the values at or below it (0.5: lower median)."""
        order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
        data = np.asarray(values, dtype=np.float64)[order]
        rows = self._rows(clusters)[order]
        if not len(data):
            return average([])

        def pick(weights_BN: Array) -> Array:
            totals = weights_BN.cumsum(1)
            enough = totals >= q * totals[:, -1:] - 1e-9
            found = data[enough.argmax(1)]
            return np.where(totals[:, -1] > 0, found, np.nan)

        return self._over_weights(rows, pick)

    def spearman(self, x: Sequence[float], y: Sequence[float], clusters: Sequence[str]) -> Estimate:
        """Rank correlation, ties at their middle rank."""
        a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if len(a) < 2:
            return average([])

        def correlate(weights_BN: Array) -> Array:
            return _correlate(_ranks(a, weights_BN), _ranks(b, weights_BN), weights_BN)

        return self._over_weights(self._rows(clusters), correlate)

    def kendall(self, x: Sequence[float], y: Sequence[float], clusters: Sequence[str]) -> Estimate:
        """tau-b. From at most 3,000 values, evenly taken: it looks at all pairs."""
        step = -(-len(x) // MAX_PAIRS_FROM) or 1
        a, b = (np.asarray(v, dtype=np.float64)[::step] for v in (x, y))
        if len(a) < 2:
            return average([])
        signs = [np.sign(v[:, None] - v[None, :]).astype(np.float32) for v in (a, b)]
        products = [signs[0] * signs[1], np.abs(signs[0]), np.abs(signs[1])]

        def tau(weights_BN: Array) -> Array:
            w = weights_BN.astype(np.float32)
            both, first, second = (((w @ p) * w).sum(1).astype(np.float64) for p in products)
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(both / np.sqrt(first * second))

        return self._over_weights(self._rows(clusters)[::step], tau)

    # -- inside -----------------------------------------------------------------------------------

    def _rows(self, clusters: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self._index[name] for name in clusters], dtype=np.int64)

    def _over_weights(
        self, rows: NDArray[np.int64], statistic: Callable[[Array], Array]
    ) -> Estimate:
        """statistic(weights [b, N]) -> [b], on the data and in blocks over the resamples."""
        value = statistic(np.ones((1, len(rows))))[0]
        size = max(1, MAX_ELEMENTS // max(len(rows), 1))
        blocks = [
            statistic(self.weights_BC[start : start + size][:, rows])
            for start in range(0, len(self.weights_BC), size)
        ]
        return Estimate(float(value), np.concatenate(blocks), len(np.unique(rows)))


def _ranks(values: Array, weights_BN: Array) -> Array:
    """Middle ranks [b, N] of values that occur `weights` times."""
    _, level = np.unique(values, return_inverse=True)
    mass = np.zeros((len(weights_BN), level.max() + 1))
    for row, weights in zip(mass, weights_BN, strict=True):
        row += np.bincount(level, weights, minlength=mass.shape[1])
    below = mass.cumsum(1) - mass
    return np.asarray((below + (mass + 1) / 2)[:, level])


def _correlate(a: Array, b: Array, weights: Array) -> Array:
    """Weighted Pearson correlation along the last axis."""
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weights.sum(1, keepdims=True)
        a = a - (a * weights).sum(1, keepdims=True) / total
        b = b - (b * weights).sum(1, keepdims=True) / total
        spread = (weights * a * a).sum(1) * (weights * b * b).sum(1)
        return np.asarray((weights * a * b).sum(1) / np.sqrt(spread))
