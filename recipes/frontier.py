"""Recipe: a value model for one generator on one GPU, from prompts to the control frontier.

    python recipes/frontier.py --data ../shared/data --out runs/frontier --generator smollm2

Samples, trains (distribution and scalar heads, LoRA and full), measures prediction on held-out
prompts, and Equal-To control on LIFEBench items by every rule, with the text's quality beside it.
Writes `results.json` after every point. Without `--all-licences` only prompts are used whose
licence lets the checkpoint ship (shared/data/README.md).
"""

import argparse
import json
import os
import platform
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from lenvm import __version__
from lenvm.data.prompts import Prompt, load_bundled_prompts
from lenvm.data.trajectory import read_trajectories
from lenvm.engines.rollout import in_order, rollout
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Completion, Request, TransformersEngine
from lenvm.evals.lifebench.metrics import length_score
from lenvm.evals.quality import measure_text
from lenvm.files import read_jsonl, write_json
from lenvm.guidance.request import LengthControl
from lenvm.model.head import DistributionBelief
from lenvm.model.tokenization import encode_prompt
from lenvm.model.value_model import LengthValueModel
from lenvm.returns import value_to_length
from lenvm.training.config import TrainingConfig
from lenvm.training.metrics import constant_length, prompt_errors, summarise
from lenvm.training.trainer import train

MODELS: dict[str, dict[str, Any]] = {
    "lora-distribution": {"head": "distribution", "trainable": "lora"},
    "lora-scalar": {"head": "scalar", "trainable": "lora"},
    "full-distribution": {"head": "distribution", "trainable": "full"},
    "full-scalar": {"head": "scalar", "trainable": "full"},
}
ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "hard": {"rule": "hard"},
    "soft 30": {"rule": "soft", "strength": 30},
    "soft 100": {"rule": "soft", "strength": 100},
    "soft 300": {"rule": "soft", "strength": 300},
    "conditional": {"rule": "conditional"},
    "conditional 5%": {"rule": "conditional", "tolerance": 0.05},
    "conditional 5% not strict": {"rule": "conditional", "tolerance": 0.05, "strict": False},
    "conditional 5% evidence 0.5": {"rule": "conditional", "tolerance": 0.05, "evidence": 0.5},
    "conditional 5% evidence 2": {"rule": "conditional", "tolerance": 0.05, "evidence": 2.0},
    "conditional 5% no horizon": {"rule": "conditional", "tolerance": 0.05, "horizon": None},
    "conditional 10%": {"rule": "conditional", "tolerance": 0.1},
}
DISTRIBUTION_ONLY = "conditional"
NATURAL_LOG_PROB = -4.6
"""An end is natural where the generator itself gave EOS at least 1% there."""


def read(data: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(data / name)]


def instruction(row: dict[str, Any]) -> str:
    text = row["instances"][0]["input"].strip()
    return f"{row['instruction']}\n\n{text}" if text else str(row["instruction"])


def load_prompts(data: Path, all_licences: bool) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts; held-out files are others than the training ones."""
    mbpp = read(data, "mbpp/mbpp.jsonl")
    train_texts = {
        "math": [r["question"] for r in read(data, "gsm8k/train.jsonl")[:1500]]
        + [r["problem"] for r in read(data, "math/train.jsonl")[:800]],
        "code": [r["text"] for r in mbpp if r["task_id"] >= 601],
        "instructions": [
            instruction(r)
            for f in ("seed_tasks", "user_oriented_instructions")
            for r in read(data, f"self_instruct/{f}.jsonl")
        ]
        + [r["prompt"] for r in read(data, "arena_hard/question_v2.0.jsonl")]
        + [r["prompt"] for r in read(data, "wildchat/meter_train_filtered.jsonl")],
    }
    if all_licences:
        leetcode = json.loads((data / "leetcode/leetcode_train.json").read_text(encoding="utf-8"))
        alpaca = json.loads((data / "alpaca/alpaca_en_demo.json").read_text(encoding="utf-8"))
        train_texts["code"] += [r["problem"] for r in leetcode]
        train_texts["instructions"] += [
            f"{r['instruction']}\n\n{r['input']}".strip() for r in alpaca
        ] + [r["prompt"] for r in read(data, "dolly/dolly.jsonl")]
    held_texts = {
        "math": [r["question"] for r in read(data, "gsm8k/test_first660.jsonl")[:50]]
        + [r["problem"] for r in read(data, "math/math500_first250.jsonl")[:30]],
        "code": [r["text"] for r in mbpp if 511 <= r["task_id"] <= 590],
        "instructions": [r["prompt"] for r in read(data, "ifeval/input_data.jsonl")[:40]]
        + [r["prompt"] for r in read(data, "wildchat/meter_validation_filtered.jsonl")[:40]],
    }
    sides = []
    for texts, split in ((train_texts, "train"), (held_texts, "test")):
        found = {
            p.prompt_hash: p
            for domain, rows in texts.items()
            for p in (
                Prompt.from_text(t, domain=domain, split=split)  # type: ignore[arg-type]
                for t in rows
                if 0 < len(t) < 2500
            )
        }
        sides.append(found)
    demo = {p.prompt_hash for p in load_bundled_prompts() if p.split != "train"}
    training = [p for h, p in sides[0].items() if h not in sides[1] and h not in demo]
    random.Random(0).shuffle(training)
    # a tenth of the training prompts is for validation
    training = [
        p if i % 10 else Prompt(p.messages, None, p.domain, "validation")
        for i, p in enumerate(training)
    ]
    return training, list(sides[1].values())


def sample(a: argparse.Namespace, results: dict[str, Any]) -> None:
    engine = TransformersEngine.load(
        a.generator,
        dtype=torch.bfloat16 if a.device == "cuda" else torch.float32,
        device=a.device,
        max_requests=a.batch,
        max_tokens=a.batch * (a.max_tokens + 200),
    )
    training, heldout = load_prompts(a.data, a.all_licences)
    if a.tiny:
        training, heldout = training[:12], heldout[::40]
    sampling = SamplingParams(top_k=a.top_k, top_p=a.top_p, max_tokens=a.max_tokens, seed=1)
    for name, prompts, n, limit_s in (
        ("heldout", heldout, a.heldout_n, 1e9),
        ("train", training, a.n, a.sample_s),
    ):
        start, tokens = time.time(), 0

        def count(completion: Completion) -> None:
            nonlocal tokens
            tokens += len(completion.token_ids)

        rollout(
            engine,
            prompts,
            a.out / f"{name}.jsonl",
            n=n,
            sampling=sampling,
            model=a.name,
            on_completion=count,
            submit_for_s=limit_s,
        )
        rows = list(read_trajectories(a.out / f"{name}.jsonl"))
        results[f"sampling_{name}"] = {
            "num_prompts": len({t.prompt_hash for t in rows}),
            "num_trajectories": len(rows),
            "num_tokens": sum(t.length for t in rows),
            "num_truncated": sum(not t.is_complete for t in rows),
            "seconds": time.time() - start,
            "tokens_per_s": tokens / (time.time() - start),
        }
        print(name, results[f"sampling_{name}"], flush=True)


def evaluate_prediction(a: argparse.Namespace, model: LengthValueModel) -> dict[str, Any]:
    """MRE at the prompt boundary, coverage of the 80% interval, error during decoding."""
    groups = defaultdict(list)
    for t in read_trajectories(a.out / "heldout.jsonl"):
        groups[t.prompt_hash].append(t)
    # a completion that was cut off counts as long as it was cut; predictions are capped alike
    lengths = {p: [t.length for t in rows] for p, rows in groups.items()}
    model.head.to(a.device)
    raws = model.read([rows[0].prompt_token_ids for rows in groups.values()], batch_tokens=32768)
    belief = model.belief(torch.stack([r[-1] for r in raws]).cpu())
    gamma = model.config.gamma
    expected = value_to_length(belief.value(), gamma).clamp(max=a.max_tokens).tolist()
    training = defaultdict(list)
    for t in read_trajectories(a.out / "train.jsonl"):
        training[t.prompt_hash].append(t.length)
    constant = constant_length(list(training.values()), gamma)
    domains = {p: rows[0].domain for p, rows in groups.items()}
    found: dict[str, Any] = {
        "gamma": gamma,
        "model": summarise(
            prompt_errors(dict(zip(groups, expected, strict=True)), lengths, gamma), domains
        ),
        "constant": summarise(
            prompt_errors(dict.fromkeys(groups, constant), lengths, gamma), domains
        ),
    }
    if isinstance(belief, DistributionBelief):
        low, high = belief.quantile(0.1).tolist(), belief.quantile(0.9).tolist()
        inside = [
            lo <= n <= hi or (n >= a.max_tokens and hi >= n)
            for (lo, hi), ns in zip(zip(low, high, strict=True), lengths.values(), strict=True)
            for n in ns
        ]
        found["coverage_80"] = sum(inside) / len(inside)
    return found


def evaluate_control(
    a: argparse.Namespace, models: dict[str, LengthValueModel], results: dict[str, Any]
) -> None:
    """Equal-To on LIFEBench items: score, deviation and quality of every arm. All targets of an arm
    run in one batch."""
    items = read(a.data, "lifebench/data_en.jsonl")
    items = items[:: max(1, len(items) // a.items)][: a.items]
    first = True
    for name, model in models.items():
        engine = TransformersEngine.load(
            a.generator,
            model,
            dtype=torch.bfloat16 if a.device == "cuda" else torch.float32,
            device=a.device,
            max_requests=len(items) * len(a.targets),
            max_tokens=len(items) * len(a.targets) * (a.control_max + 200) + 4096,
        )
        for arm in a.arms or ARMS:
            options = ARMS[arm]
            if arm == "none" and not first:
                continue  # the generator alone is the same everywhere
            if arm.startswith(DISTRIBUTION_ONLY) and model.config.head == "scalar":
                continue
            points = _control_arm(a, engine, items, options)
            for target, point in points.items():
                results["control"][f"{name} | {arm} | {target}"] = point
            means = {k: sum(p[k] for p in points.values()) / len(points) for k in point}
            print(f"{name} | {arm}", {k: round(v, 3) for k, v in means.items()}, flush=True)
            save(a, results)
        first = False
        del engine
        if a.device == "cuda":
            torch.cuda.empty_cache()


def _control_arm(
    a: argparse.Namespace,
    engine: TransformersEngine,
    items: list[dict[str, Any]],
    options: dict[str, Any] | None,
) -> dict[int, dict[str, float]]:
    requests = []
    for target in a.targets:
        for i, item in enumerate(items):
            task = item["task"].replace("{word_count_type}", "equal to")
            task = task.replace("{word_count} words", f"{target} tokens")
            ids = encode_prompt(engine.tokenizer, [{"role": "user", "content": task}])
            control = LengthControl.parse({"equal_to": target, **options}) if options else None
            sampling = SamplingParams(
                top_k=a.top_k, top_p=a.top_p, max_tokens=a.control_max, seed=2
            )
            requests.append(Request(f"{target}-{i}", tuple(ids), sampling, control, index=i))
    start = time.time()
    done = in_order(engine.generate(requests), requests)
    rate = sum(len(c.token_ids) for c in done) / (time.time() - start)
    return {
        target: _measure(target, done[n * len(items) : (n + 1) * len(items)])
        | {"tokens_per_s": rate}
        for n, target in enumerate(a.targets)
    }


def _measure(target: int, done: list[Completion]) -> dict[str, float]:
    deviations = [(len(c.token_ids) - target) / target for c in done]
    scores = torch.tensor([length_score(d, "equal_to") for d in deviations])
    log_probs = torch.tensor([sum(c.log_probs) / len(c.log_probs) for c in done])
    texts = [measure_text(c.text, c.finish_reason or "") for c in done]
    natural = [c.finish_reason == "stop" and c.log_probs[-1] > NATURAL_LOG_PROB for c in done]
    return {
        "num_items": len(done),
        "score": scores.mean().item(),
        "score_stderr": (scores.std() / len(done) ** 0.5).item(),
        "deviation": sum(map(abs, deviations)) / len(deviations),
        "log_prob": log_probs.mean().item(),
        "log_prob_stderr": (log_probs.std() / len(done) ** 0.5).item(),
        "log_prob_but_last": sum(sum(c.log_probs[:-1]) / max(1, len(c.log_probs) - 1) for c in done)
        / len(done),
        "last_log_prob": sum(c.log_probs[-1] for c in done) / len(done),
        "natural_end": sum(natural) / len(done),
        **{
            name: sum(float(t[name]) for t in texts) / len(done)
            for name in ("rep_4", "distinct_2", "ended_by_eos", "sentence_end")
        },
    }


def save(a: argparse.Namespace, results: dict[str, Any]) -> None:
    write_json(a.out / "results.json", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generator", default="smollm2")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--backbone", default=None, help="of the value model; the generator's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--heldout-n", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=15, help="as in guided decoding; 0: all")
    parser.add_argument("--top-p", type=float, default=0.999)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--control-max", type=int, default=1536)
    parser.add_argument("--sample-s", type=float, default=90.0)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--control-models", nargs="+", default=None, choices=list(MODELS))
    parser.add_argument("--arms", nargs="+", default=None, choices=list(ARMS))
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--full-lr", type=float, default=1e-4)
    parser.add_argument("--all-licences", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="A dry run of every stage.")
    parser.add_argument("--commit", default="")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    results: dict[str, Any] = {
        "command": "python recipes/frontier.py "
        + " ".join(f"--{k} {v}" for k, v in vars(a).items()),
        "commit": a.commit,
        "hardware": torch.cuda.get_device_name() if cuda else platform.processor(),
        "versions": {"lenvm": __version__, "torch": torch.__version__},
        "training": {},
        "prediction": {},
        "control": {},
    }
    sample(a, results)
    save(a, results)
    models = {}
    for name in a.models:
        models[name] = train_one(a, name, results)
        save(a, results)
    evaluate_control(a, {n: models[n] for n in a.control_models or a.models}, results)
    print_table(a, results)


def train_one(a: argparse.Namespace, name: str, results: dict[str, Any]) -> LengthValueModel:
    options = MODELS[name]
    config = TrainingConfig.parse(
        {
            "data": [str(a.out / "train.jsonl")],
            "output": str(a.out / name),
            "backbone": a.backbone or a.generator,
            "censoring": "one_sided",
            "lora_rank": a.lora_rank,
            "epochs": a.epochs,
            "learning_rate": a.full_lr if options["trainable"] == "full" else a.lora_lr,
            "head_learning_rate": 1e-3,
            "batch_tokens": a.batch_tokens,
            "evals": 2,
            **options,
        }
    )
    result = train(config)
    results["training"][name] = result.__dict__
    model = LengthValueModel.from_pretrained(
        a.out / name,
        device=a.device,
        dtype=torch.bfloat16 if a.device == "cuda" else torch.float32,
    )
    model.head.float()
    results["prediction"][name] = evaluate_prediction(a, model)
    print(name, json.dumps(results["training"][name]), flush=True)
    print(name, json.dumps(results["prediction"][name]), flush=True)
    return model


def print_table(a: argparse.Namespace, results: dict[str, Any]) -> None:
    names = ("score", "deviation", "log_prob", "natural_end", "sentence_end", "tokens_per_s")
    print(f"\n{'arm, mean over targets':<50}" + "".join(f"{n:>13}" for n in names))
    rows = defaultdict(list)
    for key, point in results["control"].items():
        rows[key.rsplit(" | ", 1)[0]].append(point)
    for key, points in rows.items():
        means = [sum(p[n] for p in points) / len(points) for n in names]
        print(f"{key:<50}" + "".join(f"{m:13.3f}" for m in means))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
