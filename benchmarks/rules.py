"""What the distribution head and its rule cost a guided step, against the scalar head's rules.

    python benchmarks/rules.py                                     # GPU, under a minute
    python benchmarks/rules.py --eager                             # its kernels launched one by one
    python benchmarks/rules.py --device cpu --dtype float32 --batch 8 --prefix 64 --steps 2

A step is all that guidance does for one token: candidates of the generator's logits, their values,
the rule, the draw, the commit, and the one host sync that an engine needs. The generator's own
forward is not in it, so the share of a whole step is smaller. Every arm steps requests of its own
over the same backbone (random weights of a shape), in turns within each round; ratios are of one
round's times, so that a clock which drifts moves both.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from lenvm.guidance.request import LengthControl  # noqa: E402
from lenvm.guidance.scorer import CandidateScorer  # noqa: E402
from lenvm.guidance.session import GuidanceSession, Guided  # noqa: E402
from lenvm.model.head import HeadName, build_head  # noqa: E402
from scorer import describe, load, synchronize  # noqa: E402

FAR = {"equal_to": 4096, "tolerance": 0.05}
ARMS: dict[str, tuple[HeadName, dict[str, Any]]] = {
    "scalar soft": ("scalar", {**FAR, "rule": "soft"}),
    "scalar hard": ("scalar", {**FAR, "rule": "hard"}),
    "distribution soft": ("distribution", {**FAR, "rule": "soft"}),
    "distribution conditional": ("distribution", {**FAR, "rule": "conditional"}),
    "distribution conditional focus": (
        "distribution",
        {**FAR, "rule": "conditional", "focus": 10.0},
    ),
}
BASE, OURS = ("scalar soft", "scalar hard"), "distribution conditional"


class Model(nn.Module):
    """A backbone with one of the heads, as `CandidateScorer` takes it."""

    def __init__(self, backbone: Any, head: HeadName) -> None:
        super().__init__()
        self.backbone, self.config = backbone, SimpleNamespace(gamma=0.997, head=head)
        torch.manual_seed(1)
        self.head = build_head(head, backbone.config.hidden_size).to(backbone.device)

    def encode_control(self, control: Any) -> list[int]:
        return []

    def belief(self, raw: torch.Tensor) -> Any:
        return self.head.belief(raw, self.config.gamma)


class Stepper:
    """One arm: its session, its requests, its logits."""

    def __init__(
        self, scorer: CandidateScorer, name: str, control: dict[str, Any], o: argparse.Namespace
    ) -> None:
        self.session = GuidanceSession(scorer, eos_token_ids=[0], graphs=not o.eager)
        self.ids = [f"{name} {i}" for i in range(o.batch)]
        generator = torch.Generator().manual_seed(0)
        shape = (o.batch, o.prefix)
        prompts = torch.randint(1, scorer.vocab_size, shape, generator=generator).tolist()
        guided = LengthControl.parse({**control, "top_k": o.candidates, "top_p": 1.0})
        self.session.add({r: Guided(p, guided) for r, p in zip(self.ids, prompts, strict=True)})
        logits = torch.randn(4, o.batch, scorer.vocab_size, generator=generator)
        self.logits = logits.to(o.device)
        self.num_steps = 0

    def step(self) -> None:
        found = self.session.step(self.ids, self.logits[self.num_steps % 4])
        drawn = torch.multinomial(found.log_probs.exp(), 1)
        tokens = found.ids.gather(-1, drawn).squeeze(-1)
        self.session.commit(self.ids, tokens)
        tokens.tolist()
        self.num_steps += 1


def time_arms(arms: dict[str, Stepper], o: argparse.Namespace) -> dict[str, list[float]]:
    """ms a step of every arm in every round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    end = time.monotonic() + o.budget_s
    for _ in range(o.rounds):
        for name, arm in arms.items():
            arm.step()  # what the arm before left in the caches is its own
            synchronize(o.device)
            start = time.perf_counter()
            for _ in range(o.steps):
                arm.step()
            synchronize(o.device)
            times[name].append((time.perf_counter() - start) / o.steps * 1e3)
        if time.monotonic() > end:
            break
    return times


def count_kernels(arm: Stepper) -> dict[str, float]:
    """Kernels and copies of one step on the GPU, those of its graph included, and their time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            arm.step()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "kernels_per_step": len(on_device) / 4,
        "kernel_ms_per_step": sum(e.time_range.elapsed_us() for e in on_device) / 4e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20, help="of an arm in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-s", type=float, default=40.0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs beside the scorer's")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    o = parser.parse_args()
    name = f"rules_{'h200' if o.device == 'cuda' else 'cpu'}{'_eager' if o.eager else ''}.json"
    out = o.out or ROOT / "benchmarks" / "results" / name

    backbone = load(o.shape, o.device, getattr(torch, o.dtype)).backbone
    room = o.prefix + (o.steps + 1) * o.rounds + 64
    scorers: dict[str, CandidateScorer] = {}
    for head in ("scalar", "distribution"):
        num = o.batch * sum(h == head for h, _ in ARMS.values())
        scorers[head] = CandidateScorer(
            Model(backbone, head),
            max_tokens=num * room,
            max_requests=num,
            max_candidates=o.candidates,
        )
    arms = {n: Stepper(scorers[head], n, control, o) for n, (head, control) in ARMS.items()}
    for arm in arms.values():
        for _ in range(4):  # a shape's graphs are recorded when it comes the third time
            arm.step()
    times = time_arms(arms, o)
    result: dict[str, Any] = {
        "schema": "lenvm.benchmark.rules/1",
        **describe(o),
        "shape": o.shape,
        "dtype": o.dtype,
        "batch": o.batch,
        "candidates": o.candidates,
        "prefix": o.prefix,
        "graphs": not o.eager,
        "num_rounds": len(times[OURS]),
        "steps_per_round": o.steps,
        "arms": [
            {
                "arm": name,
                "step_ms": statistics.median(times[name]),
                "fastest_ms": min(times[name]),
                "round_ms": times[name],
                **(count_kernels(arms[name]) if o.device == "cuda" else {}),
            }
            for name in arms
        ],
    }
    extra = {}
    for base in BASE:
        ratios = [a / b - 1 for a, b in zip(times[OURS], times[base], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        extra[base] = {"median": statistics.median(ratios), "quartiles": [low, high]}
    result["extra_time"] = extra
    result["headline"] = {
        f"extra_over_{k.replace(' ', '_')}": v["median"] for k, v in extra.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)
    for row in result["arms"]:
        print({k: v for k, v in row.items() if k != "round_ms"})
    print(json.dumps(result["extra_time"]))


if __name__ == "__main__":
    main()
