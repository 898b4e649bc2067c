"""Which kernels run a step fastest, and right: measured on a GPU, written to `kernel_choices.json`.

    python benchmarks/scorer_kernels.py --shapes 0.5b --points 64x8            # about 80 s
    python benchmarks/scorer_kernels.py --shapes 0.5b 1.5b --points 64x8 16x8 1x8 64x16
    python benchmarks/scorer_kernels.py --shapes 0.5b --points 64x5 --trimmed  # about 100 s
    python benchmarks/scorer_kernels.py --shapes 0.5b --points 64x16 --quick   # about 25 s
    python benchmarks/scorer_kernels.py --keep FILE     # an --out of another machine

1. Each place of a layer (q/k/v, output, gate and up, down; attention) alone: cuBLAS with its small
   kernels against fused products in several tiles. Each variant runs for all layers in turn, with
   weights and keys of their own (nothing stays in the L2 cache by accident), inside one CUDA graph.
2. Whole steps as the decoder runs them: with plain kernels, with what was kept until now, and with
   the winners; from the fastest of these on one place after the other otherwise. Each must be as
   near to an fp32 forward of the same weights as the plain kernels are. The fastest is kept.

`--quick`: whole steps alone, with what was kept until now and the kernels of `hopper/`.

Kernels are compiled beforehand by several processes at once (`--compile-part`).

`--trimmed`: the kernels of trimmed steps, a third of whose 15 slots a row are real. From the ones
in the file on, one choice after the other is changed and kept where the whole step is faster.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from lenvm.files import write_text  # noqa: E402
from lenvm.model import kernel_choices, kernels, products  # noqa: E402
from lenvm.model.attention_kernels import candidate_attention, count_size  # noqa: E402
from lenvm.model.hopper import attention as hopper_attention  # noqa: E402
from lenvm.model.hopper import products as hopper  # noqa: E402
from lenvm.model.kernel_choices import AttentionChoice, Choices, Tile  # noqa: E402
from lenvm.model.products import Rows  # noqa: E402

NUM_COMPILERS = 8
PLAIN = "cublas"


def tiles_of(place: str, num_tokens: int, head_size: int) -> list[Tile]:
    """Tiles worth trying; those that compile for sm_90 without spilling in the loop."""
    if place == "qkv":
        every = [
            Tile(64, head_size, 64, 1, 4, 4),
            Tile(128, head_size, 64, 1, 8, 4),
            Tile(64, head_size, 128, 1, 4, 3),
        ]
    elif place == "gate_up":
        every = [
            Tile(128, 64, 64, 1, 8, 4),
            Tile(128, 128, 64, 1, 8, 3),
            Tile(256, 64, 64, 1, 8, 3),
            Tile(64, 64, 64, 1, 4, 4),
            Tile(64, 128, 64, 1, 4, 4),
        ]
    else:
        long = place == "down"
        every = [
            Tile(64, 128, 64, 4 if long else 1, 4, 4),
            Tile(128, 128, 64, 4 if long else 2, 8, 4),
            Tile(128, 64, 64, 4 if long else 1, 4, 4),
            Tile(64, 64, 64, 8 if long else 2, 4, 4),
            *([Tile(128, 128, 64, 8, 8, 4), Tile(256, 128, 64, 8, 8, 3)] if long else []),
        ]
    return [t for t in every if t.BM == 64 or num_tokens > t.BM // 2]


def hopper_tiles_of(place: str, head_size: int) -> list[Tile]:
    """Those of `hopper/` that were of use in some step."""
    cuts = {  # rows, columns, parts, stages, row tiles that share weights
        "qkv": [(64, head_size, 1, 6, 1), (128, head_size, 1, 576 // head_size, 1)],
        "out": [
            (64, 64, 1, 8, 1), (128, 64, 2, 7, 1), (128, 128, 2, 5, 1), (64, 64, 2, 8, 1),
            (128, 64, 1, 8, 1), (64, 128, 1, 8, 4),
        ],
        "gate_up": [
            (128, 160, 1, 4, 1), (128, 128, 1, 4, 1), (64, 64, 1, 8, 1), (64, 96, 1, 6, 1),
            (128, 160, 1, 4, 2),
        ],
        "down": [
            (128, 64, 2, 8, 1), (128, 128, 4, 5, 1), (64, 64, 4, 8, 1), (128, 128, 2, 5, 1),
            (64, 128, 2, 8, 4), (64, 128, 4, 8, 2), (128, 128, 2, 5, 2), (128, 128, 2, 5, 4),
        ],
    }[place]  # fmt: skip
    return [
        Tile(bm, bn, splits=splits, stages=stages, hopper=True, shares=shares)
        for bm, bn, splits, stages, shares in cuts
    ]


ATTENTION = [
    AttentionChoice(block, waves, stages, merges)
    for block, waves, stages in [
        (64, 1, 5), (64, 2, 5), (64, 4, 5), (64, 4, 3), (128, 1, 5), (128, 2, 5), (32, 4, 5),
    ]
    for merges in ((False, True) if waves > 1 else (False,))
]  # fmt: skip
HOPPER_ATTENTION = [AttentionChoice(128, hopper=True)]


class Places:
    """The places of a layer with inputs of a step's sizes, and every variant of each."""

    def __init__(
        self, name: str, batch: int, mean: int, prefix: int, num_layers: int, device: str
    ) -> None:
        from scorer import SHAPES, draw_counts

        shape = SHAPES[name]
        self.heads, self.num_kv = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.hidden, self.inner = shape["hidden_size"], shape["intermediate_size"]
        self.layers = min(num_layers, shape["num_hidden_layers"])
        self.size, page = self.hidden // self.heads, 64
        counts = draw_counts(batch, mean)
        n = self.tokens = sum(counts)
        self.width, self.batch = kernels.next_power_of_2(max(counts)), batch
        self.kind: dict[str, Any] = {
            "device": device,
            "dtype": torch.bfloat16 if device == "cuda" else torch.float32,
        }
        columns = -(-prefix // page) + 1
        num_pages = batch * columns + 1
        layers, num_kv, size = self.layers, self.num_kv, self.size
        self.data = torch.randn(layers, 2, num_pages, page, num_kv, size, **self.kind)
        self.stash = torch.randn(layers, 2, n, num_kv, size, **self.kind)
        order = torch.randperm(num_pages - 1, device=device)[: batch * columns] + 1
        self.table = order.view(batch, -1).to(torch.int32)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.row_ids = torch.arange(batch, **ints)
        self.lengths = torch.full((batch,), prefix, **ints)
        self.first = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
        self.places = torch.arange(n, device=device)
        self.q, self.attended = torch.randn(2, n, self.heads, size, **self.kind)
        self.y = torch.randn(n, self.hidden, **self.kind)
        self.residual = torch.randn_like(self.y, dtype=torch.float32)
        self.rows = Rows(torch.randn(n, self.hidden, **self.kind))
        self.activated = torch.randn(n, self.inner, **self.kind)
        self.norm = torch.randn(self.hidden, **self.kind)
        angles = torch.rand(n, size, device=device) * 2 * torch.pi
        self.cos, self.sin = angles.cos().to(self.q.dtype), angles.sin().to(self.q.dtype)
        self.count = torch.zeros(4096, **ints)
        self._squares: dict[int, torch.Tensor] = {}
        self.arrived = torch.zeros(
            count_size(batch, num_kv, self.width * self.heads // num_kv, 16), **ints
        )

    def weights(self, outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(self.layers, outputs, inputs, **self.kind) * inputs**-0.5

    def parts(self, tile_n: int) -> Rows:
        """Rows still to be divided by their rms, known from the sums of such tiles."""
        if tile_n not in self._squares:
            num_parts = self.hidden // tile_n
            parts = torch.full((num_parts, self.tokens), self.hidden / num_parts)
            self._squares[tile_n] = parts.to(self.q.device)
        return Rows(self.rows.x, self._squares[tile_n])

    def variants(self, place: str) -> Iterator[tuple[Any, Callable[[int], Any]]]:
        """(choice or PLAIN, call of one layer)."""
        heads, num_kv, size, h = self.heads, self.num_kv, self.size, self.hidden
        if place == "attention":
            for choice in ATTENTION:
                yield choice, self._attend(choice)
            for choice in HOPPER_ATTENTION:
                yield choice, self._attend_on_hopper(choice)
            return
        if place == "qkv":
            w = self.weights((heads + 2 * num_kv) * size, h)
            bias = w[0, :, 0].contiguous()

            def plain(i: int) -> None:
                kernels.rotate_and_store(
                    F.linear(self.rows.x, w[i], bias), self.cos, self.sin, None, 1e-6, self.q,
                    self.stash[i, 0], self.stash[i, 1], self.places,
                )  # fmt: skip

            def fused(i: int, tile: Tile) -> None:
                product = hopper.project_qkv if tile.hopper else products.project_qkv
                product(
                    self.parts(64), w[i], bias, self.cos, self.sin, 1e-6, self.q,
                    self.stash[i, 0], self.stash[i, 1], self.places, tile=tile, pdl=tile.hopper,
                )  # fmt: skip
        elif place == "gate_up":
            w = self.weights(2 * self.inner, h)

            def plain(i: int) -> None:
                kernels.silu_mul(F.linear(self.rows.x, w[i]), self.activated)

            def fused(i: int, tile: Tile) -> None:
                product = hopper.gate_and_up if tile.hopper else products.gate_and_up
                rows = self.parts(64)
                product(rows, w[i], 1e-6, self.activated, tile=tile, pdl=tile.hopper)
        else:
            x = self.attended.flatten(1) if place == "out" else self.activated
            w = self.weights(h, x.shape[1])

            def plain(i: int) -> None:
                kernels.add_norm(F.linear(x, w[i]), self.residual, self.norm, 1e-6, self.rows.x)

            def fused(i: int, tile: Tile) -> None:
                rows = Rows(self.y, self.parts(tile.BN).squares)
                if tile.hopper:
                    hopper.project_out(x, w[i], self.residual, self.norm, rows, tile=tile)
                    return
                products.project_out(
                    x, w[i], self.residual, self.norm, rows, self.count, tile=tile, pdl=False
                )

        yield PLAIN, plain
        for tile in tiles_of(place, self.tokens, size):
            yield tile, lambda i, tile=tile: fused(i, tile)
        outputs, inputs = w.shape[1:]
        if place == "gate_up":
            outputs = self.inner
        for tile in hopper_tiles_of(place, size):
            if hopper.can_multiply(place, tile, inputs, outputs):
                yield tile, lambda i, tile=tile: fused(i, tile)

    def _attend(self, choice: AttentionChoice) -> Callable[[int], Any]:
        splits = self._count_splits(choice)
        scratch = (
            torch.empty(splits, self.tokens, self.heads, self.size, device=self.q.device),
            torch.empty(splits, self.tokens, self.heads, device=self.q.device),
            self.arrived,
        )

        def attend(i: int) -> None:
            candidate_attention(
                self.q, self.stash[i, 0], self.stash[i, 1], self.places, self.data[i, 0],
                self.data[i, 1], self.table, self.row_ids, self.lengths, self.first,
                self.attended, scratch, scale=self.size**-0.5, window=None,
                max_candidates=self.width, num_splits=splits, max_block=choice.block,
                num_stages=choice.stages, merges=choice.merges, own_is_token=True,
            )  # fmt: skip

        return attend

    def _count_splits(self, choice: AttentionChoice) -> int:
        return choice.count_splits(self.batch * self.num_kv, 132, self.table.shape[1])

    def _attend_on_hopper(self, choice: AttentionChoice) -> Callable[[int], Any]:
        units = hopper_attention.plan_units(
            self.table, self.row_ids, self.lengths, self.first, num_tokens=self.tokens,
            num_heads=self.q.shape[1], num_kv=self.num_kv, head_size=self.size,
            max_candidates=self.width, num_splits=self._count_splits(choice),
        )  # fmt: skip

        def attend(i: int) -> None:
            hopper_attention.candidate_attention(
                self.q, self.stash[i, 0], self.stash[i, 1], self.places, self.data[i, 0],
                self.data[i, 1], units, self.attended, scale=self.size**-0.5, window=None,
                own_is_token=True, pdl=True,
            )  # fmt: skip

        return attend


PLACES = ("attention", "qkv", "out", "gate_up", "down")


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


def compile_part(names: list[str], points: list[tuple[int, int]], part: int) -> None:
    """Compile every NUM_COMPILERS-th variant into Triton's cache; failures show when timed."""
    which = 0
    for name, (batch, mean) in itertools.product(names, points):
        places = Places(name, batch, mean, 256, 1, "cuda")
        for place in PLACES:
            for _, call in places.variants(place):
                which += 1
                if which % NUM_COMPILERS == part:
                    try:
                        call(0)
                    except Exception as error:
                        print(place, repr(error)[:200], flush=True)
    torch.cuda.synchronize()


def precompile(names: list[str], points: list[str], timeout_s: float) -> None:
    command = [sys.executable, __file__, "--shapes", *names, "--points", *points]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, "--compile-part", str(i)], env=environment)
        for i in range(NUM_COMPILERS)
    ]
    deadline = time.monotonic() + timeout_s
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


@torch.inference_mode()
def time_places(name: str, batch: int, mean: int, prefix: int) -> dict[str, dict[Any, float]]:
    """Microseconds a layer of every variant, fastest first; NaN where it does not run."""
    places = Places(name, batch, mean, prefix, 99, "cuda")
    found: dict[str, dict[Any, float]] = {}
    for place in PLACES:
        times = {}
        for choice, call in places.variants(place):
            try:
                times[choice] = time_us(call, places.layers)
            except Exception as error:  # a variant may not fit the shared memory
                print(f"{place} {choice}: {error!r}"[:300], flush=True)
        found[place] = dict(sorted(times.items(), key=lambda item: item[1]))
        for choice, us in found[place].items():
            print(f"{us:9.2f} us  {place:9} {choice}", flush=True)
        torch.cuda.empty_cache()
    return found


def first_choices(found: dict[str, dict[Any, float]], kept: Choices) -> Iterator[Choices]:
    """Plain kernels; what was kept until now; the fastest of `hopper/` in every place, then of
    Triton's."""
    yield from (Choices(), kept)
    for own_kind in (True, False):
        best = {}
        for place, choices in found.items():
            own = [c for c in choices if c != PLAIN and c.hopper == own_kind]
            best |= {place: own[0]} if own else {}
        yield Choices(**best, pdl=own_kind)


def change_one(choices: Choices, found: dict[str, dict[Any, float]]) -> Iterator[Choices]:
    """One place after the other otherwise. Dependent launch goes with the kernels of `hopper/`:
    among the others it was within noise."""
    for place, times in found.items():
        for choice in times:
            changed = replace(choices, **{place: None if choice == PLAIN else choice})
            parts = [*changed.tiles.values(), changed.attention]
            yield replace(changed, pdl=any(part.hopper for part in parts))


def tune(
    name: str, batch: int, mean: int, prefix: int, deadline: float, quick: bool = False
) -> dict[str, Any]:
    """Record of the fastest choices for that step, for `kernel_choices.json`."""
    from lenvm.guidance.scorer import CandidateScorer
    from scorer import Steady, load, time_graph

    found = {} if quick else time_places(name, batch, mean, prefix)
    model = load(name, "cuda", torch.bfloat16)
    room: dict[str, Any] = {
        "max_tokens": batch * (prefix + 2048),
        "max_requests": batch,
        "max_candidates": 2 * mean,
    }
    scorer = CandidateScorer(model, **room)
    scorer.decoder._cache.data.normal_(std=0.5)
    exact_model = copy.deepcopy(model).float()
    exact = CandidateScorer(exact_model, **room, cuda_graphs=False)
    exact.decoder._cache.data.copy_(scorer.decoder._cache.data)
    steady, reference = Steady(scorer, batch, prefix, mean), Steady(exact, batch, prefix, mean)
    reference.candidates = steady.candidates
    runner: Any = scorer.decoder._runner
    truth = peek(reference).double()
    del exact, reference, exact_model
    torch.cuda.empty_cache()
    tried: list[tuple[float, float, bool, Choices]] = []
    num_tokens = sum(steady.counts)
    shape = runner._forward.shape
    kept = kernel_choices.choose(torch.device("cuda"), shape, num_tokens)
    if quick:
        tiles = {p: [*hopper_tiles_of(p, shape.head_size), PLAIN] for p in PLACES[1:]}
        found = {p: dict.fromkeys(tiles[p], 0.0) for p in tiles}
        found["attention"] = dict.fromkeys([*HOPPER_ATTENTION, AttentionChoice()], 0.0)

    def fastest() -> tuple[float, float, bool, Choices]:
        return min((t for t in tried if t[2]), key=lambda t: t[0])

    def attempt(choices: Choices) -> None:
        # what was kept is tried whatever comes
        is_late = len(tried) > 1 and time.monotonic() > deadline
        is_known = any(choices == t[3] for t in tried)
        if is_late or is_known or not runner._forward.can_run(choices, num_tokens):
            return
        forget_graphs(runner)
        runner.choose = lambda *_: choices
        try:
            out = peek(steady).double()
            repeats = bool(torch.equal(out, peek(steady).double()))
            us = time_graph(scorer) * 1e3
        except Exception as error:
            print(f"{choices}: {error!r}"[:400], flush=True)
            return
        error = float((out - truth).norm() / truth.norm())
        plain_error = tried[0][1] if tried else error
        ok = repeats and error <= plain_error * 1.5 + 1e-4
        own = "".join(name[0] for name, tile in choices.tiles.items() if tile.hopper)
        names = f"{'+'.join(choices.tiles) or 'cublas':27} hopper {own or '-':4} "
        names += f"{choices.attention.hopper}"
        print(f"{us:9.1f} us a step  {names} error {error:.2e} repeats {repeats}", flush=True)
        tried.append((us, error, ok, choices))

    for choices in first_choices(found, kept):
        attempt(choices)
    for place in found:
        for choices in change_one(fastest()[3], {place: found[place]}):
            attempt(choices)
    plain_us, plain_error, _, _ = tried[0]
    us, error, _, choices = fastest()
    forget_graphs(runner)
    return {
        "device_kind": kernel_choices.device_kind(torch.device("cuda")),
        "device": torch.cuda.get_device_name(),
        "shape": vars(shape),
        "num_tokens": runner._last.num_tokens,
        "choices": choices.to_json(),
        "step_us": round(us, 1),
        "plain_step_us": round(plain_us, 1),
        "steps_us": {str(choices): round(us, 1) for us, _, _, choices in tried},
        "error": error,
        "plain_error": plain_error,
        "places_us": {
            place: {str(choice): round(us, 2) for choice, us in times.items()}
            for place, times in found.items()
        },
    }


SLOTS = 15


@torch.inference_mode()
def tune_trimmed(name: str, batch: int, mean: int, prefix: int, deadline: float) -> dict[str, Any]:
    """Record of the fastest choices for a trimmed step of `mean` real candidates in SLOTS a row."""
    from lenvm.guidance.scorer import CandidateScorer
    from scorer import Steady, load, time_graph

    model = load(name, "cuda", torch.bfloat16)
    scorer = CandidateScorer(
        model, max_tokens=batch * (prefix + 2048), max_requests=batch, max_candidates=SLOTS
    )
    scorer.decoder._cache.data.normal_(std=0.5)
    steady = Steady(scorer, batch, prefix, mean, SLOTS)
    runner: Any = scorer.decoder._runner

    def attempt(choices: Choices) -> tuple[float, torch.Tensor]:
        forget_graphs(runner)
        runner.choose = lambda _, trims=False: (
            choices if trims == choices.trims else kernel_choices.PLAIN
        )
        runner.hint = SimpleNamespace(trims=choices.trims, note=lambda share: None)
        out = peek(steady, counted=False).double()
        if not torch.equal(out, peek(steady, counted=False).double()):
            raise RuntimeError("a second call gives something else")
        return time_graph(scorer) * 1e3, out

    plain_us, truth = attempt(kernel_choices.PLAIN)
    num_tokens = runner._last.num_tokens
    shape = runner._forward.shape
    best = kernel_choices.choose(torch.device("cuda"), shape, num_tokens, True)
    if not best.trims:
        raise SystemExit("no trimmed kernels for that size in the file: LENVM_TRY_KERNELS=1?")
    us, out = attempt(best)
    errors = {"plain_error": 0.0, "error": float((out - truth).norm() / truth.norm())}
    limit = 1.2 * errors["error"] + 1e-3
    print(
        f"{plain_us:9.1f} us plain, {us:9.1f} us, {errors['error']:.2e} apart: {best}", flush=True
    )
    own = {p: hopper_tiles_of(p, shape.head_size) for p in PLACES[1:]}
    changes: list[dict[str, Any]] = [
        {p: tiles[0] for p, tiles in own.items()}
        | {"attention": AttentionChoice(128, 1, hopper=True), "pdl": True}
    ]
    for place, tiles in own.items():
        changes += [{place: tile} for tile in tiles[1:]]
    for place in ("gate_up", "down", "out", "qkv"):
        changes += [{place: tile} for tile in tiles_of(place, num_tokens, shape.head_size)]
    changes += [{"attention": c} for c in [*HOPPER_ATTENTION, *ATTENTION] if not c.merges]
    tried = {str(best): us}
    for change in changes:
        choices = replace(best, **change)
        if time.monotonic() > deadline:
            break
        if str(choices) in tried or not runner._forward.can_run(choices, num_tokens):
            continue
        try:
            tried[str(choices)], out = attempt(choices)
        except Exception as error:  # it may not fit the shared memory
            print(f"{change}: {error!r}"[:300], flush=True)
            continue
        error = float((out - truth).norm() / truth.norm())
        print(f"{tried[str(choices)]:9.1f} us, {error:.2e} apart: {change}", flush=True)
        if tried[str(choices)] < us and error <= limit:
            best, us = choices, tried[str(choices)]
            errors["error"] = error
    forget_graphs(runner)
    return {
        "device_kind": kernel_choices.device_kind(torch.device("cuda")),
        "device": torch.cuda.get_device_name(),
        "shape": vars(shape),
        "num_tokens": num_tokens,
        "choices": best.to_json(),
        "step_us": round(us, 1),
        "plain_step_us": round(plain_us, 1),
        **errors,
        "places_us": tried,
    }


def forget_graphs(runner: Any) -> None:
    """A pool whose last graph is gone takes no other."""
    runner._steps.clear()
    runner._pool = torch.cuda.graph_pool_handle()


def peek(steady: Any, counted: bool = True) -> torch.Tensor:
    """Outputs of all candidates that a steady state has, which stays where it is: of one request
    with two candidates, one step would tell little about errors."""
    count, outs = sum(steady.counts) if counted else None, []
    for candidates in steady.candidates:
        out = steady.decoder.peek(steady.ids, candidates, num_candidates=count)
        outs.append(out[candidates >= 0])
    torch.cuda.synchronize()
    return torch.cat(outs)


def is_record(record: Any) -> bool:
    """Whether it is of the form that `kernel_choices.json` holds."""
    try:
        Choices.from_json(record["choices"])
        kernel_choices.LayerShape(**record["shape"])
        return record["num_tokens"] > 0 and isinstance(record["device_kind"], str)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def keep_record(record: dict[str, Any], path: Path = kernel_choices.PATH) -> None:
    """Replace what the file says of that device, shape and number of tokens."""
    told = json.loads(path.read_text())
    key = ("device_kind", "shape", "num_tokens")
    part = "trimmed_records" if record["choices"].get("trims") else "records"
    told[part] = [r for r in told[part] if any(r[k] != record[k] for k in key)] + [
        {k: v for k, v in record.items() if k not in ("places_us", "steps_us")}
    ]
    write_text(path, json.dumps(told, indent=1) + "\n")
    kernel_choices._records.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["0.5b"], choices=["0.5b", "1.5b"])
    parser.add_argument("--points", nargs="+", default=["64x8"], help="requests x candidates")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--budget-s", type=float, default=85.0)
    parser.add_argument("--compile-part", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--trimmed", action="store_true", help="kernels of trimmed steps")
    parser.add_argument("--quick", action="store_true", help="whole steps alone, of hopper/")
    parser.add_argument("--out", type=Path, default=None, help="all timings, as JSON")
    parser.add_argument("--keep", type=Path, default=None, help="take over an --out of elsewhere")
    arguments = parser.parse_args()
    if arguments.quick and arguments.trimmed:
        parser.error("--quick is for steps that are not trimmed; leave one of the two out")
    if arguments.keep is not None:
        try:
            records = json.loads(arguments.keep.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--keep {arguments.keep}: {error}; it takes an --out of this script")
        if not isinstance(records, list) or not all(is_record(r) for r in records):
            parser.error(f"--keep {arguments.keep}: no records; it takes an --out of this script")
        for record in records:
            keep_record(record)
        return
    if arguments.prefix < 1 or arguments.budget_s <= 0:
        parser.error(
            f"--prefix {arguments.prefix}, --budget-s {arguments.budget_s}: both must be above 0"
        )
    points = []
    for point in arguments.points:
        batch, _, mean = point.partition("x")
        if not (batch.isdecimal() and mean.isdecimal() and int(batch) > 0 and int(mean) > 0):
            parser.error(f"--points {point}: it takes requests x candidates, like 64x8")
        points.append((int(batch), int(mean)))
    if not torch.cuda.is_available():
        parser.error("this measures kernels on a GPU; there is no CUDA device here")
    if arguments.compile_part is not None:
        compile_part(arguments.shapes, points, arguments.compile_part)
        return
    deadline = time.monotonic() + arguments.budget_s
    if not (arguments.trimmed or arguments.quick):
        precompile(arguments.shapes, arguments.points, arguments.budget_s / 2)
        print(f"compiled, {deadline - time.monotonic():.0f} s left", flush=True)
    records = []
    todo = list(itertools.product(arguments.shapes, points))
    for number, (name, (batch, mean)) in enumerate(todo):
        find: Any = tune_trimmed if arguments.trimmed else partial(tune, quick=arguments.quick)
        left = (deadline - time.monotonic()) / (len(todo) - number)
        record = find(name, batch, mean, arguments.prefix, time.monotonic() + left)
        keep_record(record)
        records.append(record)
        if arguments.out is not None:
            write_text(arguments.out, json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
