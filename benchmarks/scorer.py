"""Figures of the candidate scorer: its step against the floor, the published way, the naive one.

    python benchmarks/scorer.py                                   # GPU, about 7 minutes
    python benchmarks/scorer.py --headline --tune --truth qwen.gguf --merge    # GPU, 160 s
    python benchmarks/scorer.py --device cpu                      # 2 CPU cores, 3 minutes
    python benchmarks/scorer.py --device cpu --generate           # one run more of that part alone
    LENVM_TRY_KERNELS=1 python benchmarks/scorer.py --real-share 0.33 --batches 64 --candidates 5 \
        --prefixes 1024 --no-baselines --out scorer_trimmed_h100.json          # GPU, 60 s

`--headline` measures the headline's point alone, `--truth` holds real weights against plain
forwards, `--tune` finds the fastest kernels first (`scorer_kernels.py`), and `--merge` keeps the
rows of the result file that this run does not measure anew. `--real-share` gives every row more
slots than candidates, and measures beside the counted step the one inside an engine, which knows no
count: over all slots, and trimmed.

Models are random weights of a shape (`--shapes 0.5b 1.5b`: Qwen2.5's) or real ones. Ceilings (copy
bandwidth, matrix product) are measured in the same run, and in the same state: an H200 that works
on for a second reaches its power limit, which lowers the clock (a large product falls from 790 to
670 TFLOP/s, a step of 64 x 8 by 5%). So ceilings and steps are timed after a second of their own
work, and once more as `burst`, 20 of the first calls after 0.3 s of rest. The floor of a step is
the larger of (weights + prefix keys and values + candidates' own) / bandwidth and FLOPs / rate; the
serial floor takes the larger for each stage (each matrix product, each attention), because a
layer's stages wait for one another. The JSON is written after each point, so a run that is cut
keeps what it has.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from lenvm.guidance.scorer import CandidateScorer  # noqa: E402
from lenvm.model.head import ValueHead  # noqa: E402
from lenvm.model.ragged import RaggedDecoder  # noqa: E402
from lenvm.model.value_model import LengthValueModel  # noqa: E402
from scorer_baselines import TwoForward, naive  # noqa: E402

SHAPES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
}
HEADLINE = {"model": "0.5b", "batch": 64, "candidates": 8, "prefix": 1024}
RAGGED = {
    "8 of 135": [135] * 8,
    "7 of 50, one of 730": [*[50] * 7, 730],
    "8 from 50 to 800": [50, 100, 150, 200, 300, 400, 600, 800],
    "48 from 50 to 990": [50 + 20 * i for i in range(48)],
}


class BenchmarkModel(nn.Module):
    """A backbone with a scalar head, as `CandidateScorer` takes it."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = SimpleNamespace(gamma=0.997, head="scalar")
        like = next(backbone.parameters())
        torch.manual_seed(1)
        self.head = ValueHead(backbone.config.hidden_size).to(like.device)

    def belief(self, raw: Tensor) -> Any:
        return self.head.belief(raw, self.config.gamma)

    @torch.inference_mode()
    def spread_z(self) -> None:
        """Scale the head so that z has a standard deviation of 2 over random tokens."""
        device = next(self.parameters()).device
        vocabulary = self.backbone.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (4, 128), device=device)
        z = self.head(self.backbone(input_ids=ids, use_cache=False).last_hidden_state)
        self.head.summary.weight.mul_(2.0 / z.std())
        z = self.head(self.backbone(input_ids=ids, use_cache=False).last_hidden_state)
        self.head.summary.bias.sub_(z.mean())


def load(name: str, device: str, dtype: torch.dtype) -> BenchmarkModel:
    """Random weights of a shape, or a GGUF file or a folder."""
    from transformers import AutoModel, Qwen2Config

    if name in SHAPES:
        config = Qwen2Config(
            **{
                "vocab_size": 151_936,
                "max_position_embeddings": 32_768,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "tie_word_embeddings": True,
                **SHAPES[name],
            }
        )
        torch.manual_seed(0)
        with torch.device(device):
            backbone = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    else:
        path = Path(name)
        source = (
            {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            if path.suffix == ".gguf"
            else {"pretrained_model_name_or_path": name}
        )
        backbone = AutoModel.from_pretrained(**source, dtype=dtype).to(device)
    return BenchmarkModel(backbone.eval())


# -- clocks and ceilings ---------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def keep_busy(call: Callable[[], Any], device: str, seconds: float = 1.0) -> None:
    """A GPU then has the clock that its power limit allows for such work. Nothing on a CPU."""
    end = time.monotonic() + (seconds if device == "cuda" else 0.0)
    while time.monotonic() < end:
        for _ in range(5):
            call()
        synchronize(device)


def time_ms(call: Callable[[], Any], device: str, repeats: int, rounds: int = 5) -> float:
    """Median over rounds of the time of one call, in runs of `repeats` without a sync between.

    On a GPU from event to event, behind one call that is not timed: what the host takes to launch
    the first of a run (0.3 ms of a step) is no part of each.
    """
    call()
    synchronize(device)
    times = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / repeats)
        else:
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            times.append((time.perf_counter() - begin) / repeats * 1e3)
    return statistics.median(times)


def time_burst_ms(call: Callable[[], Any], repeats: int) -> float:
    """Time of a call behind the first two of a GPU that has rested."""
    call()
    torch.cuda.synchronize()
    time.sleep(0.3)
    return time_ms(call, "cuda", repeats, 1)


def measure_ceilings(device: str) -> dict[str, Any]:
    """bytes/s of a copy (read + written), FLOP/s of a matrix product in bf16 and in fp32; on a GPU
    under load, and as `burst`."""
    size, side = (2**30, 8192) if device == "cuda" else (2**26, 1024)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    works: dict[str, tuple[Callable[[], Any], int, int]] = {
        "bytes_per_s": (lambda: target.copy_(source), 2 * size, 20)
    }
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(side, side, device=device, dtype=dtype)
        product = partial(torch.mm, a, a, out=torch.empty_like(a))
        works[f"{name}_flop_per_s"] = product, 2 * side**3, 5
    ceilings: dict[str, Any] = {}
    burst = {}
    for name, (call, amount, repeats) in works.items():
        if device == "cuda":
            burst[name] = amount / time_burst_ms(call, repeats) * 1e3
        keep_busy(call, device)
        ceilings[name] = amount / time_ms(call, device, repeats) * 1e3
    return ceilings | ({"burst": burst} if burst else {})


# -- floor -----------------------------------------------------------------------------------------


def compute_floors(
    model: BenchmarkModel, lengths: list[int], counts: list[int], ceilings: dict[str, Any]
) -> dict[str, float]:
    """Times below which no schedule (`floor_ms`), and no serial one, runs a step; bytes, FLOPs."""
    config = model.backbone.config
    size = next(model.backbone.parameters()).element_size()
    rate = ceilings["bf16_flop_per_s" if size == 2 else "fp32_flop_per_s"]
    bandwidth = ceilings["bytes_per_s"]
    tokens = sum(counts)
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    products = [
        module.weight.numel()
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear)
    ]
    products_s = sum(max(n * size / bandwidth, 2 * n * tokens / rate) for n in products)
    kv_bytes = 2 * layers * config.num_key_value_heads * head_size * size
    prefix_bytes = (sum(lengths) + tokens) * kv_bytes
    pairs = sum(k * (t + 1) for k, t in zip(counts, lengths, strict=True))
    attention_flop = 4 * layers * heads * head_size * pairs
    head_params = sum(p.numel() for p in model.head.parameters())
    head_flop = 2 * head_params * tokens
    head_s = max(head_params * 4 / bandwidth, head_flop / ceilings["fp32_flop_per_s"])
    num_bytes = sum(products) * size + head_params * 4 + prefix_bytes
    flop = 2 * sum(products) * tokens + attention_flop
    compute_s = flop / rate + head_flop / ceilings["fp32_flop_per_s"]
    attention_s = max(prefix_bytes / bandwidth, attention_flop / rate)
    return {
        "floor_ms": max(num_bytes / bandwidth, compute_s) * 1e3,
        "floor_serial_ms": (products_s + attention_s + head_s) * 1e3,
        "bytes": num_bytes,
        "flop": flop + head_flop,
    }


# -- a point ---------------------------------------------------------------------------------------


class Steady:
    """`batch` requests with random keys and values of `prefix` tokens, stepped over and over.

    Rows have at least `width` slots; those without a candidate hold -1."""

    def __init__(
        self, scorer: CandidateScorer, batch: int, prefix: int, mean: int, width: int = 1
    ) -> None:
        self.scorer, self.decoder = scorer, scorer.decoder
        self.batch, self.prefix = batch, prefix
        cache = self.decoder._cache
        self.ids = [f"r{i}" for i in range(batch)]
        for request_id in self.ids:
            cache.open(request_id)
            cache.reserve(request_id, prefix)
            cache.advance(request_id, prefix)
        self.counts = draw_counts(batch, mean)
        self.num_candidates: int | None = sum(self.counts)
        width = max(width, *self.counts)
        device = self.decoder.device
        ids = torch.randint(self.decoder.vocab_size, (8, batch, width), device=device)
        columns = torch.arange(width, device=device)
        counts = torch.tensor(self.counts, device=device).unsqueeze(-1)
        self.candidates = list(ids.masked_fill(columns >= counts, -1))
        self.chosen = [c[:, 0].clone() for c in self.candidates]
        self.num_steps = 0

    def peek(self) -> None:
        candidates = self.candidates[self.num_steps % len(self.candidates)]
        self.decoder.peek(self.ids, candidates, num_candidates=self.num_candidates)

    def step(self) -> None:
        self.peek()
        chosen = self.chosen[self.num_steps % len(self.candidates)]
        self.decoder.commit(self.ids, chosen, peeked=True)
        self.num_steps += 1

    def step_and_read(self) -> None:
        """With the one host sync that an engine needs: reading the chosen tokens."""
        self.step()
        self.chosen[self.num_steps % len(self.chosen)].tolist()

    def close(self) -> None:
        self.scorer.remove(self.ids)


def draw_counts(batch: int, mean: int) -> list[int]:
    """Ragged numbers of candidates, 1 to 2 mean - 1, of exactly the given mean."""
    generator = torch.Generator().manual_seed(batch * 1000 + mean)
    half = torch.randint(1, 2 * mean, (batch // 2,), generator=generator).tolist()
    return [*half, *[2 * mean - n for n in half], *[mean] * (batch % 2)]


@contextlib.contextmanager
def counted_syncs(device: str) -> Iterator[list[Any]]:
    """Host syncs that torch makes inside, as the warnings it gives for them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        found: list[Any] = []
        try:
            yield found
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        # torch says once in a process that this mode is a prototype: no sync
        found += [w for w in caught if "called a synchronizing" in str(w.message)]


def count_syncs(steady: Steady, device: str, num_steps: int = 10) -> float:
    with counted_syncs(device) as found:
        for _ in range(num_steps):
            steady.step_and_read()
    return len(found) / num_steps


def measure_naive(
    model: BenchmarkModel, prefix: int, num_sequences: int, device: str, max_tokens: int
) -> tuple[float, bool]:
    """ms of a full forward of every candidate; scaled up from a part where it is a large work."""
    part = max(1, min(num_sequences, max_tokens // (prefix + 1)))
    vocabulary = model.backbone.get_input_embeddings().num_embeddings
    sequences = torch.randint(vocabulary, (part, prefix + 1), device=device)
    ms = time_ms(lambda: naive(model.backbone, model.head, sequences), device, 1, 2)
    return ms * num_sequences / part, part < num_sequences


def measure_point(
    scorer: CandidateScorer,
    name: str,
    batch: int,
    mean: int,
    prefix: int,
    ceilings: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    device, model = arguments.device, scorer.model
    point: dict[str, Any] = {"model": name, "batch": batch, "candidates": mean, "prefix": prefix}
    point |= {"device": arguments.card, "commit": arguments.commit, "ceilings": ceilings}
    width = round(mean / (arguments.real_share or 1))
    repeats, rounds = (20, 5) if device == "cuda" else (3, 3)
    # each step makes the prefix longer by one: it is `prefix` amid those that are timed
    if device == "cuda":
        steady = Steady(scorer, batch, max(1, prefix - repeats // 2 - 3), mean, width)
        try:
            point["burst_step_ms"] = time_burst_ms(steady.step, repeats)
        finally:
            steady.close()
    begin = max(1, prefix - (repeats + 1) * rounds // 2)
    steady = Steady(scorer, batch, begin, mean, width)
    try:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        keep_busy(steady.peek, device)
        point["step_ms"] = time_ms(steady.step, device, repeats, rounds)
        if device == "cuda":
            point["graph_ms"] = time_graph(scorer)
        point["step_with_sync_ms"] = time_ms(steady.step_and_read, device, repeats, 3)
        point["host_syncs_per_step"] = count_syncs(steady, device)
        if device == "cuda":
            point["peak_bytes"] = torch.cuda.max_memory_allocated()
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            point["formula_bytes"] = weights + scorer.decoder.num_kv_bytes
            point["memory_over_formula"] = point["peak_bytes"] / point["formula_bytes"]
        lengths = [prefix] * batch
        point |= compute_floors(model, lengths, steady.counts, ceilings)
        if device == "cuda":
            floors = compute_floors(model, lengths, steady.counts, ceilings["burst"])
            point["burst_ratio"] = point["burst_step_ms"] / floors["floor_ms"]
        runner: Any = scorer.decoder._runner
        if hasattr(runner, "choose"):
            choices = runner.choose(runner._last.num_tokens, False)
            point["kernels"] = {"pdl": choices.pdl, "fused": list(choices.tiles)}
        point["ratio"] = point["step_ms"] / point["floor_ms"]
        point["ratio_serial"] = point["step_ms"] / point["floor_serial_ms"]
        if arguments.real_share is not None:
            point |= measure_uncounted(scorer, steady)
    finally:
        steady.close()
    if not arguments.no_baselines and mean > 1:
        two = TwoForward(model.backbone, model.head, batch, prefix, max(steady.counts))
        vocabulary = scorer.decoder.vocab_size
        chosen = torch.randint(vocabulary, (batch,), device=device)
        candidates = torch.randint(vocabulary, (batch, two.width), device=device)
        point["two_forward_ms"] = time_ms(lambda: two.step(chosen, candidates), device, 2, 3)
        del two
        point["speedup_over_two_forward"] = point["two_forward_ms"] / point["step_ms"]
        most = 65_536 if device == "cuda" else 2_048
        ms, scaled = measure_naive(model, prefix, sum(steady.counts), device, most)
        point |= {
            "naive_ms": ms,
            "naive_scaled": scaled,
            "speedup_over_naive": ms / point["step_ms"],
        }
    return point


@torch.inference_mode()
def measure_uncounted(scorer: CandidateScorer, steady: Steady) -> dict[str, Any]:
    """The step where nobody has counted the candidates, over all slots and trimmed: times, and how
    far the outputs of the two are apart."""
    runner: Any = scorer.decoder._runner
    steady.num_candidates = None
    candidates = steady.candidates[0]
    found: dict[str, Any] = {"slots": candidates.numel(), "real": sum(steady.counts)}
    hints = {
        name: SimpleNamespace(trims=trims, note=lambda share: None)
        for name, trims in (("uncounted", False), ("trimmed", True))
    }
    outs = []
    for hint in hints.values():
        runner.hint = hint
        outs.append(steady.decoder.peek(steady.ids, candidates).double())
    found["trimmed_error"] = float((outs[1] - outs[0]).norm() / outs[0].norm())
    for name, hint in hints.items():
        runner.hint = hint
        found[f"{name}_ms"] = time_ms(steady.step, "cuda", 20)
        found[f"{name}_graph_ms"] = time_graph(scorer)
    choices = runner.choose(runner._last.num_tokens, True)
    found["trimmed_kernels"] = choices.to_json() if choices.trims else None
    return found


def time_graph(scorer: CandidateScorer) -> float:
    """Time of the last step's graph alone, replayed: no host work, no packing."""
    runner: Any = scorer.decoder._runner
    step = runner._steps[runner._last]
    return time_ms(step.run, "cuda", 20, 3)


# -- the run ---------------------------------------------------------------------------------------


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    import transformers

    found: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "commit": arguments.commit or _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if arguments.device == "cuda":
        import triton

        found |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return found


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def write(result: dict[str, Any], path: Path) -> None:
    points = result["points"]
    at = [p for p in points if all(p.get(k) == v for k, v in result["headline_point"].items())]
    checks = result.get("model_checks", [])
    result["headline"] = {
        **result.get("headline", {}),
        "ratio_to_floor": at[0].get("ratio") if at else None,
        "ratio_to_serial_floor": at[0].get("ratio_serial") if at else None,
        "burst_ratio_to_floor": at[0].get("burst_ratio") if at else None,
        "speedup_over_two_forward": at[0].get("speedup_over_two_forward") if at else None,
        "speedup_over_naive": at[0].get("speedup_over_naive") if at else None,
        "host_syncs_per_step": max((p["host_syncs_per_step"] for p in points), default=None),
        "max_error_z_bf16": max(
            (c["max_error_z"] for c in checks if c["dtype"] == "bfloat16"), default=None
        ),
        **{
            f"{name}_bf16": max(
                (c[name] for c in checks if c["dtype"] == "bfloat16" and name in c), default=None
            )
            for name in ("max_error_z_of_scorer_to_fp32", "max_error_z_of_plain_to_fp32")
        },
        "max_memory_over_formula": max(
            (p["memory_over_formula"] for p in points if "memory_over_formula" in p), default=None
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def show(result: dict[str, Any]) -> None:
    names = (
        "step_ms",
        "step_with_sync_ms",
        "graph_ms",
        "uncounted_ms",
        "trimmed_ms",
        "floor_ms",
        "ratio",
        "ratio_serial",
        "burst_ratio",
        "two_forward_ms",
        "naive_ms",
    )
    print(f"{'model':>6} {'B':>4} {'K':>3} {'T':>5} " + " ".join(f"{n[:9]:>9}" for n in names))
    for p in result["points"]:
        cells = " ".join(f"{p[n]:9.3f}" if n in p else f"{'-':>9}" for n in names)
        name = Path(p["model"]).name[:6]
        print(f"{name:>6} {p['batch']:4d} {p['candidates']:3d} {p['prefix']:5d} {cells}")
    print(json.dumps(result["headline"]))


def grid(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(batch, mean candidates, prefix), headline first; one candidate a row is plain decoding."""
    head = (HEADLINE["batch"], HEADLINE["candidates"], HEADLINE["prefix"])
    points = [
        (b, k, t)
        for t in arguments.prefixes
        for b in arguments.batches
        for k in ([1, *arguments.candidates] if t == 1024 else arguments.candidates)
    ]
    return sorted(points, key=lambda p: p != head)


def run_model(
    name: str,
    result: dict[str, Any],
    arguments: argparse.Namespace,
    deadline: float,
) -> None:
    dtype = getattr(torch, arguments.dtype)
    model = load(name, arguments.device, dtype)
    room = max(b * (t + 600) for b, _, t in grid(arguments))
    scorer = CandidateScorer(
        model,
        max_tokens=max(room, 33_000),
        max_requests=max(arguments.batches),
        max_candidates=round(max(arguments.candidates) * max(2, 1 / (arguments.real_share or 1))),
        cuda_graphs=not arguments.no_graphs,
        kernels=arguments.kernels,
    )
    scorer.decoder._cache.data.normal_(std=0.5)
    runner: Any = scorer.decoder._runner
    print(f"{name}: fused layers {getattr(runner, 'is_fused', None)}", flush=True)
    for batch, mean, prefix in grid(arguments):
        if time.monotonic() > deadline and result["points"]:
            result["stopped_early"] = True
            break
        try:
            point = measure_point(scorer, name, batch, mean, prefix, result["ceilings"], arguments)
        except Exception as error:  # one point that fails must not cost the others
            traceback.print_exc()
            result["failures"].append(
                {
                    "model": name,
                    "batch": batch,
                    "candidates": mean,
                    "prefix": prefix,
                    "error": repr(error),
                }
            )
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
        else:
            at = ("model", "batch", "candidates", "prefix")
            result["points"] = [
                p for p in result["points"] if any(p[k] != point[k] for k in at)
            ] + [point]
        write(result, arguments.out)


def add_generate_run(path: Path, commit: str | None, *, guide: bool) -> None:
    """One run more into the file's `generate_runs`; `generate` is the median one by the ratio of
    those with the guide, of this commit. guide False: the bundled value model's own layers score.
    """
    result = json.loads(path.read_text())
    run = {"guide": guide, "commit": commit, **measure_generate(guide=guide)}
    runs = [r for r in result.get("generate_runs", []) if r["commit"] == commit] + [run]
    result["generate_runs"] = runs
    guided = sorted((r for r in runs if r["guide"]), key=lambda r: r["speed_with_over_without"])
    if guided:
        result["generate"] = guided[(len(guided) - 1) // 2]
    path.write_text(json.dumps(result, indent=1))
    print(json.dumps(run), flush=True)


def measure_generate(
    value: str | None = None, num_tokens: int = 64, *, guide: bool = True
) -> dict[str, Any]:
    """`lenvm generate`'s engine with and without control, on the bundled models: tokens/s.
    value: another value model than the bundled one, a checkpoint's folder. guide False: without
    the guide that it may have.

    Every answer has `num_tokens` tokens: with control because it is asked for, without because
    ending is banned. Arms take turns; medians. The first case is the default control; the others
    say what its parts cost. `hugging_face`: the generator's stock `generate()`.
    """
    from lenvm.cli._inputs import load_value_model
    from lenvm.engines.sampling import SamplingParams
    from lenvm.engines.transformers import Request, TransformersEngine
    from lenvm.guidance.request import LengthControl
    from lenvm.model.device import pick_dtype
    from lenvm.model.tokenization import encode_prompt

    value_model = load_value_model(value and Path(value), device="cpu")
    if not guide:
        value_model.set_guide(None)
    engine = TransformersEngine.load("smollm2", value_model, dtype=pick_dtype("cpu"))
    prompt = [{"role": "user", "content": "Explain how a bicycle keeps its balance."}]
    ids = tuple(encode_prompt(engine.tokenizer, prompt))
    banned = dict.fromkeys(engine.eos_token_ids, -100.0)
    assert engine.session is not None
    decoder: Any = engine.session.scorer.decoder  # type: ignore[attr-defined]
    scored = []
    peek = decoder.peek

    def counting_peek(*given: Any, **options: Any) -> Tensor:
        scored.append(int((given[1] >= 0).sum()))
        out: Tensor = peek(*given, **options)
        return out

    decoder.peek = counting_peek

    def run(control: LengthControl | None, num_requests: int, length: int) -> float:
        requests = [
            Request(
                id=str(i),
                prompt_token_ids=ids,
                sampling=SamplingParams(
                    max_tokens=length, seed=i, logit_bias={} if control else banned
                ),
                control=control,
            )
            for i in range(num_requests)
        ]
        start = time.perf_counter()
        made = sum(len(c.token_ids) for c in engine.generate(requests))
        return made / (time.perf_counter() - start)

    def run_stock(num_requests: int, length: int) -> float:
        inputs = torch.tensor([ids] * num_requests)
        start = time.perf_counter()
        engine.generator.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_k=0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )
        return num_requests * length / (time.perf_counter() - start)

    def measure(num_requests: int, top_k: int) -> dict[str, Any]:
        control = LengthControl(equal_to=num_tokens, top_k=top_k)
        arms: dict[str, Callable[[int], float]] = {
            "without": lambda n: run(None, num_requests, n),
            "with": lambda n: run(control, num_requests, n),
            "hugging_face": lambda n: run_stock(num_requests, n),
        }
        for arm in arms.values():
            arm(8)
        scored.clear()
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(3):
            for name, arm in arms.items():
                rates[name].append(arm(num_tokens))
        found = {name: statistics.median(values) for name, values in rates.items()}
        return {
            "requests": num_requests,
            "tokens_each": num_tokens,
            "top_k": top_k,
            "scored_tokens_per_step": statistics.mean(scored),
            **{f"tokens_per_s_{name}": rate for name, rate in found.items()},
            "speed_with_over_without": found["with"] / found["without"],
            "speed_with_over_hugging_face": found["with"] / found["hugging_face"],
        }

    default = LengthControl(equal_to=num_tokens).top_k
    first, *others = (measure(*case) for case in ((8, default), (1, default), (8, 4), (1, 4)))
    products = {n: time_products(engine.generator.base_model, n) for n in (1, 8, 16, 64, 120)}
    return {**first, "others": others, "products_ms_of_tokens": products}


@torch.inference_mode()
def measure_ragged() -> list[dict[str, Any]]:
    """Batches of unequal prefixes on SmolLM2 with the bundled value model: milliseconds of a plain
    step and of 14 candidates a row (up to 16 rows), rows of about one length read together, and all
    rows read as far as the longest."""
    from lenvm.cli._inputs import load_value_model
    from lenvm.model import attention
    from lenvm.model.bundled import bundled_model
    from lenvm.model.device import pick_dtype

    generator = load(str(bundled_model()), "cpu", pick_dtype("cpu")).backbone
    plain = RaggedDecoder(generator, max_tokens=48 * 1100, max_requests=48, max_candidates=1)
    value_model = load_value_model(None, device="cpu")
    scorer = CandidateScorer(value_model, max_tokens=16 * 1100, max_requests=16, max_candidates=16)
    cost, found = attention.GROUP_PAGES, []
    for name, lengths in RAGGED.items():
        ids = [str(i) for i in range(len(lengths))]
        wide = torch.stack([torch.randperm(scorer.vocab_size)[:14] for _ in ids])
        prompts = {r: list(range(100, 100 + n)) for r, n in zip(ids, lengths, strict=True)}
        row: dict[str, Any] = {"prefixes": name, "rows": len(ids)}
        calls = {"step_ms": (plain, torch.full((len(ids), 1), 5))}
        if len(ids) <= 16:
            calls["candidates_ms"] = (scorer.decoder, wide)
        for what, (decoder, candidates) in calls.items():
            decoder.add(prompts)
            for way, pages in (("", cost), ("_as_the_longest", 10**9)):
                attention.GROUP_PAGES = pages
                row[what + way] = time_ms(partial(decoder.peek, ids, candidates), "cpu", 2, 9)
            decoder.remove(ids)
        found.append(row)
        print(row, flush=True)
    attention.GROUP_PAGES = cost
    return found


@torch.inference_mode()
def time_products(backbone: Any, num_tokens: int) -> float:
    """All packed products of the layers alone, for so many tokens: what nothing can be faster
    than that runs them one after another."""
    from lenvm.model.packed_linear import PackedLinear

    packed = [PackedLinear([m]) for m in backbone.modules() if isinstance(m, nn.Linear)]
    dtype = next(backbone.parameters()).dtype
    inputs = {
        m.linears[0].in_features: torch.randn(num_tokens, m.linears[0].in_features).to(dtype)
        for m in packed
    }
    return time_ms(lambda: [m(inputs[m.linears[0].in_features]) for m in packed], "cpu", 2, 5)


def run_truth(name: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Real weights, prefixes to 8k tokens, and a step as wide as the headline's."""
    from scorer_truth import check_model

    model: Any
    if name == "bundled":
        from lenvm.cli._inputs import load_value_model

        model = load_value_model(None, device=arguments.device)
    elif "@" in name:
        dtype = getattr(torch, arguments.dtype)
        model = LengthValueModel.from_pretrained(name, dtype=dtype, device=arguments.device)
    else:
        model = load(name, arguments.device, getattr(torch, arguments.dtype))
        model.spread_z()
    cuda = arguments.device == "cuda"
    options: dict[str, Any] = {"kernels": arguments.kernels, "cuda_graphs": not arguments.no_graphs}
    scorer = CandidateScorer(
        model, max_tokens=65_536, max_requests=64, max_candidates=16, **options
    )
    wide = [5 + 17 * (i % 40) for i in range(64)]
    few = [8000 if cuda else 1500, 1, 3, 700 if cuda else 300]
    trained = name == "bundled" or "@" in name
    for prefixes, width in (few, 5), (wide if cuda else wide[:16], 8):
        found = check_model(scorer, prefixes, width, 20 if cuda else 12, read_text=trained)
        row = {
            "model": Path(name.partition("@")[0]).name,
            "dtype": arguments.dtype,
            "device": arguments.card,
        }
        result["model_checks"].append(found | row | {"commit": arguments.commit})
        print(result["model_checks"][-1], flush=True)
        write(result, arguments.out)


def run_tuner(
    shapes: list[str], point: dict[str, Any], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Records of `scorer_kernels.py`, in a process of its own: a kernel that breaks the GPU's
    context there costs its record, and not this run."""
    out = arguments.out.with_name("scorer_kernels.json")
    out.unlink(missing_ok=True)
    step = f"{point['batch']}x{point['candidates']}"
    command = [sys.executable, str(ROOT / "benchmarks" / "scorer_kernels.py"), "--out", str(out)]
    command += ["--prefix", str(point["prefix"]), "--shapes", *shapes, "--points", step]
    try:
        subprocess.run([*command, "--budget-s", "70"], check=True, timeout=90)
    except subprocess.SubprocessError as error:
        print(f"the tuner failed, plain kernels run: {error}", flush=True)
    found: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    return found


def set_cpu_defaults(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What two cores can do: the bundled SmolLM2-135M, 8 requests."""
    from lenvm.model.bundled import bundled_model

    for name, value in (("batches", [8]), ("candidates", [2, 8]), ("prefixes", [256])):
        if getattr(arguments, name) == parser.get_default(name):
            setattr(arguments, name, value)
    if not arguments.models and arguments.shapes is None:
        arguments.models = [str(bundled_model())]


def merge_earlier(result: dict[str, Any], path: Path) -> None:
    """Take over the rows of the file at `path`; what this run measures replaces them."""
    if not path.exists():
        return
    try:
        earlier = json.loads(path.read_text())
        said = {k: earlier[k] for k in ("device", "commit", "ceilings")}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--merge: {path} is no result of this script ({error!r})") from error
    earlier.pop("stopped_early", None)  # of that run
    if "check" in earlier:  # the name of an earlier format
        earlier["family_checks"] = earlier.pop("check")
    for name in ("points", "model_checks", "family_checks"):
        result[name] = [{**said, **row} for row in earlier.get(name, [])]
    for name, value in earlier.items():
        result.setdefault(name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="*", default=None, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--models", nargs="*", default=[], help="GGUF files or folders")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--candidates", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[1024, 256, 4096])
    parser.add_argument("--real-share", type=float, default=None, help="candidates / slots")
    parser.add_argument("--check", action="store_true", help="truth of every family first")
    parser.add_argument(
        "--truth",
        nargs="*",
        default=[],
        help="GGUF files, folders, FOLDER@BASE of a value model, or bundled",
    )
    parser.add_argument("--value", nargs="*", default=[], help="CPU: `generate` by these too")
    parser.add_argument("--generate", action="store_true", help="CPU: a run of `generate` alone")
    parser.add_argument("--no-guide", action="store_true", help="with --generate: score by itself")
    parser.add_argument("--headline", action="store_true", help="the headline's point alone")
    parser.add_argument("--tune", action="store_true", help="find the fastest kernels first")
    parser.add_argument("--merge", action="store_true", help="keep the file's other rows")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.real_share is not None and arguments.device != "cuda":
        parser.error("--real-share is about CUDA graphs: it needs a GPU")
    if arguments.out is None:
        name = "scorer_h200.json" if arguments.device == "cuda" else "scorer_cpu.json"
        arguments.out = ROOT / "benchmarks" / "results" / name
    deadline = time.monotonic() + arguments.budget_s
    arguments.card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    arguments.commit = arguments.commit or _commit()
    if arguments.generate:
        add_generate_run(arguments.out, arguments.commit, guide=not arguments.no_guide)
        return
    headline = dict(HEADLINE)
    if arguments.device == "cpu":
        set_cpu_defaults(parser, arguments)
        headline = {"batch": 8, "candidates": 8, "prefix": 256}
    if arguments.headline:
        arguments.batches, arguments.candidates = [headline["batch"]], [headline["candidates"]]
        arguments.prefixes = [headline["prefix"]]
        arguments.shapes = arguments.shapes or ["0.5b"]
    shapes = arguments.shapes
    if shapes is None:
        shapes = [] if arguments.models else ["0.5b", "1.5b"]
    result: dict[str, Any] = {
        "schema": "lenvm.benchmark.scorer/1",
        **describe(arguments),
        "ceilings": measure_ceilings(arguments.device),
        "headline_point": headline,
        "model_checks": [],
        "failures": [],
        "points": [],
    }
    print(json.dumps(result["ceilings"]), flush=True)
    if arguments.merge:
        merge_earlier(result, arguments.out)
    if arguments.tune:
        result["tuned"] = run_tuner(shapes, headline, arguments)
    if arguments.check:
        from scorer_truth import check_families

        result["family_checks"] = [
            record | {"device": arguments.card} for record in check_families(arguments.device)
        ]
        for record in result["family_checks"]:
            print(record, flush=True)
        write(result, arguments.out)
    if arguments.device == "cpu" and not shapes:
        result["generate"] = measure_generate()
        result["ragged"] = measure_ragged()
        result["generate_by"] = {Path(v).name: measure_generate(v) for v in arguments.value}
        print(json.dumps(result["generate"]), flush=True)
        write(result, arguments.out)
    for name in [*arguments.models, *shapes]:
        run_model(name, result, arguments, deadline)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if arguments.truth and arguments.tune:
        from scorer_truth import check_fused

        result["fused_checks"] = check_fused(
            arguments.device, 40, [("qwen2", False), ("qwen2", True)]
        )
        for record in result["fused_checks"]:
            print(record, flush=True)
    for name in arguments.truth:
        result["model_checks"] = [
            c for c in result["model_checks"] if c["model"] != Path(name).name
        ]
        run_truth(name, result, arguments)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    write(result, arguments.out)
    show(result)


if __name__ == "__main__":
    main()
