"""The loss: raw head outputs and remaining lengths -> a sum over tokens. Pure tensors.

The mean over all tokens of the global batch (paper, Eq. 9) is this sum over their number; averaging
per sequence first would shift the target (App. E).

Shape legend: N states that count, D head outputs, K bins.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm import returns
from lenvm.model.head import DistributionHead, ValueHead

LossName = Literal["mse", "huber", "bce"]


def sum_loss(
    head: ValueHead,
    raw: Tensor,
    remaining: Tensor,
    is_complete: Tensor,
    gamma: float,
    *,
    loss: LossName = "mse",
) -> Tensor:
    """Loss summed over states, fp32. raw [N, D]; remaining [N] >= 1; is_complete [N].

    Where a completion was cut off, `remaining` is a lower bound: the scalar head is then penalised
    for predicting less only, the distribution head for P(remaining < bound).
    """
    if isinstance(head, DistributionHead):
        return _distribution_loss(head, raw, remaining, is_complete)
    value = returns.logit_to_value(raw.squeeze(-1))
    target = returns.length_to_value(remaining, gamma)
    if loss == "bce":
        terms = F.binary_cross_entropy_with_logits(raw.squeeze(-1), -target, reduction="none")
    elif loss == "huber":
        terms = F.huber_loss(value, target, reduction="none", delta=0.1)
    else:
        terms = (value - target).square()
    too_long = value < target  # more tokens predicted than the bound asks for
    return torch.where(~is_complete & too_long, 0.0, terms).sum()


def _distribution_loss(
    head: DistributionHead, raw: Tensor, remaining: Tensor, is_complete: Tensor
) -> Tensor:
    """Negative log-likelihood per token of length: -log P(bin) + log width, or -log P(>= bound)."""
    log_probs = raw.float().log_softmax(-1)
    index = head.bins.index(remaining).unsqueeze(-1)
    exact = -log_probs.gather(-1, index).squeeze(-1)
    beyond = log_probs.flip(-1).logcumsumexp(-1).flip(-1)
    censored = -beyond.gather(-1, index).squeeze(-1)
    return torch.where(is_complete, exact, censored).sum()
