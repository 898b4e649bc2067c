"""Value heads: hidden states -> raw outputs -> a LengthBelief that guidance and evaluation read.

Two heads share one seam. A head maps hidden states [..., H] to raw fp32 outputs [..., D]; `belief`
turns raw outputs into a `LengthBelief`. Scorers, engines and rules move raw outputs about and never
ask which head made them.

* `ValueHead`, the paper's: D = 1, the logit z of u = -V at the checkpoint's gamma.
* `DistributionHead`: D = number of bins, the logits of P(remaining = n) over bins of lengths.

Parameter names are those of the published system: `fc` is the hidden layer, `summary` the output.
Both run in fp32 whatever the backbone's type (paper, App. D); a RaggedDecoder lets the products of
that be TF32's on a GPU, where the backbone is in 16 bits.
"""

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenvm import returns
from lenvm.errors import InputError
from lenvm.model.device import has_triton

HeadName = Literal["scalar", "distribution"]
MAX_REMAINING = 131_072
MAX_KEPT_GAMMAS = 64


@dataclass(frozen=True)
class Peak:
    """Weights of the lengths n of an interval: exp(-below (centre - n)) short of the centre,
    exp(-above (n - centre)) past it. fp32, centre in whole tokens, slopes >= 0 per token."""

    centre: Tensor
    below: Tensor
    above: Tensor


class LengthBelief(Protocol):
    """What a head believes about the tokens still to come, for a batch of states of shape [...]."""

    @property
    def has_distribution(self) -> bool:
        """True when `log_interval`, `quantile` and any gamma are available."""
        ...

    def value(self, gamma: float | None = None) -> Tensor:
        """E[V] in (-1, 0]: [...] fp32. gamma None = the checkpoint's."""
        ...

    def length(self) -> Tensor:
        """Point prediction of the remaining tokens: [...] fp32, >= 0."""
        ...

    def quantile(self, q: float) -> Tensor:
        """Least n with P(remaining <= n) >= q: [...] fp32."""
        ...

    def log_interval(self, low: Tensor, high: Tensor, peak: "Peak | None" = None) -> Tensor:
        """log P(low <= remaining <= high), or log E[weight of it]; all broadcast to [...].

        Bounds are rounded to whole tokens, +-inf where open; -inf comes back where impossible.
        """
        ...

    def with_terminal(self, is_terminal: Tensor) -> "LengthBelief":
        """The same belief, but exactly 0 remaining where `is_terminal` [...] (EOS, stop tokens)."""
        ...

    @property
    def raw(self) -> Tensor:
        """The numbers it is made of: [...] or [..., D] fp32."""
        ...

    def with_raw(self, raw: Tensor) -> "LengthBelief":
        """The same kind of belief over other numbers, nothing terminal. While this one lives, so
        does every table that the other's answers read: they may be recorded in a CUDA graph."""
        ...


class ScalarBelief:
    """Belief of the scalar head: z [...] at one gamma."""

    has_distribution = False

    def __init__(self, logit: Tensor, gamma: float, is_terminal: Tensor | None = None) -> None:
        self.logit, self.gamma = logit.float(), gamma
        self.is_terminal = is_terminal

    def value(self, gamma: float | None = None) -> Tensor:
        if gamma is not None and gamma != self.gamma:
            raise InputError(
                f"this value model was trained at gamma {self.gamma}, asked for {gamma}; "
                "only the distribution head gives values for other gammas"
            )
        return self._mask(returns.logit_to_value(self.logit))

    def length(self) -> Tensor:
        return self._mask(returns.logit_to_length(self.logit, self.gamma))

    def quantile(self, q: float) -> Tensor:
        raise InputError("the scalar head knows no quantiles; train with head = 'distribution'")

    def log_interval(self, low: Tensor, high: Tensor, peak: Peak | None = None) -> Tensor:
        raise InputError(
            "the scalar head knows no interval probabilities, so rule 'conditional' needs a value "
            "model with head = 'distribution'; rules 'soft' and 'hard' work with this one"
        )

    def with_terminal(self, is_terminal: Tensor) -> "ScalarBelief":
        return ScalarBelief(self.logit, self.gamma, is_terminal)

    @property
    def raw(self) -> Tensor:
        return self.logit

    def with_raw(self, raw: Tensor) -> "ScalarBelief":
        return ScalarBelief(raw, self.gamma)

    def _mask(self, x: Tensor) -> Tensor:
        return x if self.is_terminal is None else x.masked_fill(self.is_terminal, 0.0)


class LengthBins:
    """Bins of remaining lengths 1 .. MAX_REMAINING: single tokens first, then geometric.

    `lower` and `upper` [K] are the first and last length of each bin (inclusive, int64). Inside a
    bin the probability is uniform. Longer lengths count as MAX_REMAINING, which closes the last.
    With `loops` the last bin is for answers that never end: it lies beyond the `longest` length, in
    no interval, and does not count in a mean.
    """

    def __init__(self, num_single: int = 32, growth: float = 1.07, loops: bool = False) -> None:
        if num_single < 1 or growth <= 1.0:
            raise InputError(
                f"bins need num_single >= 1 and growth > 1; got {num_single}, {growth}"
            )
        self.num_single, self.growth = num_single, growth
        edges = list(range(1, num_single + 1))
        while edges[-1] < MAX_REMAINING:
            edges.append(max(edges[-1] + 1, min(MAX_REMAINING, math.ceil(edges[-1] * growth))))
        self.lower = torch.tensor([1, *(e + 1 for e in edges[:-1])])
        self.upper = torch.tensor(edges)
        self.width = self.upper - self.lower + 1
        lower, upper = self.lower.double(), self.upper.double()
        self.middle = ((lower + upper) / 2).float()
        self.mean_log = ((torch.lgamma(upper + 1) - torch.lgamma(lower)) / self.width).float()
        """E[log length] in each bin."""
        self.loops = loops
        self.num_lengths = len(edges) - loops
        """Bins that are of lengths."""
        self.longest = edges[self.num_lengths - 1]
        self._on: dict[torch.device, LengthBins] = {}
        self._values: dict[float, Tensor] = {}

    def __len__(self) -> int:
        return len(self.upper)

    def on(self, device: torch.device) -> "LengthBins":
        """The same bins with their tables on `device`, copied there once: a copy at every step
        would wait for the device and could not be captured in a CUDA graph."""
        if device == self.upper.device:
            return self
        if device not in self._on:
            bins = copy.copy(self)
            bins._values = {}
            with torch.inference_mode(False):  # what is kept must serve training too
                for name in ("lower", "upper", "width", "middle", "mean_log"):
                    setattr(bins, name, getattr(self, name).to(device))
            self._on[device] = bins
        return self._on[device]

    def values(self, gamma: float) -> Tensor:
        """E[V | bin] = mean over the bin's lengths of -(1 - gamma^n), exact: [K] fp32, kept."""
        if gamma not in self._values:
            if len(self._values) >= MAX_KEPT_GAMMAS:  # requests name them
                self._values.clear()
            with torch.inference_mode(False):
                self._values[gamma] = self._compute_values(returns.log_discount(gamma))
        return self._values[gamma]

    def _compute_values(self, rate: float) -> Tensor:
        lower, width = self.lower.double(), self.width.double()
        # mean of gamma^n over a bin = gamma^lower (1 - gamma^width) / (width (1 - gamma))
        mean = torch.exp(-rate * lower) * torch.expm1(-rate * width) / (width * math.expm1(-rate))
        return (mean - 1.0).float()

    def index(self, remaining: Tensor) -> Tensor:
        """Bin of each length (any shape, clamped to 1 .. MAX_REMAINING), int64."""
        return torch.searchsorted(
            self.on(remaining.device).upper, remaining.clamp(1, MAX_REMAINING)
        )


class DistributionBelief:
    """Belief of the distribution head: bin logits [..., K] over `LengthBins`.

    On a GPU each question is one kernel over the logits (`belief_kernels`): in a decoding step the
    launches of the plain code below would cost more than the head.
    """

    has_distribution = True

    def __init__(
        self, logits: Tensor, gamma: float, bins: LengthBins, is_terminal: Tensor | None = None
    ) -> None:
        self.logits = logits.float()
        self.gamma, self.bins, self.is_terminal = gamma, bins.on(logits.device), is_terminal
        self._median: Tensor | None = None
        self._tables: dict[float, Tensor] = {}

    @functools.cached_property
    def log_probs(self) -> Tensor:
        """log P(bin): [..., K] fp32."""
        return self.logits.log_softmax(-1)

    def value(self, gamma: float | None = None) -> Tensor:
        gamma = gamma or self.gamma
        if gamma not in self._tables:
            self._tables[gamma] = self.bins.values(gamma)
        table = self._tables[gamma]
        if kernels := _kernels(self.logits):
            value: Tensor = kernels.expect(self.logits, table, self.is_terminal)
            return value
        return self._mask(self._expect(table).clamp(max=0.0))

    def length(self) -> Tensor:
        """The median of what ends: robust, and what a user means by "about n more tokens"."""
        if self._median is None:
            self._median = self.quantile(0.5)
        return self._median

    def mean(self) -> Tensor:
        """E[remaining], exact given the bins: no Jensen bias. Of what ends, where some do not."""
        return self._mask(self._expect_length(self.bins.middle))

    def geometric_mean(self) -> Tensor:
        """exp(E[log remaining]), exact given the bins, of what ends: least wrong in proportion,
        where a small chance of a very long answer draws the mean away."""
        return self._mask(self._expect_length(self.bins.mean_log).exp())

    def quantile(self, q: float) -> Tensor:
        """Of what ends, where some do not."""
        if not 0.0 < q < 1.0:
            raise InputError(f"a quantile lies strictly between 0 and 1; got {q!r}")
        if kernels := _kernels(self.logits):
            found: Tensor = kernels.quantile(
                self.logits,
                self.bins.lower,
                self.bins.width,
                q,
                self.is_terminal,
                self.bins.num_lengths,
            )
            return found
        probs = self.logits[..., : self.bins.num_lengths].softmax(-1)
        cdf = probs.cumsum(-1)
        index = (cdf < q).sum(-1, keepdim=True).clamp(max=self.bins.num_lengths - 1)
        before = cdf.gather(-1, index) - probs.gather(-1, index)
        inside = ((q - before) / probs.gather(-1, index).clamp(min=1e-30)).clamp(0.0, 1.0)
        width, lower = self.bins.width[index], self.bins.lower[index]
        tokens = lower + (inside * width).ceil().clamp(min=1).to(torch.int64) - 1
        return self._mask(tokens.squeeze(-1).float())

    def log_interval(self, low: Tensor, high: Tensor, peak: Peak | None = None) -> Tensor:
        shape, device = self.logits.shape[:-1], self.logits.device
        given = (low, high) if peak is None else (low, high, peak.centre, peak.below, peak.above)
        numbers = [x.to(device, torch.float32) for x in given]
        if self.bins.loops:
            numbers[1] = numbers[1].clamp(max=self.bins.longest)
        if kernels := _kernels(self.logits):
            bins = self.bins
            found: Tensor = kernels.log_interval(
                self.logits, bins.lower, bins.upper, bins.width, numbers, self.is_terminal
            )
            return found
        low, high, *shaped = (x.unsqueeze(-1) for x in numbers)
        low, high = (low + 0.5).floor(), (high + 0.5).floor()
        first, last = torch.maximum(self.bins.lower, low), torch.minimum(self.bins.upper, high)
        share = _log_weight(first, last, *shaped) - self.bins.width.log()
        inside = torch.logsumexp(self.log_probs + share, -1)
        # torch.logsumexp of a row of -inf is -inf, as wanted
        if self.is_terminal is not None:
            at_zero = torch.zeros_like(low)
            ended = _log_weight(torch.maximum(at_zero, low), torch.minimum(at_zero, high), *shaped)
            inside = torch.where(self.is_terminal, ended.squeeze(-1).expand(shape), inside)
        return inside

    def with_terminal(self, is_terminal: Tensor) -> "DistributionBelief":
        belief = DistributionBelief(self.logits, self.gamma, self.bins, is_terminal)
        belief._tables = self._tables
        return belief

    @property
    def raw(self) -> Tensor:
        return self.logits

    def with_raw(self, raw: Tensor) -> "DistributionBelief":
        belief = DistributionBelief(raw, self.gamma, self.bins)
        belief._tables = self._tables
        return belief

    def _expect(self, table_K: Tensor) -> Tensor:
        """E[table]. Not a matmul, whose rounding of a row changes with the rows beside it."""
        return (self.log_probs.exp() * table_K).sum(-1)

    def _expect_length(self, table_K: Tensor) -> Tensor:
        """E[table | it ends]."""
        count = self.bins.num_lengths
        return (self.logits[..., :count].softmax(-1) * table_K[:count]).sum(-1)

    def _mask(self, x: Tensor) -> Tensor:
        return x if self.is_terminal is None else x.masked_fill(self.is_terminal, 0.0)


def _log_weight(
    first: Tensor,
    last: Tensor,
    centre: Tensor | None = None,
    below: Tensor | None = None,
    above: Tensor | None = None,
) -> Tensor:
    """log of the sum of a `Peak`'s weights over the lengths first .. last (of 1 each without one),
    in closed form; -inf where there are none."""
    if centre is None or below is None or above is None:
        return (last - first + 1).clamp(min=0).log()
    nearest, next_above = torch.minimum(last, centre), torch.maximum(first, centre + 1)
    short = _log_geometric(nearest - first + 1, below) - below * (centre - nearest)
    past = _log_geometric(last - next_above + 1, above) - above * (next_above - centre)
    return torch.logaddexp(short, past)


def _log_geometric(count: Tensor, slope: Tensor) -> Tensor:
    """log(1 + e^-slope + ... + e^-(count - 1) slope), stable for any slope >= 0."""
    count = count.clamp(min=0)
    flat = slope <= 0
    rate = slope.masked_fill(flat, 1.0)
    ratio = torch.expm1(-rate * count) / torch.expm1(-rate)
    return torch.where(flat, count, ratio).log()


def _kernels(logits: Tensor) -> Any:
    """The fused kernels where they apply: on a GPU, outside of training."""
    if not logits.is_cuda or logits.requires_grad or not logits.numel() or not has_triton():
        return None
    from lenvm.model import belief_kernels

    return belief_kernels


class ValueHead(nn.Module):
    """The paper's head: z = W2 SiLU(W1 h + b1) + b2. hidden [..., H] -> z [..., 1] fp32."""

    name: HeadName = "scalar"
    num_outputs = 1

    def __init__(self, hidden_size: int, num_outputs: int = 1) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.fc = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.summary = nn.Linear(hidden_size, num_outputs, dtype=torch.float32)
        nn.init.normal_(self.summary.weight, std=0.02)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            # DeepSpeed hands out bf16 copies of the weights; the sums are fp32 all the same
            w1, b1, w2, b2 = (
                p.float() for layer in (self.fc, self.summary) for p in (layer.weight, layer.bias)
            )
            return F.linear(F.silu(F.linear(hidden.float(), w1, b1)), w2, b2)

    def belief(self, raw: Tensor, gamma: float) -> LengthBelief:
        """raw [..., 1] -> belief over [...]."""
        return ScalarBelief(raw.squeeze(-1), gamma)


class DistributionHead(ValueHead):
    """Softmax over `LengthBins`: hidden [..., H] -> bin logits [..., K] fp32."""

    name: HeadName = "distribution"

    def __init__(self, hidden_size: int, bins: LengthBins | None = None) -> None:
        self_bins = bins or LengthBins()
        super().__init__(hidden_size, len(self_bins))
        self.bins = self_bins
        with torch.no_grad():  # start from mass spread evenly over the logarithm of the length
            self.summary.bias.copy_((self.bins.upper / (self.bins.lower - 0.5)).log().log())

    def belief(self, raw: Tensor, gamma: float) -> LengthBelief:
        """raw [..., K] -> belief over [...]."""
        return DistributionBelief(raw, gamma, self.bins)


def build_head(name: HeadName, hidden_size: int, bins: LengthBins | None = None) -> ValueHead:
    """The head of that name; InputError for another."""
    if name == "scalar":
        return ValueHead(hidden_size)
    if name == "distribution":
        return DistributionHead(hidden_size, bins)
    raise InputError(f"head is {name!r}; allowed: 'scalar', 'distribution'")
