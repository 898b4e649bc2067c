"""The GPU runner's kernels, plans and bookkeeping on the CPU, through Triton's interpreter.

Graphs, 16-bit types (the interpreter's dot is wrong in bf16) and timing are the GPU's to test:
`test_ragged_gpu.py`.
"""

import importlib.util

import pytest

from interpreter import interpret

SCRIPT = """
import sys, torch
from types import SimpleNamespace
torch.set_num_threads(1)
from model.families import VOCAB, build
from model.ragged_machine import History, run_random_history
from lenvm.model.kernel_choices import PLAIN, AttentionChoice, Choices, Tile
family, fused, products = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
trims = products == "trimmed"
history = History(build(family), max_tokens=400, max_requests=3, max_candidates=24 if trims else 5,
                  kernels="triton", page_size=16)
history.decoder._chunk = 40
runner = history.decoder._runner
if products != "plain":  # every product fused, splits merged by the last to arrive
    choices = Choices(
        qkv=Tile(16, 16, 32), out=Tile(16, 32, 32, splits=2), gate_up=Tile(16, 32, 32),
        down=Tile(16, 64, 32, splits=2), attention=AttentionChoice(block=32, waves=8, merges=True),
        trims=trims,
    )
    assert runner._forward.can_run(choices, 32)
    runner.choose = lambda _, trim: choices if trim == trims else PLAIN
if trims:  # nobody counts: buckets have room for all slots
    peek, padding = runner.peek, []
    runner.hint = SimpleNamespace(trims=True, note=lambda share: None)

    def peek_uncounted(ids, candidates, _):
        out = peek(ids, candidates, None)
        padding.append(runner._last.num_tokens - int(runner._first[-1]))
        return out

    runner.peek = peek_uncounted
assert runner.is_fused == fused, "fused"
run_random_history(history, 1, 9, VOCAB)
assert all(bucket.trims == trims for bucket in runner._steps)
assert not trims or max(padding) > 16, "no tile was left out"
runner._steps.clear()
history.decoder.warm_up(2, 3)
assert runner.num_graphs == 1 + trims
print("compared", history.num_compared)
"""
KERNELS = """
import torch
from lenvm.model.kernel_choices import Tile
from lenvm.model.kernels import add_norm
from lenvm.model.products import Rows, gate_and_up, project_out, project_qkv

N, H, I, HQ, HKV, D, BM = 40, 64, 96, 4, 2, 16, 16
torch.manual_seed(0)
eps, count = 1e-6, torch.zeros(64, dtype=torch.int32)
rows, squares = torch.randn(N, H), torch.rand(2, N) * H
inner, attended, turns = torch.randn(N, I), torch.randn(N, H), torch.randn(2, N, D)
w_qkv, bias = torch.randn((HQ + 2 * HKV) * D, H), torch.randn((HQ + 2 * HKV) * D)
w_up, w_down, norm = torch.randn(2 * I, H), torch.randn(H, I), torch.randn(H)


def run(total):
    # outputs [N, ...] of every kernel, 7 where nothing was stored; padding is poisoned
    end = N if total is None else int(total)
    x, inside = rows.clone(), inner.clone()
    x[end:] = inside[end:] = torch.nan
    options = {"pdl": False, "total": total}
    q, k, v = (torch.full((N, n, D), 7.0) for n in (HQ, HKV, HKV))
    project_qkv(Rows(x, squares), w_qkv, bias, *turns, eps, q, k, v, torch.arange(N),
                tile=Tile(BM, D, 32), **options)
    up = torch.full((N, I), 7.0)
    gate_and_up(Rows(x, squares), w_up, eps, up, tile=Tile(BM, 32, 32), **options)
    outs = [q, k, v, up]
    for splits in (1, 2):
        out = Rows(torch.full((N, H), 7.0), torch.full((2, N), 7.0))
        residual = attended.clone()
        project_out(inside, w_down, residual, norm, out, count,
                    tile=Tile(BM, 32, 32, splits), **options)
        assert not count.any()
        outs += [out.x, out.squares.T, torch.where(residual == attended, 7.0, residual)]
    normed = torch.full((N, H), 7.0)
    add_norm(None, x, norm, eps, normed, **options)
    return outs, normed


whole, whole_norm = run(None)
for total in (0, 1, 5, 16, 20, 32, 33, 40):
    outs, normed = run(torch.tensor([total], dtype=torch.int32))
    ends = -(-total // BM) * BM
    for out, truth in zip(outs, whole, strict=True):
        assert torch.equal(out[:total], truth[:total]), total
        assert torch.all(out[ends:] == 7), total
    assert torch.equal(normed[:total], whole_norm[:total])
    assert torch.all(normed[total:] == 7)
print("compared")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("family", "fused", "products"),
    [
        ("qwen3", True, "plain"),
        ("mistral", True, "plain"),
        ("gemma3", False, "plain"),
        ("qwen2", True, "fused"),
        ("mistral", True, "fused"),
        ("qwen2", True, "trimmed"),
        ("mistral", True, "trimmed"),
    ],
)
def test_a_random_history_under_the_interpreter(family, fused, products):
    interpret(SCRIPT, family, str(fused), products)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_end_where_the_packed_candidates_do():
    interpret(KERNELS)
