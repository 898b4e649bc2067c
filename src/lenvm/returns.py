"""Length, value and logit into each other; returns; TD residuals; gamma from data.

The one convention of the whole package:

* A completion has L tokens x_1 .. x_L; the ending token (EOS), where there is one, is x_L and is
  counted. State s_t is the prompt and the first t tokens; s_0 ends with the last prompt token, s_L
  is terminal. `remaining` n = L - t is the number of tokens still to come: n >= 1 in every state
  that a model is asked about, n = 0 in the terminal one.
* Generating token x_{t+1} from s_t costs r_t = -(1 - gamma), every token the same, and the value is
  V(s_t) = G_t = -(1 - gamma^n), in (-1, 0]; V = 0 exactly at n = 0. The Bellman recursion reads
  G_t = -(1 - gamma) + gamma * G_{t+1} for every t < L, with G_L = 0.
* u = -V in [0, 1) grows with the length. z is the logit of u: V = -sigmoid(z).
* A TD residual is delta_{t+1} = -(1 - gamma) + gamma * V(s_{t+1}) - V(s_t) and is credited to token
  x_{t+1}. A token that makes the model expect a longer answer has delta < 0; `length_gain` = -delta
  is what is shown to people (positive = longer).

Everything here is exact in fp32 from 1 to 1,000,000 tokens: `expm1`, `log1p`, `softplus`, never
1 - gamma^n in plain arithmetic. Paper: arXiv 2604.27039, Eq. 3-9.

Shape legend: T states or tokens of a sequence, ... any leading shape.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm.errors import InputError

ABOVE_LEAST = -1.0 + 2.0**-24
"""The value next to -1 in fp32."""


def log_discount(gamma: float) -> float:
    """-ln(gamma) > 0 in float64. Raises InputError unless 0 < gamma < 1."""
    if not (isinstance(gamma, int | float) and 0.0 < gamma < 1.0):
        raise InputError(f"gamma is {gamma!r}; it must lie strictly between 0 and 1")
    return -math.log(gamma)


def length_to_value(remaining: Tensor, gamma: float) -> Tensor:
    """V = -(1 - gamma^n). remaining: any shape, tokens, >= 0 -> fp32 of that shape in (-1, 0]."""
    return torch.expm1(-log_discount(gamma) * remaining.float())


def value_to_length(value: Tensor, gamma: float) -> Tensor:
    """n = ln(1 + V) / ln(gamma), the inverse of `length_to_value`. V in (-1, 0] -> tokens, fp32.

    Values close to -1 have no digits left in fp32, and -1 itself counts as the one above it, so
    that the length is finite. Where the logit is at hand use `logit_to_length`: exact for any."""
    value = value.float()
    return -torch.log1p(value.masked_fill(value == -1.0, ABOVE_LEAST)) / log_discount(gamma)


def logit_to_value(logit: Tensor) -> Tensor:
    """V = -sigmoid(z), fp32."""
    return -torch.sigmoid(logit.float())


def logit_to_length(logit: Tensor, gamma: float) -> Tensor:
    """n = softplus(z) / (-ln gamma): the length of `logit_to_value(z)` without cancellation."""
    return F.softplus(logit.float(), threshold=80.0) / log_discount(gamma)


def length_to_logit(remaining: Tensor, gamma: float) -> Tensor:
    """z with -sigmoid(z) = V(n): z = ln(e^a - 1), a = -n ln(gamma) > 0. -inf at n = 0."""
    scaled = log_discount(gamma) * remaining.float()
    return torch.where(
        scaled > 1.0, scaled + torch.log(-torch.expm1(-scaled)), torch.expm1(scaled).log()
    )


def compute_returns(length: int, gamma: float) -> Tensor:
    """G_0 .. G_{L-1} of one completion: [L] fp32, closed form (lambda = 1)."""
    return length_to_value(torch.arange(length, 0, -1), gamma)


def compute_lambda_returns(values: Tensor, gamma: float, lambda_: float) -> Tensor:
    """TD(lambda) targets for one completion that ended by itself.

    values: [..., L] V(s_0) .. V(s_{L-1}) (the terminal value 0 is implied) -> [..., L] fp32.
    G_t^lambda = -(1-gamma) + gamma ((1-lambda) V(s_{t+1}) + lambda G_{t+1}^lambda), which
    telescopes into V + sum_k (gamma lambda)^k delta; lambda = 1 is `compute_returns`, whatever V.
    Raises InputError unless 0 <= lambda <= 1. Source: Schulman et al. 2016 (GAE).
    """
    if not 0.0 <= lambda_ <= 1.0:
        raise InputError(f"lambda is {lambda_!r}; it must lie between 0 and 1")
    values = values.double()
    if lambda_ == 1.0:
        remaining = torch.arange(values.shape[-1], 0, -1, device=values.device)
        return length_to_value(remaining, gamma).expand(values.shape)
    deltas = compute_td_residuals(values, gamma, dtype=torch.float64)
    return (values + discounted_suffix_sums(deltas, gamma * lambda_)).float()


def compute_td_residuals(
    values: Tensor, gamma: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """delta_{t+1} = -(1-gamma) + gamma V(s_{t+1}) - V(s_t), credited to token x_{t+1}.

    values: [..., L] V(s_0) .. V(s_{L-1}); V(s_L) = 0 -> [..., L], entry t belongs to x_{t+1}.
    Negative = the token made the expected answer longer.
    """
    values = values.to(dtype)
    following = F.pad(values[..., 1:], (0, 1))
    return math.expm1(-log_discount(gamma)) + gamma * following - values


def discounted_suffix_sums(x: Tensor, decay: float) -> Tensor:
    """y_t = sum_{k >= t} decay^(k-t) x_k along the last axis, by doubling in log2(T) steps."""
    y, step = x.clone(), 1
    while step < x.shape[-1]:
        y[..., :-step] = y[..., :-step] + decay**step * y[..., step:].clone()
        step *= 2
    return y


def compute_gamma(lengths: Iterable[int], *, quantile: float = 0.99, level: float = 0.99) -> float:
    """gamma with 1 - gamma^(L_q) = level, L_q the `quantile` of the lengths (paper: both 0.99).

    Raises InputError for no lengths or a length below 1.
    """
    sorted_lengths = sorted(lengths)
    if not sorted_lengths or sorted_lengths[0] < 1:
        raise InputError(
            f"gamma needs lengths of at least 1 token; got {len(sorted_lengths)} lengths"
            + (f", the least {sorted_lengths[0]}" if sorted_lengths else "")
        )
    longest = sorted_lengths[min(len(sorted_lengths) - 1, int(quantile * len(sorted_lengths)))]
    return math.exp(math.log1p(-level) / longest)
