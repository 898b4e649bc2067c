"""Baselines that see no value model: constants, the prompt's length, ridge on surface features.

All are fitted on prompts that are not measured: the training split where the files hold one, else
the other four fifths of the measured prompts (cross-fitting, folds by prompt hash). numpy only.
"""

import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lenvm.evals.prediction.groups import PromptGroup, true_length

Array = NDArray[np.float64]
NUM_FOLDS = 5
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
HINTS = (
    "explain",
    "list",
    "write",
    "code",
    "function",
    "story",
    "essay",
    "summar",
    "translate",
    "step",
    "brief",
    "short",
    "detail",
    "word",
    "prove",
    "find",
    "how many",
    "what is",
    "why",
    "yes or no",
)
Fit = Callable[[Sequence[PromptGroup], Array], Callable[[Sequence[PromptGroup]], Array]]


def predict_baselines(
    evaluated: Sequence[PromptGroup], training: Sequence[PromptGroup], gamma: float
) -> tuple[dict[str, Array], str]:
    """({baseline: predicted length of each evaluated prompt}, "train" or "cross-fit")."""
    if training:
        lengths = _true_lengths(training, gamma)
        found = {n: fit(training, lengths)(evaluated) for n, fit in _fits(gamma).items()}
        return found, "train"
    lengths = _true_lengths(evaluated, gamma)
    folds = np.array([zlib.crc32(g.id.encode()) % NUM_FOLDS for g in evaluated])
    found = {name: np.full(len(evaluated), np.nan) for name in _fits(gamma)}
    for fold in range(NUM_FOLDS):
        inside = [i for i, f in enumerate(folds) if f == fold]
        outside = [i for i, f in enumerate(folds) if f != fold] or inside
        if not inside:
            continue
        for name, fit in _fits(gamma).items():
            predict = fit([evaluated[i] for i in outside], lengths[outside])
            found[name][inside] = predict([evaluated[i] for i in inside])
    return found, "cross-fit"


def surface_features(group: PromptGroup) -> list[float]:
    """Numbers that anyone can read off a prompt."""
    text = group.text
    lower, words = text.lower(), text.split()
    size = max(len(text), 1)
    numbers = [float(n) for n in re.findall(r"\d{1,9}", text)]
    return [
        np.log(len(group.prompt_token_ids)),
        np.log1p(len(words)),
        np.log1p(len(text)),
        np.log1p(text.count("\n")),
        np.log1p(text.count("?")),
        np.log1p(text.count(".")),
        float(sum(c.isdigit() for c in text) / size),
        float(sum(ord(c) > 127 for c in text) / size),
        float(sum(c in "{}[]()=<>;_\\$" for c in text) / size),
        float(sum(c.isupper() for c in text) / size),
        float("```" in text),
        np.log1p(max(numbers, default=0.0)),
        np.log1p(len(numbers)),
        *(float(hint in lower) for hint in HINTS),
    ]


def _true_lengths(groups: Sequence[PromptGroup], gamma: float) -> Array:
    return np.array([true_length(g.lengths, gamma) for g in groups])


def _fits(gamma: float) -> dict[str, Fit]:
    return {
        "constant": lambda groups, lengths: _constant(groups, lengths, gamma, per_domain=False),
        "constant_per_domain": lambda g, n: _constant(g, n, gamma, per_domain=True),
        "prompt_length": _prompt_length,
        "ridge": _ridge,
    }


def _constant(
    groups: Sequence[PromptGroup], lengths: Array, gamma: float, *, per_domain: bool
) -> Callable[[Sequence[PromptGroup]], Array]:
    """The length of the mean u: the best constant for the squared error on values."""
    del lengths
    whole = true_length([n for g in groups for n in g.lengths], gamma)
    table = {
        domain: true_length([n for g in groups if g.domain == domain for n in g.lengths], gamma)
        for domain in ({g.domain for g in groups} if per_domain else ())
    }
    return lambda asked: np.array([table.get(g.domain, whole) for g in asked])


def _prompt_length(
    groups: Sequence[PromptGroup], lengths: Array
) -> Callable[[Sequence[PromptGroup]], Array]:
    """log length linear in log prompt tokens, least squares."""

    def design(asked: Sequence[PromptGroup]) -> Array:
        return np.array([[1.0, np.log(len(g.prompt_token_ids))] for g in asked])

    weights = np.linalg.lstsq(design(groups), np.log(lengths), rcond=None)[0]
    low, high = np.log(lengths).min(), np.log(lengths).max()
    return lambda asked: np.exp(np.clip(design(asked) @ weights, low, high))


def _ridge(
    groups: Sequence[PromptGroup], lengths: Array
) -> Callable[[Sequence[PromptGroup]], Array]:
    """log length on standardised surface features and domain; penalty by leave-one-out error."""
    domains = sorted({g.domain for g in groups})

    def design(asked: Sequence[PromptGroup]) -> Array:
        rows = [[*surface_features(g), *(float(g.domain == d) for d in domains)] for g in asked]
        return np.array(rows)

    raw, target = design(groups), np.log(lengths)
    mean, spread = raw.mean(0), raw.std(0)
    spread[spread < 1e-9] = 1.0
    x, centre = (raw - mean) / spread, target.mean()
    left, sizes, right = np.linalg.svd(x, full_matrices=False)
    rotated = left.T @ (target - centre)

    def leave_one_out(penalty: float) -> float:
        shrink = sizes**2 / (sizes**2 + penalty)
        leverage = (left**2 * shrink).sum(1) + 1 / len(target)
        residual = target - centre - left @ (shrink * rotated)
        return float(((residual / np.maximum(1 - leverage, 1e-3)) ** 2).mean())

    penalty = min(PENALTIES, key=leave_one_out)
    weights = right.T @ (sizes / (sizes**2 + penalty) * rotated)
    low, high = target.min(), target.max()

    def predict(asked: Sequence[PromptGroup]) -> Array:
        scaled = (design(asked) - mean) / spread
        return np.asarray(np.exp(np.clip(centre + scaled @ weights, low, high)))

    return predict
