"""Figures of training: tokens/s of real tokens, MFU and peak memory of each way to train.

    python benchmarks/training.py --shapes 0.5b --model 0.5b=qwen2.5-coder-0.5b.gguf \\
        --tokens lab/tokens/coder05-heldout  # one GPU, 150 s; merges into training_h200.json
    python benchmarks/training.py --shapes 0.5b 1.5b smollm2  # random weights, made-up sequences
    python benchmarks/training.py --device cpu --shapes tiny --out /tmp/t.json  # a dry run

A call is one entry of the file's `runs`: its machine, its bf16 ceiling, its data and its points, of
which each names its card. Earlier runs stay. FLOPs are counted from the model (matrix products of
the layers, causal attention of each sequence alone, the head; no embedding, no recomputation, no
padding) and divided by the rate of a large bf16 matrix product measured in the same call. The
file is written after each point, and `--budget` seconds end the call early.

All ways start from the same weights and use the same optimizer (fused AdamW, fp32 weights and
states), bf16 autocast and size of an optimizer step. `padded` is the published way: random batches
of 8 padded to the longest, not compiled, Hugging Face's default attention (SDPA with its mask), the
vocabulary's logits computed and thrown away. `padded_lean` is the best that padding can do: no
logits, no mask (causality alone keeps the padding out, so SDPA takes its flash kernel). Every point
reads the same 8 sequences before it starts: `loss_of_8` shows that they compute the same.
"""

import argparse
import contextlib
import gc
import itertools
import json
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from lenvm.data.dataset import Sequences  # noqa: E402
from lenvm.data.packing import BatchPlan, PackedBatch, pack, pad  # noqa: E402
from lenvm.model.loading import find_layers  # noqa: E402
from lenvm.model.value_model import LengthValueModel  # noqa: E402
from lenvm.training.model import (  # noqa: E402
    PackedModel,
    add_adapter,
    choose_parameters,
    compile_layers,
)
from lenvm.training.objective import Objective, States  # noqa: E402
from training_inputs import (  # noqa: E402
    SHAPES,
    build_model,
    describe,
    load_sequences,
    make_sequences,
    sample,
)


@dataclass(frozen=True)
class Point:
    """One measurement."""

    name: str
    shape: str
    way: str = "packed"
    """packed, padded, padded_lean"""
    trainable: str = "full"
    compiled: bool = True
    shared: bool = False
    one_step_of: int | None = None
    """Time one optimizer step of so many sequences, instead of many small ones."""
    profile: bool = False


def list_points(shapes: list[str]) -> list[Point]:
    """In order of importance: a run that is cut has the headline."""
    if shapes == ["tiny"]:
        return [
            Point("packed_tiny", "tiny", compiled=False),
            Point("padded_tiny", "tiny", "padded", compiled=False),
            Point("padded_lean_tiny", "tiny", "padded_lean", compiled=False),
            Point("head_only_tiny", "tiny", trainable="head", compiled=False),
            Point("lora_tiny", "tiny", trainable="lora", compiled=False),
            Point("shared_prompts_tiny", "tiny", compiled=False, shared=True),
            Point("step_tiny", "tiny", one_step_of=64, compiled=False),
        ]
    points = [
        Point("packed_0.5b", "0.5b", profile=True),
        Point("padded_0.5b", "0.5b", "padded", compiled=False),
        Point("head_only_0.5b", "0.5b", trainable="head", compiled=False),
        Point("packed_eager_0.5b", "0.5b", compiled=False),
        Point("padded_lean_0.5b", "0.5b", "padded_lean", compiled=False),
        Point("step_1.5b", "1.5b", one_step_of=1024),
        Point("packed_smollm2", "smollm2"),
        Point("padded_smollm2", "smollm2", "padded", compiled=False),
        Point("head_only_smollm2", "smollm2", trainable="head", compiled=False),
        Point("lora_smollm2", "smollm2", trainable="lora"),
        Point("lora_0.5b", "0.5b", trainable="lora"),
        Point("shared_prompts_0.5b", "0.5b", shared=True),
    ]
    return [p for p in points if p.shape in shapes]


def count_flops(
    model: LengthValueModel, trainable: str, totals: np.ndarray[Any, Any]
) -> Callable[[PackedBatch], float]:
    """FLOPs of forward and backward of a batch's real tokens. totals: [S] tokens of each sequence.

    A product costs 1 forward, 1 for the gradient of its input, 1 for that of its weights.
    """
    layers = find_layers(model.backbone)
    frozen = trained = 0
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            size = module.weight.numel()
            frozen += size * (not module.weight.requires_grad)
            trained += size * module.weight.requires_grad
    head = sum(p.numel() for p in model.head.parameters() if p.ndim == 2)
    config = model.backbone.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    backward = trainable != "head"

    def flops(batch: PackedBatch) -> float:
        lengths = totals[batch.sequences.numpy()].astype(np.float64)
        pairs = float((lengths * (lengths + 1) / 2).sum())
        per_token = 2 * ((1 + backward) * frozen + 3 * trained)
        attention = (1 + 2 * backward) * 4 * width * len(layers) * pairs
        states = float(batch.lengths.sum() + len(batch.lengths))
        return per_token * batch.num_tokens + attention + 6 * head * states

    return flops


@dataclass
class Setting:
    """What a point runs with."""

    device: str
    batch_tokens: int
    step_tokens: int
    seconds: float
    models: dict[str, str]
    """Shape -> its weights."""
    real: Sequences | None
    """Sampled sequences; None: made-up ones."""
    num_sequences: int
    max_tokens: int

    def sequences(self, shape: str) -> Sequences:
        if self.real is not None:
            return self.real
        return make_sequences(SHAPES[shape]["vocab_size"], self.num_sequences, self.max_tokens)


class Run:
    """One point: model, optimizer, batches."""

    def __init__(self, point: Point, setting: Setting) -> None:
        self.point, self.setting = point, setting
        frozen = point.trainable in ("lora", "head") and setting.device == "cuda"
        path = setting.models.get(point.shape)
        model, logits = build_model(point.shape, setting.device, path=path, low=frozen)
        self.logits = logits if point.way == "padded" else None
        del logits
        choose_parameters(model, "head" if point.trainable == "head" else "full", 1)
        if point.trainable == "lora":
            add_adapter(model, 8, 16, 0.0)
            model.to(setting.device)
        self.model = PackedModel(model)
        if point.way == "padded":
            model.backbone.config._attn_implementation = "sdpa"  # Hugging Face's default
        if point.compiled:
            compile_layers(model.backbone)
        self.objective = Objective(censoring="one_sided")
        self.sequences = setting.sequences(point.shape)
        self.sequences.check_vocabulary(model.backbone.get_input_embeddings().num_embeddings)
        self.flops = count_flops(model, point.trainable, self.sequences.totals)
        self.live = [p for p in self.model.parameters() if p.requires_grad]
        fused = setting.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.live, lr=1e-5, betas=(0.9, 0.95), fused=fused)
        self.losses: list[Tensor] = []

    def steps(self) -> Iterator[Iterator[PackedBatch]]:
        """Optimizer steps, each an iterator of micro batches."""
        plan = BatchPlan(
            self.sequences,
            self.setting.batch_tokens,
            step_sequences=self.point.one_step_of,
            step_tokens=self.setting.step_tokens,
            grouped=self.point.shared,
            share_prompts=self.point.shared,
        )
        for epoch in itertools.count():
            for number in range(plan.num_steps(epoch)):
                rows = plan.step(epoch, number)
                if self.is_padded:
                    groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
                    yield (pad(self.sequences, g) for g in groups)
                else:
                    packs = plan.micro_batches(rows)[0]
                    shared = self.point.shared
                    yield (pack(self.sequences, p, share_prompts=shared) for p in packs)

    def step(self, batches: Iterator[PackedBatch], until: float | None = None) -> dict[str, float]:
        """One optimizer step (micro batches are left out after `until`); what it worked through."""
        done = {"tokens": 0.0, "flops": 0.0, "computed": 0.0, "sequences": 0.0, "micro": 0.0}
        for batch in batches:
            done["tokens"] += batch.num_tokens
            done["flops"] += self.flops(batch)
            done["computed"] += batch.input_ids.numel()
            done["sequences"] += len(batch.lengths)
            done["micro"] += 1
            self.backward(batch)
            if until is not None and time.perf_counter() > until:
                break
        torch.nn.utils.clip_grad_norm_(self.live, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return done

    @property
    def is_padded(self) -> bool:
        return self.point.way.startswith("padded")

    def loss_of(self, batch: PackedBatch) -> Tensor:
        """The mean over the batch's states."""
        count = int(batch.lengths.sum())
        totals = torch.from_numpy(self.sequences.totals[batch.sequences.numpy()])
        if self.setting.device == "cuda":
            batch, totals = batch.pin_memory().to("cuda"), totals.pin_memory().to("cuda")
        with autocast(self.setting.device):
            if self.point.way == "padded":
                raw = self._as_published(batch, totals)
            else:
                raw = self.model(batch)
        head = self.model.value_model.head
        return self.objective.sum(head, raw, States.of(batch), 0.997) / count

    def backward(self, batch: PackedBatch) -> None:
        loss = self.loss_of(batch)
        loss.backward()
        self.losses.append(loss.detach())

    def _as_published(self, batch: PackedBatch, totals: Tensor) -> Tensor:
        model = self.model.value_model
        at = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        hidden = model.backbone(
            input_ids=batch.input_ids,
            attention_mask=(at < totals.unsqueeze(-1)).long(),
            use_cache=False,
        ).last_hidden_state
        assert self.logits is not None
        logits = self.logits(hidden if hidden.is_cuda else hidden.bfloat16())
        del logits  # the published way computes and drops them
        raw: Tensor = model.head(hidden)
        return raw.flatten(0, 1)[batch.state_index]

    def loss_of_8(self) -> float:
        """Of the same 8 sequences in every way of training, before any step."""
        rows = np.linspace(0, len(self.sequences) - 1, 8).astype(np.int64)
        batch = pad(self.sequences, rows) if self.is_padded else pack(self.sequences, rows)
        return self.loss_of(batch).item()


def autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(point: Point, setting: Setting, ceiling: float) -> dict[str, Any]:
    """Run a point; its figures."""
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run = Run(point, setting)
    loss_of_8 = run.loss_of_8()
    steps = run.steps()
    warm = 1 if point.one_step_of else 2
    for _ in range(warm):
        batches = itertools.islice(next(steps), 8 if run.is_padded else 3)
        run.step(batches)
    synchronize(setting.device)
    setup = time.perf_counter() - started
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    total: dict[str, float] = {}
    begin = time.perf_counter()
    until = None if point.one_step_of else begin + setting.seconds
    num_steps = 0
    while num_steps == 0 or (until is not None and time.perf_counter() < until):
        for key, value in run.step(next(steps), until).items():
            total[key] = total.get(key, 0.0) + value
        num_steps += 1
        synchronize(setting.device)  # once an optimizer step, as training does
    seconds = time.perf_counter() - begin
    losses = torch.stack(run.losses).float().cpu()
    found = {
        "card": name_card(setting.device),
        "shape": point.shape,
        "weights": Path(setting.models.get(point.shape, "random")).name,
        "way": point.way,
        "trainable": point.trainable,
        "compiled": point.compiled,
        "share_prompts": point.shared,
        "tokens_per_s": total["tokens"] / seconds,
        "sequences_per_s": total["sequences"] / seconds,
        "tflops": total["flops"] / seconds / 1e12,
        "mfu": total["flops"] / seconds / ceiling,
        "tokens_per_micro_batch": total["tokens"] / total["micro"],
        "padding_share": max(0.0, 1 - total["tokens"] / total["computed"]),
        "optimizer_steps": num_steps,
        "sequences": total["sequences"],
        "seconds": seconds,
        "set_up_and_compile_s": setup,
        "loss_of_8": loss_of_8,
        "loss_first": losses[0].item(),
        "loss_last": losses[-1].item(),
    }
    if not bool(torch.isfinite(losses).all()):
        raise RuntimeError(f"{point.name}: a loss is not finite")
    if setting.device == "cuda":
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if point.profile and setting.device == "cuda":
        found["profile"] = profile(run, next(steps))
    return found


KINDS = {
    "attention": ("flash", "fmha", "attn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "optimizer": ("fusedadam", "adam", "multi_tensor", "foreach", "lpnorm"),
    "fused pointwise (triton)": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
    "embedding gradient": ("embedding", "sort", "radix"),
}


def profile(run: Run, batches: Iterator[PackedBatch]) -> dict[str, Any]:
    """Where the GPU's time goes in four micro batches and an optimizer step."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        begin = time.perf_counter()
        run.step(itertools.islice(batches, 4))
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    kernels: dict[str, list[float]] = {}
    for event in seen.events():
        if str(event.device_type).endswith("CUDA"):
            row = kernels.setdefault(event.name, [0.0, 0.0])
            row[0] += event.self_device_time_total / 1e3
            row[1] += 1
    busy = sum(ms for ms, _ in kernels.values())
    kinds: dict[str, float] = {}
    for name, (ms, _) in kernels.items():
        low = name.lower()
        kind = next((k for k, marks in KINDS.items() if any(m in low for m in marks)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + ms
    top = sorted(kernels.items(), key=lambda kv: -kv[1][0])[:25]
    return {
        "wall_ms": wall * 1e3,
        "gpu_busy_ms": busy,
        "kinds": {k: {"ms": ms, "share": ms / busy} for k, ms in sorted(kinds.items())},
        "kernels": [
            {"name": name[:120], "ms": ms, "calls": int(calls), "share": ms / busy}
            for name, (ms, calls) in top
        ],
    }


def measure_ceiling(device: str) -> float:
    """FLOP/s of a large matrix product: the best of several sizes (bf16 on a GPU)."""
    dtype, sizes = (torch.bfloat16, (8192, 16384)) if device == "cuda" else (torch.float32, (1024,))
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        synchronize(device)
        count = 20 if device == "cuda" else 3
        begin = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronize(device)
        best = max(best, count * 2 * size**3 / (time.perf_counter() - begin))
    return best


def name_card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"


def describe_machine(device: str, commit: str | None) -> dict[str, Any]:
    import transformers

    commit = (
        commit
        or subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    )
    return {
        "command": " ".join(sys.argv),
        "commit": commit,
        "card": name_card(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The issue's figures. The speed-up and the MFU beside it come from one call on one card: the
    last that measured both ways."""

    def last(*names: str) -> dict[str, Any]:
        whole = [r for r in runs if all("tokens_per_s" in r["points"].get(n, {}) for n in names)]
        return whole[-1] if whole else {"points": {}}

    run = last("packed_0.5b", "padded_0.5b")
    points = (run if run["points"] else last("packed_0.5b"))["points"]
    packed, padded = points.get("packed_0.5b"), points.get("padded_0.5b")
    big = last("step_1.5b")["points"].get("step_1.5b")
    both = packed and padded and "tokens_per_s" in padded
    return {
        "mfu_packed_0p5b": packed and packed["mfu"],
        "speedup_over_padded": packed["tokens_per_s"] / padded["tokens_per_s"] if both else None,
        "card": packed and packed["card"],
        "peak_memory_gb_1p5b": big and big["peak_memory_gb"],
        "card_1p5b": big and big["card"],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_h200.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b", "smollm2"])
    parser.add_argument("--points", nargs="+", help="only these")
    parser.add_argument("--model", action="append", default=[], metavar="SHAPE=PATH")
    parser.add_argument("--tokens", type=Path, help="LAB/tokens/NAME: real sampled sequences")
    parser.add_argument("--prompts", type=Path, help="shared/data: sample where --tokens is empty")
    parser.add_argument("--sample-s", type=float, default=15.0, help="begin no sample after this")
    parser.add_argument("--sequences", type=int, default=4096, help="made-up ones")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--step-tokens", type=int, default=262_144)
    parser.add_argument("--seconds", type=float, default=6.0, help="of measurement, each point")
    parser.add_argument("--budget", type=float, default=115.0, help="no new point after this")
    parser.add_argument("--commit", help="where git is missing")
    return parser.parse_args()


def build_setting(options: argparse.Namespace) -> Setting:
    models = dict(m.split("=", 1) for m in options.model)
    models = {shape: str(Path(path).expanduser()) for shape, path in models.items()}
    real = None
    if options.tokens is not None:
        folder = options.tokens.expanduser()
        if not (folder / "completions.jsonl").exists():
            if options.prompts is None or not models:
                raise SystemExit(f"{folder} holds no completions; give --prompts and --model")
            first = next(iter(models.values()))
            sample(folder, options.prompts, first, options.device, seconds=options.sample_s)
        real = load_sequences(folder, options.max_tokens)
    return Setting(
        options.device,
        options.batch_tokens,
        options.step_tokens,
        options.seconds,
        models,
        real,
        options.sequences,
        options.max_tokens,
    )


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=UserWarning)
    started = time.perf_counter()
    torch.set_float32_matmul_precision("highest")  # the head is in fp32
    setting = build_setting(options)
    ceiling = measure_ceiling(options.device)
    print(
        f"{time.perf_counter() - started:.0f} s; ceiling {ceiling / 1e12:.1f} TFLOP/s", flush=True
    )
    report: dict[str, Any] = {"schema": "lenvm.benchmark.training/2", "headline": {}, "runs": []}
    if options.out.exists():
        report = json.loads(options.out.read_text())
    points: dict[str, Any] = {}
    run = {
        "machine": describe_machine(options.device, options.commit),
        "ceiling_flops": ceiling,
        "data": {
            "source": str(options.tokens) if setting.real else "made up: log-normal lengths",
            **describe(setting.sequences(options.shapes[0])),
        },
        "setting": {k: str(v) for k, v in vars(options).items()},
        "points": points,
    }
    report["runs"].append(run)
    for point in list_points(options.shapes):
        if options.points and point.name not in options.points:
            continue
        if time.perf_counter() - started > options.budget:
            print(f"{point.name}: left out (budget)")
            continue
        try:
            found = measure(point, setting, ceiling)
            print(
                f"{point.name}: {found['tokens_per_s']:,.0f} tokens/s, MFU {found['mfu']:.1%}, "
                f"{found.get('peak_memory_gb', 0):.1f} GB, {found['seconds']:.1f} s "
                f"(+ {found['set_up_and_compile_s']:.0f} s), loss of 8 {found['loss_of_8']:.5f}",
                flush=True,
            )
        except Exception as error:  # a point that fails is a result
            traceback.print_exc()
            found = {"card": name_card(options.device), "error": f"{type(error).__name__}: {error}"}
            found["error"] = found["error"][:2000]
        points[point.name] = found
        report["headline"] = summarise(report["runs"])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        torch._dynamo.reset()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(report["headline"], indent=1))
    sys.exit(any("error" in p for p in points.values()))


if __name__ == "__main__":
    main()
