"""Figures of training: tokens/s of real tokens, MFU and peak memory of each way to train.

    python benchmarks/training.py --out benchmarks/results/training_h200.json  # GPU, 4 minutes
    python benchmarks/training.py --device cpu --shapes tiny --out /tmp/t.json  # a dry run

Models are random weights of a shape; sequences are synthetic, or a trajectory file's
(`--trajectories`). FLOPs are counted from the model (matrix products of the layers, causal
attention of each sequence alone, the head; no embedding, no recomputation, no padding) and divided
by the rate of a large bf16 matrix product measured in the same run. The file is written after each
point; points that it holds already are not run again, and `--budget` seconds end the run early.

The padded way is the published one: random batches of 8 padded to the longest, eager, the
vocabulary's logits computed and thrown away.
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
sys.path.insert(0, str(ROOT / "src"))

from lenvm.data.dataset import Sequences, TokenStore  # noqa: E402
from lenvm.data.packing import BatchPlan, PackedBatch, pack, pad  # noqa: E402
from lenvm.data.trajectory import Trajectory  # noqa: E402
from lenvm.model.value_model import LengthValueModel, LenVMConfig  # noqa: E402
from lenvm.training.model import (  # noqa: E402
    PackedModel,
    add_adapter,
    choose_parameters,
    compile_layers,
    find_layers,
)
from lenvm.training.objective import Objective, States  # noqa: E402

QWEN = {"family": "qwen2", "vocab_size": 151_936, "num_key_value_heads": 2, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "smollm2": {
        "family": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "family": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class Point:
    """One measurement."""

    name: str
    shape: str
    way: str = "packed"
    """packed, padded"""
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
            Point("head_only_tiny", "tiny", trainable="head", compiled=False),
            Point("lora_tiny", "tiny", trainable="lora", compiled=False),
            Point("shared_prompts_tiny", "tiny", compiled=False, shared=True),
            Point("step_tiny", "tiny", one_step_of=64, compiled=False),
        ]
    points = [
        Point("packed_0.5b", "0.5b", profile=True),
        Point("padded_0.5b", "0.5b", "padded", compiled=False),
        Point("step_1.5b", "1.5b", one_step_of=1024),
        Point("lora_smollm2", "smollm2", trainable="lora"),
        Point("packed_smollm2", "smollm2"),
        Point("packed_eager_0.5b", "0.5b", compiled=False),
        Point("head_only_0.5b", "0.5b", trainable="head", compiled=False),
        Point("padded_smollm2", "smollm2", "padded", compiled=False),
        Point("lora_0.5b", "0.5b", trainable="lora"),
        Point("lora_eager_smollm2", "smollm2", trainable="lora", compiled=False),
        Point("shared_prompts_0.5b", "0.5b", shared=True),
    ]
    return [p for p in points if p.shape in shapes]


def build_sequences(path: Path | None, vocab_size: int, num: int, max_tokens: int) -> Sequences:
    """The file's sequences, or synthetic ones."""
    if path is not None:
        return Sequences.select([TokenStore.load(path)], None, max_tokens=max_tokens)
    random = np.random.default_rng(0)
    rows = []
    for prompt in range(num // 4):
        prompt_length = int(np.clip(random.lognormal(5.0, 0.6), 20, max_tokens // 3))
        ids = random.integers(3, vocab_size, prompt_length).tolist()
        for sample in range(4):
            length = int(np.clip(random.lognormal(5.9, 0.8), 4, max_tokens - prompt_length))
            rows.append(
                Trajectory.model_validate(
                    {
                        "schema": "lenvm.trajectory/1",
                        "id": f"{prompt:016x}-{sample}",
                        "prompt_hash": f"{prompt:016x}",
                        "sample_index": sample,
                        "prompt_text": "",
                        "prompt_token_ids": ids,
                        "completion_token_ids": random.integers(3, vocab_size, length).tolist(),
                        "completion_text": "",
                        "finish_reason": "stop",
                        "model": "synthetic",
                    }
                )
            )
    return Sequences.from_trajectories(rows, max_tokens=max_tokens)


def build_model(shape: str, device: str, *, low: bool) -> tuple[LengthValueModel, nn.Module]:
    """(value model, output matrix of the vocabulary); fp32, or bf16 backbone where `low`."""
    from transformers import AutoModel
    from transformers.models.llama import LlamaConfig
    from transformers.models.qwen2 import Qwen2Config

    values = dict(SHAPES[shape])
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[values.pop("family")]
    theta = values.pop("rope_theta", 1e4)
    config = kind(
        **values,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    torch.manual_seed(0)
    with torch.device(device):
        backbone = AutoModel.from_config(config, dtype=torch.bfloat16 if low else torch.float32)
    model = LengthValueModel.build(backbone, LenVMConfig(gamma=0.997, head="scalar"), device=device)
    logits = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
    logits.weight = backbone.embed_tokens.weight  # tied, as in all three
    return model.train(), logits


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
    trajectories: Path | None
    num_sequences: int
    max_tokens: int


class Run:
    """One point: model, optimizer, batches."""

    def __init__(self, point: Point, setting: Setting) -> None:
        self.point, self.setting = point, setting
        frozen = point.trainable in ("lora", "head") and setting.device == "cuda"
        model, self.logits = build_model(point.shape, setting.device, low=frozen)
        choose_parameters(model, "head" if point.trainable == "head" else "full", 1)
        if point.trainable == "lora":
            add_adapter(model, 8, 16, 0.0)
            model.to(setting.device)
        self.model = PackedModel(model)
        if point.compiled:
            compile_layers(model.backbone)
        self.objective = Objective()
        self.sequences = build_sequences(
            setting.trajectories,
            SHAPES[point.shape]["vocab_size"],
            setting.num_sequences,
            setting.max_tokens,
        )
        self.sequences.check_vocabulary(SHAPES[point.shape]["vocab_size"])
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
                if self.point.way == "padded":
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

    def backward(self, batch: PackedBatch) -> None:
        count = int(batch.lengths.sum())
        device = self.setting.device
        if device == "cuda":
            batch = batch.pin_memory().to(device)
        with autocast(device):
            raw = self._with_logits(batch) if self.point.way == "padded" else self.model(batch)
        loss = self.objective.sum(self.model.value_model.head, raw, States.of(batch), 0.997)
        loss = loss / count
        loss.backward()
        self.losses.append(loss.detach())

    def _with_logits(self, batch: PackedBatch) -> Tensor:
        model = self.model.value_model
        hidden = model.backbone(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        logits = self.logits(hidden)
        del logits  # the published way computes and drops them
        raw: Tensor = model.head(hidden)
        return raw.flatten(0, 1)[batch.state_index]


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
    steps = run.steps()
    warm = 1 if point.one_step_of else 2
    for _ in range(warm):
        batches = itertools.islice(next(steps), 3 if point.way == "packed" else 8)
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
        "shape": point.shape,
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


def describe_machine(device: str) -> dict[str, Any]:
    import transformers

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "command": " ".join(sys.argv),
        "commit": commit,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def summarise(points: dict[str, Any]) -> dict[str, Any]:
    """The issue's figures, of the points that are there."""

    def get(name: str, field: str) -> Any:
        return points.get(name, {}).get(field)

    packed, padded = get("packed_0.5b", "tokens_per_s"), get("padded_0.5b", "tokens_per_s")
    return {
        "mfu_packed_0p5b": get("packed_0.5b", "mfu"),
        "speedup_over_padded": packed / padded if packed and padded else None,
        "peak_memory_gb_1p5b": get("step_1.5b", "peak_memory_gb"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_h200.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b", "smollm2"])
    parser.add_argument("--points", nargs="+", help="only these")
    parser.add_argument("--trajectories", type=Path, help="a file; its tokenizer must fit")
    parser.add_argument("--sequences", type=int, default=4096, help="synthetic ones")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--step-tokens", type=int, default=262_144)
    parser.add_argument("--seconds", type=float, default=6.0, help="of measurement, each point")
    parser.add_argument("--budget", type=float, default=225.0, help="no new point after this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    started = time.perf_counter()
    torch.set_float32_matmul_precision("highest")  # the head is in fp32
    report: dict[str, Any] = {"schema": "lenvm.benchmark.training/1", "points": {}}
    if options.out.exists():
        report = json.loads(options.out.read_text())
    report["machine"] = describe_machine(options.device)
    ceiling = report["ceiling_flops"] = measure_ceiling(options.device)
    print(f"ceiling {ceiling / 1e12:.1f} TFLOP/s", flush=True)
    setting = Setting(
        options.device,
        options.batch_tokens,
        options.step_tokens,
        options.seconds,
        options.trajectories,
        options.sequences,
        options.max_tokens,
    )
    report["setting"] = {k: str(v) for k, v in vars(options).items()}
    failed = False
    for point in list_points(options.shapes):
        wanted = point.name in options.points if options.points else True
        if not wanted or "tokens_per_s" in report["points"].get(point.name, {}):
            continue
        if time.perf_counter() - started > options.budget:
            print(f"{point.name}: left for the next run (budget)")
            continue
        try:
            found = measure(point, setting, ceiling)
            print(
                f"{point.name}: {found['tokens_per_s']:,.0f} tokens/s, MFU {found['mfu']:.1%}, "
                f"{found.get('peak_memory_gb', 0):.1f} GB, {found['seconds']:.1f} s "
                f"(+ {found['set_up_and_compile_s']:.0f} s)",
                flush=True,
            )
        except Exception as error:  # a point that fails is a result
            failed = True
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        report["points"][point.name] = found
        report["headline"] = summarise(report["points"])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        del found
        torch._dynamo.reset()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(report.get("headline"), indent=2))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
