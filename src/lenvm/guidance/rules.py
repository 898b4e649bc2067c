"""The rules: candidate log-probabilities and beliefs -> guided log-probabilities. Pure tensors.

t tokens are generated; a candidate's state has t + 1. For a goal of [low, high] tokens in total the
candidate should leave between low - t - 1 and high - t - 1 tokens to come. With u = -V in [0, 1):

* tilt:         p(x) exp(-s u(x)); s > 0 shortens.
* soft:         p(x) exp(-strength d(x)), d = distance of u(x) from [u(low), u(high)].
* conditional:  p(x) P(low - t - 1 <= remaining <= high - t - 1 | s + x)^evidence: Bayes' rule.
* hard:         the paper's. equal_to: argmin |u - u*|; at_least: argmax u while the target is
                unmet; at_most: argmin u. The likelier candidate wins a tie.

Soft and conditional keep what they promise where the candidates allow it: no ending token before
`low`, nothing but an ending token at `high`. A row's result depends on that row alone.

Shape legend: R rows, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm.guidance.candidates import Candidates
from lenvm.guidance.request import LengthControl
from lenvm.model.head import LengthBelief
from lenvm.returns import log_discount

NONE, TILT, SOFT, CONDITIONAL, HARD = range(5)
CODES = {"soft": SOFT, "conditional": CONDITIONAL, "hard": HARD}


@dataclass
class RuleParams:
    """Per-row parameters, [R] each. `num_generated` is t."""

    code: Tensor
    low: Tensor
    high: Tensor
    scale: Tensor
    """Tilt scale s, soft strength, or conditional evidence."""
    min_entropy: Tensor
    num_generated: Tensor

    @classmethod
    def build(
        cls,
        controls: Sequence[LengthControl | None],
        num_generated: Sequence[int],
        *,
        has_distribution: bool,
        device: torch.device | str = "cpu",
    ) -> "RuleParams":
        """From controls; a goal without a rule gets `conditional` where the head allows, else
        `soft`. None leaves its row to the generator."""
        rows = [_row(c, has_distribution) for c in controls]
        code, low, high, scale, gate = zip(*rows, strict=True)
        return cls(
            code=torch.tensor(code, device=device),
            low=torch.tensor(low, device=device),
            high=torch.tensor(high, device=device),
            scale=torch.tensor(scale, dtype=torch.float32, device=device),
            min_entropy=torch.tensor(gate, dtype=torch.float32, device=device),
            num_generated=torch.tensor(list(num_generated), device=device),
        )


def _row(control: LengthControl | None, distribution: bool) -> tuple[int, int, int, float, float]:
    if control is None:
        return NONE, 0, 0, 0.0, 0.0
    low, high = control.interval()
    if control.tilt is not None:
        return TILT, low, high, control.tilt, control.min_entropy
    rule = control.rule or ("conditional" if distribution else "soft")
    scale = control.evidence if rule == "conditional" else control.strength
    return CODES[rule], low, high, scale, control.min_entropy


def apply_rules(
    candidates: Candidates, belief: LengthBelief, params: RuleParams, gamma: float
) -> Tensor:
    """Guided log-probabilities [R, K], normalised over each row's candidates; never NaN.

    belief: over [R, K], with ending tokens at exactly 0 (`with_terminal`). Where a rule leaves
    nothing possible, the generator decides among what the promise allows.
    """
    base = candidates.log_probs
    u = -belief.value(gamma)
    left = (params.num_generated + 1).unsqueeze(-1)
    low, high = params.low.unsqueeze(-1) - left, params.high.unsqueeze(-1) - left
    code, scale = params.code.unsqueeze(-1), params.scale.unsqueeze(-1)

    guided = torch.where(code == TILT, base - scale * u, base)
    distance = _distance(u, low, high, gamma)
    guided = torch.where(code == SOFT, base - scale * distance, guided)
    if belief.has_distribution:
        evidence = scale * belief.log_interval(low, high)
        evidence = torch.where(scale > 0, evidence, 0.0)
        guided = torch.where(code == CONDITIONAL, base + evidence, guided)
    hard = _hard_choice(base, u, distance, low, params)
    guided = torch.where(code == HARD, hard, guided)

    closed = entropy(base) < params.min_entropy
    guided = torch.where(closed.unsqueeze(-1), base, guided)
    allowed = _allowed(candidates, low, high, (code == SOFT) | (code == CONDITIONAL))
    guided = guided.masked_fill(~allowed, -torch.inf)
    possible = (guided > -torch.inf).any(-1, keepdim=True)
    guided = torch.where(possible, guided, base.masked_fill(~allowed, -torch.inf))
    return guided.log_softmax(-1)


def entropy(log_probs_RK: Tensor) -> Tensor:
    """Entropy of each row in nats: [R]."""
    total: Tensor = torch.special.entr(log_probs_RK.exp()).sum(-1)
    return total


def _distance(u: Tensor, low: Tensor, high: Tensor, gamma: float) -> Tensor:
    """How far u lies outside [u(low), u(high)]: [R, K], >= 0."""
    rate = log_discount(gamma)
    u_low, u_high = (-torch.expm1(-rate * n.clamp(min=0).float()) for n in (low, high))
    return (u_low - u).clamp(min=0) + (u - u_high).clamp(min=0)


def _hard_choice(
    base: Tensor, u: Tensor, distance: Tensor, low: Tensor, params: RuleParams
) -> Tensor:
    """The paper's argmin / argmax as log-probabilities: 0 at the choice, -inf elsewhere."""
    equal = (params.low == params.high).unsqueeze(-1)
    upper_only = (params.low <= 1).unsqueeze(-1)
    cost = torch.where(equal, distance, torch.where(upper_only, u, -u))
    cost = torch.where(base > -torch.inf, cost, torch.inf)
    best = cost.min(-1, keepdim=True).values
    tied = base.masked_fill(cost > best, -torch.inf)
    choice = torch.zeros_like(base, dtype=torch.bool).scatter(-1, tied.argmax(-1, True), True)
    hard = torch.zeros_like(base).masked_fill(~choice, -torch.inf)
    met = ~equal & ~upper_only & (low <= 0)
    return torch.where(met, base, hard)


def _allowed(candidates: Candidates, low: Tensor, high: Tensor, promises: Tensor) -> Tensor:
    """Candidates that keep the goal reachable: [R, K]. All of a row where none would be left."""
    keeps = torch.where(candidates.is_ending, low <= 0, high > 0) | (
        candidates.is_ending & (high <= 0)
    )
    allowed = candidates.mask & (keeps | ~promises)
    return torch.where(allowed.any(-1, keepdim=True), allowed, candidates.mask)
