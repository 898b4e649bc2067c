"""The kernels of a value head against plain fp32: on a GPU, and on the CPU through Triton's
interpreter."""

import dataclasses
import importlib.util
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interpreter import interpret
from lenvm.model.head import DistributionHead, LengthBins, ValueHead
from lenvm.model.kernel_choices import Choices, Tile
from lenvm.model.ragged import RaggedDecoder
from model.families import FUSED, VOCAB, build

EPS = 1e-6
SMALL = Choices(
    qkv=Tile(16, 16, 32),
    out=Tile(16, 32, 32, splits=2),
    gate_up=Tile(16, 32, 32),
    down=Tile(16, 64, 32),
)
"""Every product fused, for the models of `build` under the interpreter."""


def build_heads(size: int, device: str) -> list[ValueHead]:
    torch.manual_seed(size)
    heads = [ValueHead(size), DistributionHead(size, LengthBins(20, 2.0))]
    for head in heads:
        nn.init.normal_(head.fc.bias)
        nn.init.normal_(head.summary.weight, std=0.5)
        nn.init.normal_(head.summary.bias)
    return [head.to(device) for head in heads]


def build_rows(num_tokens: int, size: int, dtype: torch.dtype, device: str) -> tuple[Any, Tensor]:
    """Rows still to be normalised, and what they are then, in fp32."""
    from lenvm.model.products import Rows

    residual, norm = 3 * torch.randn(num_tokens, size), torch.rand(size) + 0.5
    x = (residual * norm).to(dtype)
    parts = torch.stack([part.square().sum(1) for part in residual.chunk(3, 1)])
    scale = torch.rsqrt(parts.sum(0) / size + EPS)
    rows = Rows(x.to(device), parts.to(device))
    return rows, (x.float() * scale[:, None]).to(device)


def error(out: Tensor, truth: Tensor) -> float:
    return float((out - truth).norm() / truth.norm())


def error_of(head: ValueHead, out: Tensor, hidden: Tensor) -> float:
    """Against what the sums are of: a lone output may be next to nothing."""
    terms = nn.functional.silu(head.fc(hidden)).abs() @ head.summary.weight.abs().T
    return float((out - head(hidden)).norm() / terms.norm())


@torch.inference_mode()
def compare(device: str, tolerance: float) -> None:
    from lenvm.model.head_kernels import fuse_head

    cases = [(1, 64), (5, 80), (37, 176)]
    if device == "cuda":
        cases += [(512, 896), (4096, 896), (96, 576), (63, 1536)]
    for (num_tokens, size), dtype in zip(cases, [torch.bfloat16, torch.float16] * 4, strict=False):
        for head in build_heads(size, device):
            fused = fuse_head(head, dtype)
            assert fused is not None
            rows, normed = build_rows(num_tokens, size, dtype, device)
            out = fused.build(num_tokens)
            fused.write(rows, EPS, out)
            every = fused.read(out)
            assert error_of(head, every, normed) <= tolerance, (num_tokens, size, dtype)
            places = torch.tensor([[num_tokens, 0], [num_tokens - 1, num_tokens]], device=device)
            some = fused.read(out, places)
            right = torch.stack([0 * every[0], every[0], every[-1], 0 * every[0]])
            assert torch.equal(some, right.view_as(some))
            hidden = normed.to(dtype)
            found = fused(hidden)
            assert error_of(head, found, hidden.float()) <= tolerance, (num_tokens, size, dtype)
            assert fused(found.new_empty(0, size, dtype=dtype)).shape == (0, fused.num_outputs)
    print("compared")


@torch.inference_mode()
def compare_rows(device: str, num_tokens: int, size: int) -> None:
    """Scalar outputs repeat bit for bit, whatever and however many the other rows are."""
    from lenvm.model.head_kernels import fuse_head
    from lenvm.model.products import Rows

    fused = fuse_head(build_heads(size, device)[0], torch.bfloat16)
    assert fused is not None
    rows, _ = build_rows(num_tokens, size, torch.bfloat16, device)

    def run(x: Tensor, squares: Tensor, total: int | None = None) -> Tensor:
        out = fused.build(len(x))
        end = None if total is None else torch.tensor([total], dtype=torch.int32, device=device)
        fused.write(Rows(x, squares.contiguous()), EPS, out, total=end)
        return fused.read(out)

    whole = run(rows.x, rows.squares)
    assert torch.equal(run(rows.x, rows.squares), whole)
    for count in (1, 16, num_tokens - 1):
        assert torch.equal(run(rows.x[:count], rows.squares[:, :count]), whole[:count]), count
        poisoned = rows.x.clone()
        poisoned[count:] = torch.nan
        assert torch.equal(run(poisoned, rows.squares, count)[:count], whole[:count]), count
    assert torch.equal(run(rows.x.flip(0), rows.squares.flip(1)).flip(0), whole)
    print("compared")


def compare_decoders(family: str, device: str, dtype: torch.dtype, choices: Choices | None) -> None:
    """A decoder's outputs are the head's of its hidden states, whose norm is done or left over."""
    from lenvm.model.head_kernels import FusedHead

    model = build(family, dtype=dtype, hidden_size=128 if device == "cuda" else 64).to(device)
    size = model.config.hidden_size
    options = {"max_tokens": 200, "max_requests": 3, "max_candidates": 24}
    candidates = torch.randint(VOCAB, (2, 24), device=device)
    candidates[:, 1:20] = -1
    for head in build_heads(size, device):
        outs = []
        for given, kernels in ((head, "triton"), (None, "torch")):
            decoder = RaggedDecoder(model, head=given, kernels=kernels, page_size=16, **options)
            runner: Any = decoder._runner
            if kernels == "triton":
                assert isinstance(runner.head, FusedHead)
                if choices is not None:
                    assert runner._forward.can_run(choices, 48)
                    runner.choose = lambda *_: choices
            first = decoder.add({"a": [1, 2, 3] * 7, "b": [4]})
            peeked = [decoder.peek(["a", "b"], candidates) for _ in range(2)]
            assert torch.equal(*peeked)
            outs.append((first, peeked[0][candidates >= 0]))
            assert not peeked[0][candidates < 0].any()
            pages = weakref.ref(decoder._cache)
            del decoder, runner
            assert pages() is None, "its memory waits for the garbage collector"
        with torch.inference_mode():
            for found, hidden in zip(*outs, strict=True):
                assert error(found, head(hidden)) <= 4e-2
    print("compared")


def test_where_the_kernels_apply():
    pytest.importorskip("triton")
    from lenvm.model.head_kernels import fuse_head

    class Own(ValueHead):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + 1

    head = ValueHead(64)
    for dtype in (torch.bfloat16, torch.float16):
        fused = fuse_head(head, dtype)
        assert fused is not None
        assert fused._fc[0].data_ptr() == head.fc.weight.data_ptr(), "weights were copied"
    assert fuse_head(DistributionHead(64, LengthBins(20, 2.0)), torch.bfloat16) is not None
    assert fuse_head(head, torch.float32) is None
    others = None, nn.Identity(), Own(64), ValueHead(72), ValueHead(64).bfloat16()
    assert [fuse_head(other, torch.bfloat16) for other in others] == [None] * 5


TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@TRITON
def test_under_the_interpreter():
    interpret("from model.test_head_kernels import compare; compare('cpu', 1e-5)")


@TRITON
def test_rows_under_the_interpreter():
    interpret("from model.test_head_kernels import compare_rows; compare_rows('cpu', 70, 80)")


@pytest.mark.slow
@TRITON
@pytest.mark.parametrize(
    ("family", "choices"), [("qwen2", "None"), ("gemma3", "None"), ("qwen2", "SMALL"),
                            ("qwen2", "replace(SMALL, trims=True)")],
)  # fmt: skip
def test_a_decoder_under_the_interpreter(family, choices):
    interpret(
        "import torch; from dataclasses import replace; torch.set_num_threads(1); "
        "from model.test_head_kernels import SMALL, compare_decoders; "
        f"compare_decoders('{family}', 'cpu', torch.float16, {choices})"
    )


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@GPU
def test_on_the_gpu():
    compare("cuda", 1e-3)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("size", [576, 896])
def test_rows_on_the_gpu(size):
    compare_rows("cuda", 512, size)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_decoder_on_the_gpu(family):
    compare_decoders(family, "cuda", torch.bfloat16, None)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("trims", [False, True])
def test_a_decoder_of_fused_products_on_the_gpu(pdl, trims):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor copy engine")
    choices = dataclasses.replace(FUSED, pdl=pdl, trims=trims)
    compare_decoders("qwen2", "cuda", torch.bfloat16, choices)
