"""How good a value model is: token-level and prompt-level errors on held-out trajectories.

Prompt level (paper, Eq. 13-15): of N completions of a prompt, u_i = 1 - gamma^(L_i), the true
length is L_GT = ln(1 - mean u) / ln gamma, and MRE = mean |L_hat - L_GT| / L_GT over prompts. The
constant predictor says the same u for every prompt: the mean over the training prompts.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lenvm import returns

POSITIONS = (0.0, 0.25, 0.5, 0.75)


def true_length(lengths: Sequence[int], gamma: float) -> float:
    """L_GT of a prompt's completions (Eq. 14)."""
    rate = returns.log_discount(gamma)
    mean = sum(math.exp(-rate * n) for n in lengths) / len(lengths)
    return -math.log(mean) / rate


def constant_length(groups: Sequence[Sequence[int]], gamma: float) -> float:
    """What the constant predictor says: the length of the mean u over prompts."""
    rate = returns.log_discount(gamma)
    means = [sum(math.exp(-rate * n) for n in group) / len(group) for group in groups]
    return -math.log(sum(means) / len(means)) / rate


def prompt_errors(
    predicted: Mapping[str, float], groups: Mapping[str, Sequence[int]], gamma: float
) -> dict[str, float]:
    """|L_hat - L_GT| / L_GT of each prompt."""
    truth = {prompt: true_length(lengths, gamma) for prompt, lengths in groups.items()}
    return {p: abs(predicted[p] - truth[p]) / truth[p] for p in groups}


def token_errors(length: Tensor, remaining: Tensor) -> dict[str, float]:
    """MAE and RMSE in tokens, and mean relative error, over states: both [N]."""
    error = length.double() - remaining.double()
    return {
        "mae": error.abs().mean().item(),
        "rmse": error.square().mean().sqrt().item(),
        "relative_error": (error.abs() / remaining.double()).mean().item(),
    }


def position_errors(lengths: Sequence[Tensor], answers: Sequence[int]) -> dict[str, float]:
    """Mean relative error at 0, 25, 50 and 75% of each completion.

    lengths: for each completion its predicted remaining lengths in s_0 .. s_{L-1}, [L].
    """
    sums: dict[str, list[float]] = defaultdict(list)
    for predicted, answer in zip(lengths, answers, strict=True):
        for share in POSITIONS:
            t = int(share * answer)
            sums[f"relative_error_at_{round(share * 100)}"].append(
                abs(float(predicted[t]) - (answer - t)) / (answer - t)
            )
    return {name: sum(values) / len(values) for name, values in sums.items()}


def summarise(errors: Mapping[str, float], domains: Mapping[str, str]) -> dict[str, object]:
    """Mean and median of prompt errors, overall and per domain."""

    def both(values: list[float]) -> dict[str, float]:
        return {
            "mre": sum(values) / len(values),
            "median": float(torch.tensor(values, dtype=torch.float64).median()),
            "num_prompts": len(values),
        }

    by_domain: dict[str, list[float]] = defaultdict(list)
    for prompt, error in errors.items():
        by_domain[domains[prompt]].append(error)
    per_domain = {name: both(values) for name, values in sorted(by_domain.items())}
    return {**both(list(errors.values())), "per_domain": per_domain}
