"""The fused kernels of the distribution head against plain torch: on a GPU, and on the CPU through
Triton's interpreter."""

import importlib.util
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreter import interpret
from lenvm.model.head import DistributionBelief, LengthBins, Peak

BINS, ENDLESS = LengthBins(), LengthBins(loops=True)


def ask(belief: DistributionBelief, fused: Any = None) -> list[Tensor]:
    """Values, quantiles and intervals of a belief over [R, C], by `belief_kernels` or by torch."""
    rows, width = belief.logits.shape[:2]
    low = torch.tensor([-3.0, 0.0, 17.4, -torch.inf])[:rows, None]
    high = torch.tensor([40.0, torch.inf, 18.0, 90_000.0])[:rows, None]
    slopes = ([0.3, 2.0, 0.0, 0.001], [0.1, 0.0, 0.0, 1e-5])
    centre = torch.tensor([20.0, 1.0, 18.0, 5000.0])[:rows, None]
    peak = Peak(centre, *(torch.tensor(s)[:rows, None] for s in slopes))
    wide = (low.expand(rows, width), high.expand(rows, width))
    intervals = ((low, high, None), (low, high, peak), (*wide, None), (*wide, peak))
    if fused is None:
        found = [belief.value(gamma) for gamma in (0.997, 0.9)]
        found += [belief.quantile(q) for q in (0.1, 0.5, 0.9)]
        return found + [belief.log_interval(*interval) for interval in intervals]
    logits, bins, terminal = belief.logits, belief.bins, belief.is_terminal
    found = [fused.expect(logits, bins.values(gamma), terminal) for gamma in (0.997, 0.9)]
    tables = (bins.lower, bins.width)
    found += [
        fused.quantile(logits, *tables, q, terminal, bins.num_lengths) for q in (0.1, 0.5, 0.9)
    ]
    for low, high, peak in intervals:
        numbers = (low, high) if peak is None else (low, high, peak.centre, peak.below, peak.above)
        low, high, *rest = (x.to(logits.device) for x in numbers)
        numbers = [low, high.clamp(max=bins.longest) if bins.loops else high, *rest]
        found.append(
            fused.log_interval(logits, bins.lower, bins.upper, bins.width, numbers, terminal)
        )
    return found


def compare(device: str) -> None:
    from lenvm.model import belief_kernels

    generator = torch.Generator().manual_seed(0)
    sizes = ((1.0, 3, 5), (30.0, 2, 4), (3000.0, 4, 1))
    for (spread, rows, width), bins in itertools.product(sizes, (BINS, ENDLESS)):
        logits = spread * torch.randn(rows, width, len(bins), generator=generator)
        logits[torch.rand(logits.shape, generator=generator) < 0.2] = -torch.inf
        ended = torch.rand(rows, width, generator=generator) < 0.3
        for terminal in (None, ended):
            expected = ask(DistributionBelief(logits, 0.997, bins, terminal))
            there = None if terminal is None else terminal.to(device)
            belief = DistributionBelief(logits.to(device), 0.997, bins, there)
            found = [x.cpu() for x in ask(belief, belief_kernels)]
            # a quantile inside a bin is rounded up to whole tokens: a rounding may cost one
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                absolute = 1e-6 if i < 2 else 1.0 if i < 5 else 2e-4
                torch.testing.assert_close(a, b, rtol=2e-5, atol=absolute)
    print("compared")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    compare("cuda")
    logits = torch.randn(4, 3, len(BINS), device="cuda")
    belief = DistributionBelief(logits, 0.997, BINS)
    torch.testing.assert_close(
        belief.value().cpu(), DistributionBelief(logits.cpu(), 0.997, BINS).value()
    )
    assert "log_probs" not in vars(belief)  # one kernel answered: nothing was materialised


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_under_the_interpreter():
    interpret("from model.test_belief_kernels import compare; compare('cpu')")
