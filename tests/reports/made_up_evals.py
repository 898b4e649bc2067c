"""Result folders of every evaluation: made-up answers and predictions, written by the real code."""

import math
import random
from pathlib import Path

from lenvm.data.trajectory import Trajectory
from lenvm.evals.arms import Arm
from lenvm.evals.generator import GenerationResponse
from lenvm.evals.length_tokens.run import LengthTokensConfig
from lenvm.evals.length_tokens.run import summarise as summarise_tokens
from lenvm.evals.lifebench.run import LifebenchConfig, run_lifebench
from lenvm.evals.prediction.predictors import LEVELS
from lenvm.evals.prediction.run import PredictionConfig, run_prediction
from lenvm.evals.scaling.grid import Grid
from lenvm.evals.scaling.run import summarise as summarise_grid
from lenvm.evals.tradeoff.run import TradeoffConfig, run_tradeoff
from lenvm.files import JsonlWriter, write_json
from reports.made_up import PROMPTS, TEXTS, make_trace, split_tokens, write_jsonl

GAMMA = 0.997
TYPICAL = {"code": 260, "instructions": 320, "math": 210}


# -- length-prediction ---------------------------------------------------------------------------


class Forecaster:
    """Knows each prompt's typical length up to an error of `blur`, and how far answers spread."""

    def __init__(self, typical, name="lenvm-1.5b", blur=0.16, head="distribution"):
        self.typical, self.name, self.blur, self.head, self.gamma = typical, name, blur, head, GAMMA

    def read(self, sequences, positions, images=None):
        return [
            [self.believe(ids, place - 2) for place in places]
            for ids, places in zip(sequences, positions, strict=True)
        ]

    def believe(self, ids, step):
        rng = random.Random(f"{ids[1]}{self.name}")
        whole = self.typical[ids[1]] * math.exp(rng.gauss(0.05, self.blur))
        left = max(2.0, (whole - step) * math.exp(rng.gauss(0, 0.1)))
        if self.head == "scalar":
            return {"value": GAMMA**left - 1, "length": left}
        quantiles = {str(q): left * math.exp(0.3 * _normal(q)) for q in LEVELS}
        return {
            "value": GAMMA**left - 1,
            "length": left,
            "mean": 1.04 * left,
            "quantiles": quantiles,
        }


def _normal(q: float) -> float:
    """Quantile of the standard normal, near enough (Tukey's lambda)."""
    return (q**0.135 - (1 - q) ** 0.135) / 0.1975


def write_prediction(folder: Path, *, name: str = "lenvm-1.5b", num: int = 90, **about) -> Path:
    rng, rows, typical = random.Random(3), [], {}
    for prompt in range(num):
        domain = list(TYPICAL)[prompt % 3]
        typical[1000 + prompt] = TYPICAL[domain] * math.exp(rng.gauss(0, 0.5))
        for sample in range(4):
            length = max(8, round(typical[1000 + prompt] * math.exp(rng.gauss(0, 0.32))))
            rows.append(
                Trajectory(
                    id=f"p{prompt}-{sample}",
                    prompt_hash=f"p{prompt}",
                    sample_index=sample,
                    domain=domain,
                    split="test",
                    messages=[{"role": "user", "content": f"Question {prompt}: {PROMPTS[domain]}"}],
                    prompt_token_ids=[4, 1000 + prompt, 5],
                    completion_token_ids=[7] * length,
                    completion_text="x",
                    finish_reason="stop" if rng.random() > 0.03 else "length",
                    model="m",
                )
            )
    folder.mkdir(parents=True, exist_ok=True)
    with JsonlWriter(folder / "trajectories.jsonl") as writer:
        for row in rows:
            writer.write(row.to_json())
    config = PredictionConfig((folder / "trajectories.jsonl",))
    run_prediction(config, Forecaster(typical, name, **about), folder)
    return folder


# -- answers: lifebench and trade-off ------------------------------------------------------------


class Writer:
    """A `Generator` that answers by a rule and takes its time."""

    model, max_length = "qwen2.5-3b-instruct", 16_384

    def __init__(self, rule, missing=()):
        self.rule, self.missing = rule, missing

    def lacks(self, feature):
        return f"the server has no {feature}" if feature in self.missing else None

    def count_tokens(self, text):
        return len(text.split())

    def generate(self, requests, on_response):
        for request in requests:
            on_response(self.rule(request))


SKILL = {
    "prompt": (0.9, 0.55, -0.83, 9.0),
    "countdown": (-0.25, 0.5, -1.1, 9.1),
    "eos_decay": (-0.2, 0.35, -0.95, 9.3),
    "hard": (0.02, 0.16, -3.6, 14.5),
    "soft": (0.01, 0.1, -1.22, 14.2),
    "conditional": (0.0, 0.07, -0.97, 14.4),
}
"""Arm: bias and spread of the log length, mean log-probability, ms per token."""
WORDS = split_tokens(" ".join(TEXTS.values()))


def answer_lifebench(request):
    kind = request.id.split("/")[0].partition(":")[0]
    target = int(request.id.split("/")[2].split("-")[-1])
    rng = random.Random(request.id)
    if kind == "eos_decay" and rng.random() < 0.05:
        return GenerationResponse(request.id, error="HTTP 500: told to fail")
    cut = kind == "truncate"
    bias, spread, log_prob, pace = SKILL.get(kind, SKILL["prompt"])
    goal = target if not cut else 10_000
    wish = 260 * math.exp(rng.gauss(0, 0.3)) if kind in ("prompt", "truncate") else goal
    if kind in ("prompt", "truncate"):
        bias, wish = 0.0, wish**0.6 * target**0.4
    num = max(2, round(wish * math.exp(rng.gauss(bias, spread))))
    limit = request.max_tokens
    finish = "stop" if num <= limit else "length"
    num = min(num, limit)
    text = " ".join(rng.choice(WORDS).strip() or "and" for _ in range(num))
    return GenerationResponse(
        request.id,
        text + ("." if finish == "stop" and rng.random() > 0.1 else ""),
        num,
        40,
        finish,
        rng.gauss(log_prob, 0.12),
        num * pace * rng.uniform(0.9, 1.1) / 1000,
    )


def write_lifebench(folder: Path, *, missing=(), arms: str = "", num: int = 8, **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.jsonl"
    kinds = ["qa", "create"]
    write_jsonl(
        file,
        [
            {
                "id": i,
                "category": kinds[i % 2],
                "type": f"Type {i % 4}",
                "lang": "en" if i % 4 else "cn",
                "task": "Tell me. The answer is {word_count_type} {word_count} words."
                if i % 4
                else "告诉我。答案{word_count_type}{word_count}个字。",
                "raw_data": "",
            }
            for i in range(num)
        ],
    )
    names = arms or "prompt truncate countdown eos_decay:1.01 hard soft:100 conditional:1"
    values = {
        "targets": (64, 128, 256, 512),
        "constraints": ("equal_to", "at_most", "at_least"),
        **fields,
    }
    config = LifebenchConfig(
        file=file,
        arms=tuple(Arm.parse(n, [n.partition(":")[0]]) for n in names.split()),
        **values,
    )
    run_lifebench(config, Writer(answer_lifebench, missing), folder)
    return folder


def answer_sum(request):
    """Right answers need their tokens; tilts save some, budgets cut them off."""
    arm, item, _ = request.id.removesuffix("/forced").split("/")
    kind, _, number = arm.partition(":")
    rng = random.Random(request.id)
    scale = float(number or 0)
    need = 300 * math.exp(rng.gauss(0, 0.2))
    skill = 0.74
    if kind == "tilt":
        need, skill = need * math.exp(-scale / 45), 0.74 - 0.0045 * scale
    if kind == "concise":
        need, skill = 0.7 * need, 0.66
    if request.answer_prefix:
        return GenerationResponse(request.id, f"{2 * int(item) if rng.random() < 0.3 else 0}}}", 6)
    if need > request.max_tokens:
        text = "Let me think about this step by step"
        return GenerationResponse(
            request.id, text, request.max_tokens, 30, "length", -0.5, 0.01 * request.max_tokens
        )
    said = 2 * int(item) if rng.random() < skill else 0
    return GenerationResponse(
        request.id,
        f"We add the two. The answer is \\boxed{{{said}}}.",
        round(need),
        30,
        "stop",
        -0.5 - 0.008 * (scale if kind == "tilt" else 0),
        need * (0.014 if kind == "tilt" else 0.009),
    )


def write_tradeoff(folder: Path, *, num: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(num)]
    write_jsonl(folder / "gsm8k.jsonl", rows)
    names = (
        "prompt concise tilt:5 tilt:12.5 tilt:20 tilt:40 budget:150 budget:220 budget:300 "
        "budget_answer:150 budget_answer:220 budget_answer:300"
    )
    config = TradeoffConfig(
        source=str(folder / "gsm8k.jsonl"),
        arms=tuple(Arm.parse(n, [n.partition(":")[0]]) for n in names.split()),
        num_samples=4,
    )
    run_tradeoff(config, Writer(answer_sum), folder)
    return folder


# -- length tokens, scaling, traces --------------------------------------------------------------


LEANING = {"wait": 0.09, "here": 0.04, "1": 0.03, "\n\n": 0.05, "first": 0.03, "let": 0.06}
LEANING |= {"therefore": -0.08, "warm": -0.06, "**": -0.04, "return": -0.03, "finally": -0.05}
SAYINGS = (
    *TEXTS.values(),
    "First, let me think. Wait, that is not it. Finally, the sum is 12. Therefore, we are done.",
    "Here is what <b>you</b> need:\n\n1. Let it be.\n\nWait. مرحبا بكم </script> Therefore: 42.",
)


def write_length_tokens(folder: Path, *, num: int = 120) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng, records = random.Random(5), {}
    for i in range(num):
        tokens = [*split_tokens(SAYINGS[i % len(SAYINGS)]), "<|im_end|>"]
        gains = [LEANING.get(t.strip().lower() or t, 0.0) + rng.gauss(0, 0.012) for t in tokens]
        records[f"t{i}"] = {
            "schema": "lenvm.eval.length_tokens/1",
            "id": f"t{i}",
            "domain": "math",
            "token_ids": [*range(1, len(tokens)), 0],
            "tokens": tokens,
            "gains": gains,
        }
    write_jsonl(folder / "records.jsonl", records.values())
    manifest = {
        "files": {},
        "split": "test",
        "limit": None,
        "model": "lenvm-1.5b",
        "gamma": GAMMA,
        "head": "scalar",
        "special_ids": [0],
    }
    summarise_tokens(folder, records, manifest, LengthTokensConfig((), min_count=5))
    return folder


def write_scaling(folder: Path, *, design: str = "product") -> Path:
    folder.mkdir(parents=True, exist_ok=True)

    def axis(name, *values):
        return [{"label": v, name: v} for v in values]

    axes = {
        "model": [{"label": m, "backbone": m} for m in ("0.5B", "1.5B", "7B")],
        "num_prompts": axis("num_prompts", 500, 2000, 8000, 32000),
        "completions": axis("completions", 1, 4, 16),
        "seed": axis("seed", 0, 1, 2),
    }
    if design == "ablation":
        axes = {
            "gamma": axis("gamma", "auto", 0.99, 0.9995),
            "target": axis("target", "return", "log_length", "length"),
            "precision": axis("precision", "bf16", "fp32"),
            "seed": axis("seed", 0, 1, 2),
        }
    grid = Grid({"data": ["t.jsonl"]}, axes, design)
    records = []
    for cell in grid.cells():
        rng = random.Random(cell.id)
        a = cell.axes
        effort = math.log2(a.get("num_prompts", 2000)) + math.log2(a.get("completions", 4))
        size = {"0.5B": 0, "1.5B": 1, "7B": 2}[a.get("model", "0.5B")]
        penalty = {"log_length": 0.015, "length": 0.06, 0.99: 0.02, 0.9995: 0.01}
        worse = sum(penalty.get(a.get(n), 0) for n in ("target", "gamma"))
        mre = 0.42 - 0.013 * effort - 0.03 * size + worse + rng.gauss(0, 0.004)
        late = {0.99: -0.03, 0.9995: 0.05}.get(a.get("gamma"), 0.0)
        metrics = {"val_loss": 0.05 * mre, "mre": mre, "median_re": 0.8 * mre}
        metrics |= {f"mre_at_{at:g}": mre + at * (0.4 + 2 * late) for at in (0, 0.25, 0.5, 0.75)}
        failed = a.get("precision") == "fp32" and a.get("seed") == 2
        records.append(
            {
                "id": cell.id,
                "axes": dict(a),
                "metrics": {} if failed else metrics,
                "error": "out of memory" if failed else None,
            }
        )
    write_json(folder / "records.jsonl.manifest.json", {"kind": "eval.scaling"})
    summarise_grid(folder, records, grid, {"base": {}, "axes": axes, "design": design})
    return folder


def write_traces(path: Path) -> Path:
    """Three completions, one of them read by two models; one cut off."""
    rows = [make_trace(domain, model="lenvm-1.5b") for domain in PROMPTS]
    rows.insert(1, {**rows[0], **_read_again(rows[0])})
    rows.append(make_trace("math", seed=4, cut=True, model="lenvm-1.5b", control={"tilt": -10.0}))
    write_jsonl(path, rows)
    return path


def _read_again(row: dict) -> dict:
    predicted = [1.25 * p for p in row["remaining_predicted"]]
    values = [GAMMA**p - 1 for p in predicted]
    return {
        "model": "lenvm-0.5b",
        "remaining_predicted": predicted,
        "values": values,
        "gamma": GAMMA,
        "remaining_low": None,
        "remaining_high": None,
    }


WRITERS = {
    "prediction": write_prediction,
    "lifebench": write_lifebench,
    "gsm8k": write_tradeoff,
    "tokens": write_length_tokens,
    "scaling": write_scaling,
}


def write_everything(root: Path) -> list[Path]:
    """A folder of every kind, an ablation and a trace file too."""
    folders = [write(root / name) for name, write in WRITERS.items()]
    return [
        *folders,
        write_scaling(root / "ablation", design="ablation"),
        write_traces(root / "traces.jsonl"),
    ]
