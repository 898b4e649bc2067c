"""The loss: raw head outputs of all states -> a weighted sum, and what to divide it by.

The loss of a global batch is the sum over its micro batches and processes, divided by
`Objective.denominator`, which the batch plan knows beforehand: the number of states that count
(paper, Eq. 9). Everything is a pure function of flat tensors.

The scalar head's output is always the logit z of u = -V at the checkpoint's gamma, whatever the
target: a target only chooses where the error is measured (value, length, length over the longest,
logarithm of the length), so that `belief` reads every checkpoint alike.

Shape legend: C completions, M states s_0 .. s_L of all of them (L + 1 each), D head outputs.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm import returns
from lenvm.data.packing import PackedBatch
from lenvm.errors import InputError
from lenvm.model.config import TargetName
from lenvm.model.head import MAX_REMAINING, DistributionHead, ValueHead

LossName = Literal["mse", "huber", "bce"]
Aggregation = Literal["token", "sequence_mean", "sequence_sum"]
CensoringName = Literal["drop", "one_sided", "bootstrap"]


@dataclass(frozen=True)
class States:
    """All states of a batch: `completion` [M] says whose each is, `steps` [M] which (t)."""

    completion: Tensor
    steps: Tensor
    lengths: Tensor
    """[C]"""
    complete: Tensor
    """[C] bool"""
    is_endless: Tensor
    """[C] bool: never ends."""
    last: Tensor
    """[C] place of s_L among the M."""
    longest: int
    any_cut: bool

    @classmethod
    def of(cls, batch: PackedBatch) -> "States":
        """The states of a batch; never waits for the device."""
        offsets, lengths, num_states = batch.state_offsets, batch.lengths, len(batch.state_index)
        completion = torch.repeat_interleave(lengths + 1, output_size=num_states)
        steps = torch.arange(num_states, device=lengths.device) - offsets[completion]
        last = offsets[1:] - 1
        return cls(
            completion,
            steps,
            lengths,
            batch.complete,
            batch.is_endless,
            last,
            batch.longest,
            batch.any_cut,
        )

    @property
    def remaining(self) -> Tensor:
        """[M] L - t: tokens still to come, or a lower bound less one where it was cut off; of a
        loop, more than any length."""
        lengths = self.lengths + MAX_REMAINING * self.is_endless
        return lengths[self.completion] - self.steps

    @property
    def is_known(self) -> Tensor:
        """[M] whether the completion ended by itself."""
        return self.complete[self.completion]


@dataclass(frozen=True)
class Objective:
    """Which loss. `check` raises InputError for options that do not fit each other."""

    target: TargetName = "discounted_return"
    loss: LossName = "mse"
    relative: bool = False
    """Errors relative to the target."""
    aggregation: Aggregation = "token"
    censoring: CensoringName = "drop"
    lambda_: float = 1.0
    """TD(lambda) targets; 1 is the closed form."""
    include_eos: bool = False
    """Whether the terminal state (after the ending token, nothing remaining) is trained too."""
    smoothing: float = 0.0
    """Distribution head: probability moved from the true bin to its two neighbours."""
    huber_delta: float = 0.1
    """In the target's units."""
    prompt_weight: int = 1
    """How many states the end of the prompt, s_0, counts as. It is one of hundreds, and the one
    that predicts a length before anything is written."""
    length_scale: float = 1.0
    """Tokens that count as 1 with target normalized_length: the longest of the data."""

    def check(self, head: str) -> None:
        """Refuse what makes no sense; warn where the target moves."""
        distribution = head == "distribution"
        value_target = self.target == "discounted_return"
        rules = [
            (distribution and not value_target, "target", "discounted_return"),
            (distribution and self.loss != "mse", "loss", "mse (its loss is the likelihood)"),
            (distribution and self.relative, "relative", "false"),
            (distribution and self.lambda_ != 1, "lambda_", "1"),
            (distribution and self.censoring == "bootstrap", "censoring", "drop, one_sided"),
            (distribution and self.include_eos, "include_eos", "false (bins begin at 1 token)"),
        ]
        for bad, name, allowed in rules:
            if bad:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; the distribution head allows {allowed}"
                )
        if not distribution and self.smoothing:
            raise InputError("smoothing is for the distribution head; set it to 0")
        if self.loss == "bce" and (not value_target or self.relative):
            raise InputError("loss bce needs target discounted_return and relative = false")
        if self.lambda_ != 1 and not value_target:
            raise InputError(f"lambda_ is {self.lambda_}; target {self.target} allows 1 only")
        if self.include_eos and (self.relative or self.target == "log_length"):
            raise InputError("include_eos: the terminal state has neither ratio nor logarithm")
        if self.relative and self.target == "log_length":
            raise InputError("relative is for targets that cannot be 0; log_length is 0 at 1 token")
        if self.prompt_weight != 1 and self.aggregation != "token":
            raise InputError(
                f"prompt_weight is {self.prompt_weight}; aggregation {self.aggregation!r} allows 1"
            )
        if self.aggregation != "token":
            warnings.warn(
                f"aggregation {self.aggregation!r} weighs states by the length of their completion "
                "and so shifts what the model learns to predict (paper, App. E); 'token' does not",
                stacklevel=2,
            )

    def num_states(self, lengths: Tensor, complete: Tensor) -> Tensor:
        """[C] states of each completion that count."""
        return lengths + (complete & self.include_eos)

    def denominator(self, lengths: Tensor, complete: Tensor) -> int:
        """What the summed loss of completions [C] is divided by, over the whole global batch."""
        if self.aggregation == "token":
            more = (self.prompt_weight - 1) * len(lengths)
            return int(self.num_states(lengths, complete).sum()) + more
        return len(lengths)

    def sum(self, head: ValueHead, raw: Tensor, states: States, gamma: float) -> Tensor:
        """The weighted sum of the loss, fp32 scalar. raw: [M, D] of all states."""
        if isinstance(head, DistributionHead):
            terms = distribution_terms(head, raw, states, self.smoothing)
        else:
            terms = self.scalar_terms(raw.squeeze(-1).float(), states, gamma)
        return terms @ self._weights(states)

    def _weights(self, states: States) -> Tensor:
        """[M] fp32: 0 where a state does not count."""
        inside = states.steps < states.lengths[states.completion]
        if self.include_eos:
            inside = inside | states.is_known
        weights = inside.float()
        if self.prompt_weight != 1:
            weights = torch.where(states.steps == 0, weights * self.prompt_weight, weights)
        if self.aggregation == "sequence_mean":
            weights = weights / self.num_states(states.lengths, states.complete)[states.completion]
        return weights

    def scalar_terms(self, logit: Tensor, states: States, gamma: float) -> Tensor:
        """[M] loss of each state. logit: [M]."""
        target, bound = self._targets(logit.detach(), states, gamma)
        prediction = self._project(logit, gamma)
        if self.loss == "bce":
            terms = F.binary_cross_entropy_with_logits(logit, -target, reduction="none")
        else:
            # where nothing counts (the terminal state), any finite target will do
            scale = target.abs().clamp(min=1e-12) if self.relative else 1.0
            error = (prediction - target) / scale
            if self.loss == "huber":
                zero, delta = torch.zeros_like(error), self.huber_delta
                terms = F.huber_loss(error, zero, reduction="none", delta=delta)
            else:
                terms = error.square()
        longer = prediction < target if self.target == "discounted_return" else prediction > target
        return torch.where(bound & longer, 0.0, terms)

    def _targets(self, logit: Tensor, states: States, gamma: float) -> tuple[Tensor, Tensor]:
        """([M] targets, [M] whether the target is only a bound)."""
        known = states.is_known
        if self.lambda_ != 1:
            values = returns.logit_to_value(logit)
            target = packed_lambda_returns(values, states, gamma, self.lambda_)
            if self.censoring == "bootstrap":
                return target, torch.zeros_like(known)
            return torch.where(known, target, self._bound(states, gamma)), ~known
        remaining = states.remaining.float()
        if self.censoring == "bootstrap":
            ahead = returns.logit_to_length(logit, gamma)[states.last]
            more = torch.where(states.complete, 0.0, ahead)
            remaining = remaining + more[states.completion]
            return self._project_length(remaining, gamma), torch.zeros_like(known)
        target = self._project_length(remaining, gamma)
        return torch.where(known, target, self._bound(states, gamma)), ~known

    def _bound(self, states: States, gamma: float) -> Tensor:
        """[M] targets of cut-off states at their least length: one token more than was seen."""
        return self._project_length(states.remaining.float() + 1, gamma)

    def _project(self, logit: Tensor, gamma: float) -> Tensor:
        """Logit -> the target's units."""
        if self.target == "discounted_return":
            return returns.logit_to_value(logit)
        if self.target == "log_length":
            # log softplus(z), which tends to z
            small = logit < -15
            log = F.softplus(logit.masked_fill(small, 0.0)).log()
            return torch.where(small, logit, log) - math.log(returns.log_discount(gamma))
        return returns.logit_to_length(logit, gamma) / self._scale

    def _project_length(self, remaining: Tensor, gamma: float) -> Tensor:
        """Length -> the target's units."""
        if self.target == "discounted_return":
            return returns.length_to_value(remaining, gamma)
        if self.target == "log_length":
            return remaining.clamp(min=1).log()
        return remaining / self._scale

    @property
    def _scale(self) -> float:
        return self.length_scale if self.target == "normalized_length" else 1.0


def packed_lambda_returns(values: Tensor, states: States, gamma: float, lambda_: float) -> Tensor:
    """TD(lambda) targets of all states of packed completions: [M] fp32.

    values: [M] V(s_0) .. V(s_L). The terminal value of a complete one is 0; that of a cut-off one
    is the model's own, on which it bootstraps.
    """
    if not 0.0 <= lambda_ <= 1.0:
        raise InputError(f"lambda is {lambda_!r}; it must lie between 0 and 1")
    is_last = states.steps == states.lengths[states.completion]
    values = values.double().masked_fill(is_last & states.is_known, 0.0)
    cost = math.expm1(-returns.log_discount(gamma))
    following = F.pad(values[1:], (0, 1))
    deltas = (cost + gamma * following - values).masked_fill(is_last, 0.0)
    sums = packed_suffix_sums(deltas, states.completion, gamma * lambda_, states.longest + 1)
    return (values + sums).float()


def packed_suffix_sums(x: Tensor, segment: Tensor, decay: float, longest: int) -> Tensor:
    """y_t = x_t + decay y_{t+1} inside each segment, by doubling. x, segment: [M] -> [M].

    longest: the most members of a segment.
    """
    y, step = x.clone(), 1
    while step < longest:
        inside = segment[:-step] == segment[step:]
        y[:-step] = y[:-step] + torch.where(inside, decay**step * y[step:].clone(), 0.0)
        step *= 2
    return y


def distribution_terms(
    head: DistributionHead, raw: Tensor, states: States, smoothing: float
) -> Tensor:
    """[M] negative log-likelihood of each state's length, or of its being longer than was seen.

    raw: [M, K] bin logits. With `smoothing` e the true bin counts 1 - e, its neighbours e/2 each.
    """
    bins = head.bins.on(raw.device)
    log_probs = raw.float().log_softmax(-1)
    remaining = states.remaining
    index = bins.index(remaining)
    exact = -log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    if smoothing:
        for step in (-1, 1):
            beside = (index + step).clamp(0, len(bins) - 1)
            gathered = -log_probs.gather(-1, beside.unsqueeze(-1)).squeeze(-1)
            exact = exact + smoothing / 2 * (gathered + log_probs_of(log_probs, index))
    if not states.any_cut:
        return exact
    known = states.is_known
    cut = log_tail(log_probs, remaining, head)
    return torch.where(known, exact, -cut)


def log_probs_of(log_probs: Tensor, index: Tensor) -> Tensor:
    """log_probs [M, K] at index [M]."""
    return log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def log_tail(log_probs: Tensor, seen: Tensor, head: DistributionHead) -> Tensor:
    """log P(remaining > seen): [M]; of loops, P of their bin. log_probs: [M, K]; seen: [M]."""
    bins = head.bins.on(log_probs.device)
    least = (seen + 1).clamp(max=min(bins.longest + 1, MAX_REMAINING))
    index = bins.index(least)
    # the bins beyond, and the part of the bin of `least` that lies at or above it
    beyond = log_probs.flip(-1).logcumsumexp(-1).flip(-1)
    beyond = F.pad(beyond[:, 1:], (0, 1), value=-math.inf)
    share = ((bins.upper[index] - least + 1).float() / bins.width[index]).log()
    own = log_probs_of(log_probs, index) + share
    return torch.logaddexp(log_probs_of(beyond, index), own)
