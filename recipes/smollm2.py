"""Recipe: a value model for SmolLM2-135M-Instruct on one GPU, from prompts to the control frontier.

    python recipes/smollm2.py --data ../shared/data --out runs/smollm2 --generator smollm2

Samples, trains (distribution head: LoRA, which ships, and full; scalar head: LoRA, to compare),
measures prediction on held-out prompts, and Equal-To control on LIFEBench items by every rule, with
the text's quality beside it. Writes `results.json` after every point. Only prompts whose licence
lets the checkpoint ship are used (shared/data/README.md).
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
from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import read_trajectories
from lenvm.demo import length_score
from lenvm.engines.rollout import in_order, rollout
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Completion, Request, TransformersEngine
from lenvm.files import read_jsonl, write_json
from lenvm.guidance.request import LengthControl
from lenvm.model.head import DistributionBelief
from lenvm.model.tokenization import encode_prompt
from lenvm.model.value_model import LengthValueModel
from lenvm.returns import value_to_length
from lenvm.training.config import TrainingConfig
from lenvm.training.metrics import constant_length, prompt_errors, summarise
from lenvm.training.trainer import train

ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "hard": {"rule": "hard"},
    "soft 30": {"rule": "soft", "strength": 30},
    "soft 100": {"rule": "soft", "strength": 100},
    "conditional": {"rule": "conditional"},
    "conditional tolerance .05": {"rule": "conditional", "tolerance": 0.05},
    "conditional tolerance .05 evidence 2": {
        "rule": "conditional",
        "tolerance": 0.05,
        "evidence": 2.0,
    },
}


def read(data: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(data / name)]


def instruction(row: dict[str, Any]) -> str:
    text = row["instances"][0]["input"].strip()
    return f"{row['instruction']}\n\n{text}" if text else str(row["instruction"])


def load_prompts(data: Path) -> tuple[list[Prompt], list[Prompt]]:
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
    training = [p for h, p in sides[0].items() if h not in sides[1]]
    random.Random(0).shuffle(training)
    # a tenth of the training prompts is for validation
    training = [
        p if i % 10 else Prompt(p.messages, None, p.domain, "validation")
        for i, p in enumerate(training)
    ]
    return training, list(sides[1].values())


def sample(a: argparse.Namespace, results: dict[str, Any]) -> None:
    engine = TransformersEngine.load(
        a.generator, dtype=torch.bfloat16, device=a.device, max_requests=a.batch, max_tokens=10**7
    )
    training, heldout = load_prompts(a.data)
    if a.tiny:
        training, heldout = training[:12], heldout[::40]
    sampling = SamplingParams(max_tokens=a.max_tokens, seed=1)
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
            model="SmolLM2-135M-Instruct",
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
    """Equal-To on LIFEBench items: score, deviation and quality of every arm."""
    items = read(a.data, "lifebench/data_en.jsonl")[:: 1 if not a.tiny else 80][: a.items]
    for name, model in models.items():
        engine = TransformersEngine.load(
            a.generator,
            model,
            dtype=torch.bfloat16,
            device=a.device,
            max_requests=a.control_batch,
            max_tokens=10**7,
        )
        for arm, options in ARMS.items():
            if arm == "none" and name != "lora-distribution":
                continue  # the generator alone is the same everywhere
            if name == "full-distribution" and not arm.startswith("conditional"):
                continue
            if options and options["rule"] == "conditional" and model.config.head == "scalar":
                continue
            for target in a.targets:
                key = f"{name} | {arm} | {target}"
                results["control"][key] = _control_point(a, engine, items, target, options)
                print(key, {k: round(v, 3) for k, v in results["control"][key].items()}, flush=True)
                save(a, results)


def _control_point(
    a: argparse.Namespace,
    engine: TransformersEngine,
    items: list[dict[str, Any]],
    target: int,
    options: dict[str, Any] | None,
) -> dict[str, float]:
    requests = []
    for i, item in enumerate(items):
        task = item["task"].replace("{word_count_type}", "equal to")
        task = task.replace("{word_count} words", f"{target} tokens")
        ids = encode_prompt(engine.tokenizer, [{"role": "user", "content": task}])
        control = LengthControl.parse({"equal_to": target, **options}) if options else None
        sampling = SamplingParams(top_k=15, top_p=0.999, max_tokens=a.control_max, seed=2)
        requests.append(Request(f"{i}", tuple(ids), sampling, control, index=i))
    start = time.time()
    done = in_order(engine.generate(requests), requests)
    seconds = time.time() - start
    lengths = [len(c.token_ids) for c in done]
    deviations = [(n - target) / target for n in lengths]
    scores = torch.tensor([length_score(d) for d in deviations])
    log_probs = torch.tensor([sum(c.log_probs) / len(c.log_probs) for c in done])
    return {
        "num_items": len(done),
        "score": scores.mean().item(),
        "score_stderr": (scores.std() / len(done) ** 0.5).item(),
        "deviation": sum(map(abs, deviations)) / len(deviations),
        "log_prob": log_probs.mean().item(),
        "log_prob_stderr": (log_probs.std() / len(done) ** 0.5).item(),
        "last_token_log_prob": sum(c.log_probs[-1] for c in done) / len(done),
        "ends_at_sentence": sum(c.text.rstrip().endswith((".", "!", "?", '"')) for c in done)
        / len(done),
        "ended_by_itself": sum(c.ended_by_itself for c in done) / len(done),
        "distinct_2": _distinct_2(done),
        "rep_4": _rep_4(done),
        "tokens_per_s": sum(lengths) / seconds,
    }


def _distinct_2(done: list[Completion]) -> float:
    """Share of different bigrams, a mean over answers."""
    shares = []
    for c in done:
        pairs = list(zip(c.token_ids, c.token_ids[1:], strict=False))
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    return sum(shares) / len(shares)


def _rep_4(done: list[Completion]) -> float:
    """Share of 4-grams that were in the answer before."""
    shares = []
    for c in done:
        grams = [tuple(c.token_ids[i : i + 4]) for i in range(len(c.token_ids) - 3)]
        shares.append(1 - len(set(grams)) / max(1, len(grams)))
    return sum(shares) / len(shares)


def save(a: argparse.Namespace, results: dict[str, Any]) -> None:
    write_json(a.out / "results.json", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generator", default="smollm2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--control-batch", type=int, default=160)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--heldout-n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=768)
    parser.add_argument("--control-max", type=int, default=1024)
    parser.add_argument("--sample-s", type=float, default=110.0)
    parser.add_argument("--items", type=int, default=160)
    parser.add_argument("--targets", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--tiny", action="store_true", help="A dry run of every stage.")
    parser.add_argument("--commit", default="")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    results: dict[str, Any] = {
        "command": "python recipes/smollm2.py "
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
    for name, options in {
        "lora-distribution": {"head": "distribution", "trainable": "lora"},
        "lora-scalar": {"head": "scalar", "trainable": "lora"},
        "full-distribution": {"head": "distribution", "trainable": "full"},
    }.items():
        full = options["trainable"] == "full"
        config = TrainingConfig.parse(
            {
                "data": [str(a.out / "train.jsonl")],
                "output": str(a.out / name),
                "backbone": a.generator,
                "censoring": "one_sided",
                "lora_rank": 8,
                "epochs": 3,
                "learning_rate": 1e-4 if full else 1e-3,
                "head_learning_rate": 1e-3,
                "batch_tokens": a.batch_tokens,
                **options,
            }
        )
        result = train(config)
        results["training"][name] = result.__dict__
        models[name] = LengthValueModel.from_pretrained(
            a.out / name, device=a.device, dtype=torch.bfloat16 if cuda else torch.float32
        )
        models[name].head.float()
        results["prediction"][name] = evaluate_prediction(a, models[name])
        print(name, json.dumps(results["training"][name]), flush=True)
        print(name, json.dumps(results["prediction"][name]), flush=True)
        save(a, results)
    evaluate_control(a, models, results)
    print(f"\n{'arm':<60} score   dev  logp  sentence  tok/s")
    for key, r in results["control"].items():
        print(
            f"{key:<60} {r['score']:5.1f} {r['deviation']:5.0%} {r['log_prob']:6.2f}"
            f" {r['ends_at_sentence']:6.0%} {r['tokens_per_s']:8.0f}"
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
