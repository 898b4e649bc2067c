"""The fused search against `candidates.search`: on a GPU, and on the CPU through Triton's
interpreter. What depends on no kernel (who searches, what a session makes of it) runs anywhere."""

import importlib.util
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreter import interpret
from lenvm.guidance.candidates import Truncation, search, truncate
from lenvm.guidance.params import RuleParams
from lenvm.guidance.scoring import search_fused

WIDTHS = (700, 4096, 9000)
"""Of a vocabulary: part of a block at its end; exactly one part of a row; several parts."""
KS = (1, 4, 15, 16)
TEMPERATURES = (0.0, 1e-6, 0.7, 2.0)


def build(width: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Truncation, Tensor]:
    """Logits [R, V], one row a case, their truncation, and [3, R] the ending's limits and place."""
    generator = torch.Generator().manual_seed(seed)
    rows = 12
    # rows of a wider tensor, as where an engine pads its vocabulary
    wide = 4 * torch.randn(rows, width + 17, generator=generator)
    wide[:, width:] = 99.0
    wide = wide.to(dtype)
    logits = wide[:, :width]
    endings = torch.full((rows, 3), -1)
    endings[:, 0] = 5
    endings[1::2, 1:] = torch.tensor([width - 1, 300])
    endings[7] = -1  # a row without any
    logits[:, 5] += 12  # mostly the likeliest
    logits[0, 3] = -torch.inf
    logits[2] = -torch.inf
    logits[2, width // 2] = -3.0  # one possible token
    logits[3] = -torch.inf
    logits[4] = 0.25  # all alike
    logits[5, ::2] = logits[5, 1]  # many ties
    logits[6] -= 50.0  # and the likeliest are 0 and -0
    logits[6, 40:60] = 0.0
    logits[6, 45] = -0.0
    logits[8] = -torch.inf
    logits[8, 5] = 1.0  # only its ending is possible
    logits[10, 100:130] = 40.0 + torch.arange(30, dtype=dtype) / 4  # over two blocks
    logits[11, 5] = -torch.inf  # nothing to end with but the others
    settings = Truncation(
        temperature=torch.tensor(TEMPERATURES).repeat(3)[torch.randperm(rows, generator=generator)],
        top_k=torch.full((rows,), k),
        top_p=torch.ones(rows),
        min_p=torch.zeros(rows),
        ending_ids=endings,
        max_candidates=k,
    )
    limits = torch.randint(0, 3, (2, rows), generator=generator)
    may_from, must_from = limits[0] * 10.0, limits[1] * 10.0
    must_from[:4] = torch.inf
    may_from[9] = -torch.inf
    done = torch.full((rows,), 9)  # the next one is the tenth
    return logits, settings, torch.stack([may_from, must_from, done.float()])


def compare(device: str) -> None:
    from lenvm.guidance import search_kernels

    count = 0
    for seed, width in enumerate(WIDTHS):
        for k in KS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                logits, settings, (may_from, must_from, done) = build(
                    width, k, dtype, 17 * seed + k
                )
                assert search_kernels.can_search(logits, settings)
                may, must = done + 1 >= may_from, done + 1 >= must_from
                assert len({*zip(may.tolist(), must.tolist(), strict=True)}) > 1
                expected = search(logits, settings, may_end_R=may, must_end_R=must)
                before, limits = logits.clone(), (done.long(), may_from, must_from)
                found = search_on(device, logits, settings, limits)
                assert torch.equal(logits, before), "the logits changed"
                check(logits, settings, found, expected, may, must)
                count += len(logits)
    print("compared", count)


def search_on(
    device: str, logits: Tensor, settings: Truncation, limits: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The kernels' answer, over rows of the same stride on the device."""
    from lenvm.guidance import search_kernels

    moved = {n: x.to(device) for n, x in vars(settings).items() if isinstance(x, Tensor)}
    base = logits if logits._base is None else logits._base
    there = base.to(device)[:, : logits.shape[1]]
    assert there.stride() == logits.stride()
    limits = tuple(x.to(device) for x in limits)
    found = search_kernels.search(there, replace(settings, **moved), *limits)
    return tuple(x.cpu() for x in found)


def check(logits, settings, found, expected, may, must) -> None:
    (top, ids), (true_top, true_ids) = found, expected
    rows, width = logits.shape
    assert top.shape == ids.shape == true_ids.shape
    assert top.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < width
    lost, truly_lost = (x.nan_to_num(nan=-torch.inf) for x in (top, true_top))
    torch.testing.assert_close(lost, truly_lost, rtol=1e-5, atol=1e-5)
    one, other = truncate(top, ids, settings), truncate(true_top, true_ids, settings)
    torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-5, atol=2e-5)
    assert torch.equal(one.mask, other.mask)
    for row in range(rows):
        kept = one.ids[row][one.mask[row]].tolist()
        assert len(set(kept)) == len(kept)
        if len(kept) > 1 or top[row, 0] > -1e20:
            # ids may differ only where logits are equal
            own = logits[row, kept].tolist()
            assert own == logits[row, other.ids[row][other.mask[row]]].tolist()
            assert own == sorted(own, reverse=True)
            signs = logits[row].signbit().tolist()
            assert kept == sorted(kept, key=lambda t: (-logits[row, t].item(), signs[t], t))
            if not may[row] and not must[row] and settings.ending_ids[row, 0] >= 0:
                is_only = logits[row].isfinite().sum() == 1
                assert is_only or not one.is_ending[row].any()


def compare_rows_of_no_number(device: str) -> None:
    """A NaN or an infinity: no log-probabilities, but a token of the vocabulary; other rows are as
    if it were not there. Many ending tokens, and one twice."""
    logits, settings, _ = build(9000, 4, torch.float32, 0)
    alone = search(logits, settings, may_end_R=torch.ones(12) > 0, must_end_R=torch.zeros(12) > 0)
    logits[0, 77], logits[1, 8000], logits[2, 100:400], logits[3] = (
        *(torch.nan, torch.inf),
        *(torch.nan, -torch.nan),
    )
    never = torch.full((12,), torch.inf)
    top, ids = search_on(device, logits, settings, (torch.zeros(12).long(), -never, never))
    assert not top[:4].isfinite().any()
    assert (truncate(top, ids, settings).log_probs[:4, 0] == 0).all()
    assert ((ids >= 0) & (ids < 9000)).all()
    torch.testing.assert_close(top[4:], alone[0][4:], rtol=1e-5, atol=1e-5)

    settings.ending_ids = torch.arange(40).repeat(12, 1)
    settings.ending_ids[:, 7] = settings.ending_ids[:, 5]
    settings.ending_ids[1, 4:] = -1
    logits[0, 77], logits[1, 8000], logits[3, 2] = 0.0, 0.0, torch.nan
    for may_from, must_from in ((-never, -never), (never, never)):
        limits = (torch.zeros(12).long(), may_from, must_from)
        top, ids = search_on(device, logits, settings, limits)
        must = must_from < 0
        expected = search(logits, settings, may_end_R=must, must_end_R=must)
        one, other = truncate(top, ids, settings), truncate(*expected, settings)
        known = torch.arange(12) != 3
        likeliest = top[known, 0].nan_to_num(), expected[0][known, 0].nan_to_num()
        torch.testing.assert_close(*likeliest, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(
            one.log_probs[known], other.log_probs[known], rtol=1e-5, atol=2e-5
        )
        assert (one.log_probs[3, 0] == 0).all()


def compare_sessions() -> None:
    """A session's life with the kernels equals one without."""
    from guidance.test_graphs import live_searched
    from lenvm.guidance import search_kernels

    def search_fused(logits: Tensor, truncation: Truncation, params: RuleParams):
        assert search_kernels.can_search(logits, truncation)
        ends = params.may_end_from, params.must_end_from
        return search_kernels.search(logits, truncation, params.num_generated, *ends)

    for seed in range(2):
        live_searched(search_fused, seed, mixed=seed > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    compare("cuda")
    compare_rows_of_no_number("cuda")
    logits = torch.randn(3, 151_936, device="cuda")
    settings, (may_from, must_from, done) = one_ending(3, "cuda"), torch.zeros(3, 3, device="cuda")
    params = Limits(done.long(), may_from, must_from + torch.inf)
    assert search_fused(logits.t().contiguous().t(), settings, params) is None
    top, ids = search_fused(logits, settings, params)
    yes = torch.ones(3, dtype=torch.bool, device="cuda")
    expected = search(logits, settings, may_end_R=yes, must_end_R=~yes)
    torch.testing.assert_close(top, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, expected[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        search_fused(logits, settings, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass
class Limits:
    """What the search reads of `RuleParams`."""

    num_generated: Tensor
    may_end_from: Tensor
    must_end_from: Tensor


def one_ending(rows: int, device: str = "cpu", **changed: Any) -> Truncation:
    ones = torch.ones(rows, device=device)
    settings = Truncation(
        temperature=ones,
        top_k=15 * ones.long(),
        top_p=ones,
        min_p=0 * ones,
        ending_ids=ones.long().unsqueeze(1),
        max_candidates=15,
    )
    return replace(settings, **changed)


def test_on_a_cpu_plain_code_searches():
    assert search_fused(torch.randn(2, 500), one_ending(2), Limits(*torch.zeros(3, 2))) is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_what_the_kernels_take():
    from lenvm.guidance.search_kernels import can_search

    logits, settings = torch.randn(2, 500), one_ending(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert can_search(logits.to(dtype)[:, 7:300], settings)
    assert can_search(logits, one_ending(2, max_candidates=64))
    assert can_search(logits[:, :60], one_ending(2, max_candidates=256))  # there are no more
    assert not can_search(logits, one_ending(2, max_candidates=65))
    assert not can_search(logits, one_ending(2, ending_ids=torch.ones(2, 65).long()))
    assert not can_search(logits.double(), settings)
    assert not can_search(logits[:, ::2], settings)
    assert not can_search(logits[:0], settings)
    assert not can_search(torch.empty(1, 128 * 4096 + 1), settings)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    "call",
    [
        pytest.param("compare('cpu')", marks=pytest.mark.slow),
        "compare_rows_of_no_number('cpu')",
        "compare_sessions()",
        "from lenvm.guidance.search_kernels import try_out; try_out('cpu')",
    ],
)
def test_under_the_interpreter(call: str):
    interpret(f"from guidance.test_search_kernels import *; {call}; print('compared')")


def test_kernels_that_fail_are_left_out_with_a_warning(monkeypatch, caplog):
    from types import SimpleNamespace

    from lenvm.guidance import scoring

    def try_out() -> None:
        raise RuntimeError("ptxas is missing")

    kernels = SimpleNamespace(try_out=try_out)
    monkeypatch.setitem(sys.modules, "lenvm.guidance.search_kernels", kernels)
    monkeypatch.setattr("lenvm.guidance.search_kernels", kernels, raising=False)
    monkeypatch.setattr(scoring, "has_triton", lambda: True)
    assert not scoring._can_fuse.__wrapped__()
    assert "ptxas is missing" in caplog.text
    monkeypatch.setattr(scoring, "has_triton", lambda: False)
    assert not scoring._can_fuse.__wrapped__()
