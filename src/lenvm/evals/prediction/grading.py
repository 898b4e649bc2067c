"""Prediction records -> grades -> the numbers of summary.json. Pure: nothing is predicted here."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lenvm.evals.bootstrap import Array, Estimate, Resampler
from lenvm.evals.prediction.groups import true_length
from lenvm.returns import log_discount

Grade = dict[str, Any]
INTERVALS = {"50": (0.25, 0.75), "80": (0.1, 0.9), "95": (0.025, 0.975)}
NUM_PIT_BINS = 10
ORDERLESS = {"constant": math.inf, "constant_per_domain": 2}
"""Baselines that put no prompt before another unless there are so many domains: they have no rank
correlation. (Cross-fitted, a constant differs by fold, against the truth of its own fold.)"""


def grade_prompt(
    record: Mapping[str, Any], baselines: Mapping[str, float], gamma: float, head: str
) -> Grade:
    """One prompt's numbers. A distribution head answers mean and median with its own."""
    belief, lengths = record["prediction"], record["lengths"]
    predicted = belief["length"]
    if head == "distribution":
        predicted = float(-np.log1p(max(belief["value"], -1 + 1e-12)) / log_discount(gamma))
    truth = true_length(lengths, gamma)
    return {
        "id": record["id"],
        "domain": record["domain"],
        "length_true": truth,
        "length_mean": float(np.mean(lengths)),
        "length_median": float(np.median(lengths)),
        "predicted": predicted,
        "predicted_mean": belief.get("mean", belief["length"]),
        "predicted_median": belief["length"],
        "predicted_geometric": belief.get("geometric_mean"),
        "relative_error": abs(predicted - truth) / truth,
        "baselines": dict(baselines),
        "pit": pit_values(belief.get("quantiles"), lengths),
        "inside": inside_intervals(belief.get("quantiles"), lengths, record["censored"]),
        "positions": [
            {"at": p["at"], "relative_error": abs(p["predicted"] - p["remaining"]) / p["remaining"]}
            for p in record["positions"]
        ],
    }


def pit_values(quantiles: Mapping[str, float] | None, lengths: Sequence[int]) -> list[float] | None:
    """Mid-PIT (F(L-1) + F(L)) / 2 of each length; F by interpolation between the quantiles.

    None without quantiles, or with too few of them to fill the histogram's bins.
    """
    if quantiles is None or len(quantiles) < NUM_PIT_BINS - 1:
        return None
    levels = np.array(sorted(map(float, quantiles)))
    tokens = np.array([quantiles[str(q)] for q in levels])
    keep = np.append(tokens[1:] > tokens[:-1], True)  # the last level of equal lengths
    x, y = np.append(0.0, tokens[keep]), np.append(0.0, levels[keep])
    above = (1 + levels[-1]) / 2

    def cdf(n: Array) -> Array:
        return np.asarray(np.where(n > x[-1], above, np.interp(n, x, y)))

    n = np.asarray(lengths, dtype=np.float64)
    return [float(p) for p in (cdf(n - 1) + cdf(n)) / 2]


def inside_intervals(
    quantiles: Mapping[str, float] | None, lengths: Sequence[int], censored: Sequence[int] = ()
) -> dict[str, list[bool]]:
    """Per central interval that the quantiles bound: which lengths lie inside it.

    censored: tokens seen of completions that were cut off. One seen up to the interval's end is
    longer, so outside; of one cut off before that nobody knows, and it is left out.
    """
    bounds = {
        name: (quantiles[str(low)], quantiles[str(high)])
        for name, (low, high) in INTERVALS.items()
        if quantiles is not None and str(low) in quantiles and str(high) in quantiles
    }
    return {
        name: [low <= x <= high for x in lengths] + [False for seen in censored if seen >= high]
        for name, (low, high) in bounds.items()
    }


def summarise_domain(grades: Sequence[Grade], num_completions: int) -> dict[str, Any]:
    """Numbers of a set of prompts."""
    names = [g["id"] for g in grades]
    r = Resampler(names)

    def errors(predicted: Sequence[float], truth: str) -> list[float]:
        return [abs(p - g[truth]) / g[truth] for p, g in zip(predicted, grades, strict=True)]

    def measure(by_truth: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        main = by_truth["length_true"]
        truth = [g["length_true"] for g in grades]
        return {
            "mre": r.mean(errors(main, "length_true"), names).to_json(),
            "median_re": r.quantile(errors(main, "length_true"), names).to_json(),
            "mre_mean": r.mean(errors(by_truth["length_mean"], "length_mean"), names).to_json(),
            "mre_median": r.mean(
                errors(by_truth["length_median"], "length_median"), names
            ).to_json(),
            "mae": r.mean([abs(p - t) for p, t in zip(main, truth, strict=True)], names).to_json(),
            "spearman": r.spearman(main, truth, names).to_json(),
            "kendall": r.kendall(main, truth, names).to_json(),
        }

    def column(name: str) -> list[float]:
        return [g[name] for g in grades]

    baselines = {}
    for name in grades[0]["baselines"]:
        one = [g["baselines"][name] for g in grades]
        baselines[name] = measure(
            dict.fromkeys(("length_true", "length_mean", "length_median"), one)
        )
        if name in ORDERLESS and len({g["domain"] for g in grades}) < ORDERLESS[name]:
            baselines[name] |= {"spearman": None, "kendall": None}
    geometric = None
    if all(g["predicted_geometric"] is not None for g in grades):
        wrong = errors(column("predicted_geometric"), "length_true")
        geometric = {
            "mre": r.mean(wrong, names).to_json(),
            "median_re": r.quantile(wrong, names).to_json(),
        }
    own = {
        "length_true": column("predicted"),
        "length_mean": column("predicted_mean"),
        "length_median": column("predicted_median"),
    }
    return {
        "num_prompts": len(grades),
        "num_completions": num_completions,
        **measure(own),
        "geometric": geometric,
        "baselines": baselines,
        "calibration": _calibration(grades),
        "coverage": _coverage(grades, r),
        "pit": _pit_histogram(grades),
        "positions": _positions(grades, r),
    }


def _calibration(grades: Sequence[Grade]) -> list[dict[str, float]]:
    """Up to ten equally filled groups by prediction: mean predicted against mean true length."""
    order = sorted(grades, key=lambda g: g["predicted"])
    parts = np.array_split(np.arange(len(order)), min(10, len(order)))
    return [
        {
            "num": len(part),
            "predicted": float(np.mean([order[i]["predicted"] for i in part])),
            "actual": float(np.mean([order[i]["length_true"] for i in part])),
        }
        for part in parts
    ]


def _coverage(grades: Sequence[Grade], r: Resampler) -> dict[str, Any] | None:
    found = {}
    for name in INTERVALS:
        rows = [(x, g["id"]) for g in grades for x in g["inside"].get(name, ())]
        if rows:
            found[name] = r.mean([float(x) for x, _ in rows], [i for _, i in rows]).to_json()
    return found or None


def _pit_histogram(grades: Sequence[Grade]) -> list[float] | None:
    values = [p for g in grades for p in g["pit"] or ()]
    if not values:
        return None
    counts, _ = np.histogram(values, NUM_PIT_BINS, (0.0, 1.0))
    return [float(share) for share in counts / counts.sum()]


def _positions(grades: Sequence[Grade], r: Resampler) -> list[dict[str, Any]]:
    found = []
    for at in sorted({p["at"] for g in grades for p in g["positions"]}):
        rows = [
            (p["relative_error"], g["id"]) for g in grades for p in g["positions"] if p["at"] == at
        ]
        errors, names = [e for e, _ in rows], [i for _, i in rows]
        estimates: dict[str, Estimate] = {
            "mre": r.mean(errors, names),
            "median_re": r.quantile(errors, names),
        }
        found.append({"at": at, "num": len(rows), **{k: e.to_json() for k, e in estimates.items()}})
    return found
