"""Where a step's time goes, kernel by kernel, and variants of the attention kernel; GPU only.

    python benchmarks/scorer_kernels.py [--rows 64 --mean 8 --prefix 1024 --shape 0.5b]

Each piece runs for all layers in turn (so that nothing stays in the L2 cache by accident) inside
one CUDA graph; the figure is microseconds a layer. A guide for tuning, not a result file.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from lenvm.model import kernels  # noqa: E402
from scorer import SHAPES, draw_counts  # noqa: E402


def time_us(call: Callable[[int], Any], num_layers: int) -> float:
    """Median microseconds of `call(layer)`, from a graph over all layers."""
    for layer in range(num_layers):
        call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(num_layers):
            call(layer)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / num_layers)
    return statistics.median(times[2:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--mean", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--shape", default="0.5b")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    layers, heads, num_kv = (
        shape["num_hidden_layers"],
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
    )
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    size, page = hidden // heads, 64
    rows, counts = arguments.rows, draw_counts(arguments.rows, arguments.mean)
    tokens, width = sum(counts), kernels.next_power_of_2(max(counts))
    cuda: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    columns = -(-arguments.prefix // page) + 1
    num_pages = rows * columns + 1
    data = torch.randn(layers, 2, num_pages, page, num_kv, size, **cuda)
    stash = torch.randn(layers, 2, tokens, num_kv, size, **cuda)
    table = torch.randperm(num_pages - 1, device="cuda")[: rows * columns].view(rows, -1) + 1
    table = table.to(torch.int32)
    row_ids = torch.arange(rows, dtype=torch.int32, device="cuda")
    lengths = torch.full((rows,), arguments.prefix, dtype=torch.int32, device="cuda")
    first = torch.tensor([0, *counts], device="cuda").cumsum(0).to(torch.int32)
    places = torch.arange(tokens, device="cuda")
    q, out = torch.randn(2, tokens, heads, size, **cuda)
    found: dict[str, Any] = {"tokens": tokens, "width": width}

    variants = {}
    for max_block in (32, 64, 128):
        for splits in (1, 2, 4, 8):
            for stages in (2, 3, 4):
                scratch = (
                    torch.empty(splits, tokens, heads, size, device="cuda"),
                    torch.empty(splits, tokens, heads, device="cuda"),
                )

                def attend(
                    layer: int,
                    m: int = max_block,
                    n: int = splits,
                    s: int = stages,
                    room: Any = scratch,
                ) -> None:
                    kernels.candidate_attention(
                        q, stash[layer, 0], stash[layer, 1], places, data[layer, 0],
                        data[layer, 1], table, row_ids, lengths, first, out, room,
                        scale=size**-0.5, window=None, max_candidates=width, num_splits=n,
                        max_block=m, num_stages=s,
                    )  # fmt: skip

                try:
                    us = time_us(attend, layers)
                except Exception as error:  # a variant may not fit the shared memory
                    us = float("nan")
                    print(max_block, splits, stages, repr(error)[:100])
                variants[f"block {max_block} splits {splits} stages {stages}"] = round(us, 2)
    found["attention_us"] = dict(sorted(variants.items(), key=lambda item: item[1]))

    x, residual = torch.randn(2, tokens, hidden, **cuda)
    weight = torch.randn(hidden, **cuda)
    sizes = {
        "qkv": (hidden, (heads + 2 * num_kv) * size),
        "o": (heads * size, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
        "q alone": (hidden, heads * size),
        "k alone": (hidden, num_kv * size),
        "gate alone": (hidden, inner),
    }
    pieces: dict[str, float] = {}
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        for name, (i, o) in sizes.items():
            weights = torch.randn(layers, o, i, **cuda)
            bias = torch.randn(o, **cuda) if name == "qkv" else None
            source = torch.randn(tokens, i, **cuda)
            us = time_us(lambda n, w=weights, s=source, b=bias: F.linear(s, w[n], b), layers)
            pieces[f"{library} {name}"] = us
            pieces[f"{library} {name} TFLOP/s"] = 2 * tokens * i * o / us / 1e6
    normed = torch.empty_like(x)
    pieces["add_norm"] = time_us(
        lambda n: kernels.add_norm(x, residual, weight, 1e-6, normed), layers
    )
    qkv = torch.randn(tokens, (heads + 2 * num_kv) * size, **cuda)
    cos, sin = torch.randn(2, tokens, size, **cuda)
    pieces["rotate"] = time_us(
        lambda n: kernels.rotate_and_store(
            qkv, cos, sin, None, 1e-6, q, stash[n, 0], stash[n, 1], places
        ),
        layers,
    )
    gate_up, activated = torch.randn(tokens, 2 * inner, **cuda), torch.empty(tokens, inner, **cuda)
    pieces["silu_mul"] = time_us(lambda n: kernels.silu_mul(gate_up, activated), layers)
    fp32 = torch.randn(hidden, hidden, device="cuda")
    single = torch.randn(tokens, hidden, device="cuda")
    pieces["head fc, fp32 (once a step)"] = time_us(lambda n: F.linear(single, fp32), layers)
    pieces["empty kernel"] = time_us(lambda n: normed[:1].zero_(), layers)
    found["pieces_us"] = {name: round(us, 2) for name, us in pieces.items()}
    for name, us in list(found["attention_us"].items())[:12]:
        print(f"{us:9.2f} us  attention, {name}")
    for name, us in found["pieces_us"].items():
        print(f"{us:9.2f}     {name}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
