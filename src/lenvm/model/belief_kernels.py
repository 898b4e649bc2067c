"""Triton kernels of a `DistributionBelief`: one launch a question, pointers in, pointers out.

`head.py` holds the same arithmetic in plain torch, which says what each must give. A program reads
one state's bin logits once and keeps them in registers: no [.., K] tensor is written.

Shape legend: N states (the leading shape, flat), K bins.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,attr-defined"

from collections.abc import Sequence

import torch
from torch import Tensor

from lenvm.model.kernels import tl, triton  # the one file that imports Triton


@triton.jit
def _load(logits_ptr, state, K: tl.constexpr, BLOCK: tl.constexpr):
    """Probabilities of a state's bins, unnormalised: (exp(logit - max), max); 0 beyond K."""
    bins = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + state.to(tl.int64) * K + bins, bins < K, other=-float("inf"))
    top = tl.max(logits, 0)
    return logits, top


@triton.jit
def _expect_kernel(
    logits_ptr, table_ptr, terminal_ptr, out_ptr,
    K: tl.constexpr, BLOCK: tl.constexpr, HAS_TERMINAL: tl.constexpr,
):  # fmt: skip
    state = tl.program_id(0)
    logits, top = _load(logits_ptr, state, K, BLOCK)
    bins = tl.arange(0, BLOCK)
    mass = tl.exp(logits - top)
    table = tl.load(table_ptr + bins, bins < K, other=0.0)
    mean = tl.minimum(tl.sum(mass * table, 0) / tl.sum(mass, 0), 0.0)
    if HAS_TERMINAL:
        mean = tl.where(tl.load(terminal_ptr + state) != 0, 0.0, mean)
    tl.store(out_ptr + state, mean)


@triton.jit
def _quantile_kernel(
    logits_ptr, lower_ptr, width_ptr, terminal_ptr, out_ptr, q,
    COUNT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, HAS_TERMINAL: tl.constexpr,
):  # fmt: skip
    state = tl.program_id(0)
    logits, top = _load(logits_ptr, state, K, BLOCK)
    bins = tl.arange(0, BLOCK)
    if COUNT < K:  # the last bin is of what never ends
        logits = tl.where(bins < COUNT, logits, -float("inf"))
        top = tl.max(logits, 0)
    mass = tl.exp(logits - top)
    probs = mass / tl.sum(mass, 0)
    cdf = tl.cumsum(probs, 0)
    index = tl.minimum(tl.sum(((cdf < q) & (bins < COUNT)).to(tl.int32), 0), COUNT - 1)
    own = tl.sum(tl.where(bins == index, probs, 0.0), 0)
    before = tl.sum(tl.where(bins == index, cdf, 0.0), 0) - own
    inside = tl.minimum(tl.maximum((q - before) / tl.maximum(own, 1e-30), 0.0), 1.0)
    width = tl.load(width_ptr + index).to(tl.float32)
    tokens = tl.load(lower_ptr + index).to(tl.float32) - 1
    tokens += tl.maximum(tl.ceil(inside * width), 1.0)
    if HAS_TERMINAL:
        tokens = tl.where(tl.load(terminal_ptr + state) != 0, 0.0, tokens)
    tl.store(out_ptr + state, tokens)


@triton.jit
def _geometric(count, slope):
    """1 + e^-slope + ... + e^-(count - 1) slope."""
    count = tl.maximum(count, 0.0)
    rate = tl.where(slope > 0, slope, 1.0)
    # 1 - e^-x, without cancellation: series where x is small
    one = tl.where(rate < 1e-2, rate * (1 - rate / 2 * (1 - rate / 3)), 1 - tl.exp(-rate))
    x = rate * count
    many = tl.where(x < 1e-2, x * (1 - x / 2 * (1 - x / 3)), 1 - tl.exp(-x))
    return tl.where(slope > 0, many / one, count)


@triton.jit
def _log_weight(first, last, centre, below, above, HAS_PEAK: tl.constexpr):
    if HAS_PEAK:
        nearest = tl.minimum(last, centre)
        next_above = tl.maximum(first, centre + 1)
        short = tl.log(_geometric(nearest - first + 1, below)) - below * (centre - nearest)
        past = tl.log(_geometric(last - next_above + 1, above)) - above * (next_above - centre)
        most = tl.maximum(short, past)
        sum_ = tl.exp(short - most) + tl.exp(past - most)
        weight = tl.where(most > -float("inf"), most + tl.log(sum_), -float("inf"))
    else:
        weight = tl.log(tl.maximum(last - first + 1, 0.0))
    return weight


@triton.jit(do_not_specialize=["group"])
def _log_interval_kernel(
    logits_ptr, lower_ptr, upper_ptr, width_ptr, terminal_ptr, out_ptr,
    low_ptr, high_ptr, centre_ptr, below_ptr, above_ptr, group,
    K: tl.constexpr, BLOCK: tl.constexpr, HAS_TERMINAL: tl.constexpr, HAS_PEAK: tl.constexpr,
):  # fmt: skip
    state = tl.program_id(0)
    logits, top = _load(logits_ptr, state, K, BLOCK)
    bins = tl.arange(0, BLOCK)
    log_total = top + tl.log(tl.sum(tl.exp(logits - top), 0))
    row = state // group
    low = tl.floor(tl.load(low_ptr + row) + 0.5)
    high = tl.floor(tl.load(high_ptr + row) + 0.5)
    centre, below, above = 0.0, 0.0, 0.0
    if HAS_PEAK:
        centre = tl.load(centre_ptr + row)
        below = tl.load(below_ptr + row)
        above = tl.load(above_ptr + row)
    lower = tl.load(lower_ptr + bins, bins < K, other=1).to(tl.float32)
    upper = tl.load(upper_ptr + bins, bins < K, other=0).to(tl.float32)
    width = tl.load(width_ptr + bins, bins < K, other=1).to(tl.float32)
    first, last = tl.maximum(lower, low), tl.minimum(upper, high)
    weight = _log_weight(first, last, centre, below, above, HAS_PEAK) - tl.log(width)
    terms = tl.where(bins < K, logits + weight, -float("inf"))
    most = tl.max(terms, 0)
    safe = tl.where(most > -float("inf"), most, 0.0)
    inside = most + tl.log(tl.maximum(tl.sum(tl.exp(terms - safe), 0), 1e-37)) - log_total
    if HAS_TERMINAL:
        first, last = tl.maximum(low, 0.0), tl.minimum(high, 0.0)
        ended = _log_weight(first, last, centre, below, above, HAS_PEAK)
        inside = tl.where(tl.load(terminal_ptr + state) != 0, ended, inside)
    tl.store(out_ptr + state, inside)


# -- from tensors ----------------------------------------------------------------------------------


def expect(logits: Tensor, table_K: Tensor, is_terminal: Tensor | None) -> Tensor:
    """min(E[table], 0), 0 where terminal: [...] fp32."""
    logits, terminal, out, options = _prepare(logits, is_terminal)
    _expect_kernel[(out.numel(),)](logits, table_K, terminal, out, **options)
    return out


def quantile(
    logits: Tensor,
    lower_K: Tensor,
    width_K: Tensor,
    q: float,
    is_terminal: Tensor | None,
    num_lengths: int,
) -> Tensor:
    """Least n with P(remaining <= n | one of the first num_lengths bins) >= q, 0 where terminal:
    [...] fp32."""
    logits, terminal, out, options = _prepare(logits, is_terminal)
    _quantile_kernel[(out.numel(),)](
        logits, lower_K, width_K, terminal, out, q, COUNT=num_lengths, **options
    )
    return out


def log_interval(
    logits: Tensor,
    lower_K: Tensor,
    upper_K: Tensor,
    width_K: Tensor,
    numbers: Sequence[Tensor],
    is_terminal: Tensor | None,
) -> Tensor:
    """`DistributionBelief.log_interval`: [...] fp32. numbers: low, high and, with a peak, centre,
    below, above; fp32, broadcast to [...]; one a row ([R, 1] under [R, C]) is read as it is."""
    logits, terminal, out, options = _prepare(logits, is_terminal)
    group = out.shape[-1] if out.dim() > 1 else 1
    if any(x.shape != (*out.shape[:-1], 1) for x in numbers):
        numbers, group = [x.expand(out.shape) for x in numbers], 1
    low, high, *peak = (x.contiguous() for x in numbers)
    centre, below, above = peak or (low, low, low)
    _log_interval_kernel[(out.numel(),)](
        logits, lower_K, upper_K, width_K, terminal, out,
        low, high, centre, below, above, group,
        HAS_PEAK=bool(peak), **options,
    )  # fmt: skip
    return out


def _prepare(
    logits: Tensor, is_terminal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, int | bool]]:
    num_bins = logits.shape[-1]
    logits = logits.contiguous()
    out = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    terminal = logits if is_terminal is None else is_terminal.expand(out.shape).contiguous()
    options = {
        "K": num_bins,
        "BLOCK": triton.next_power_of_2(num_bins),
        "HAS_TERMINAL": is_terminal is not None,
        "num_warps": 1,
    }
    return logits, terminal, out, options
