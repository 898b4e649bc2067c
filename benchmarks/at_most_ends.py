"""How answers end that may be no longer than a limit: controls side by side, the bundled models.

    python benchmarks/at_most_ends.py --out benchmarks/results/at_most_ends_cpu.json

`sentence_end`: the text ends with a sentence. `likely_end`: the answer ended by itself, where the
generator gave the ending at least 1%. `over`: share of answers over the limit.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from lenvm.engines.request import Completion, Request  # noqa: E402
from lenvm.engines.sampling import SamplingParams  # noqa: E402
from lenvm.engines.transformers import TransformersEngine  # noqa: E402
from lenvm.evals.quality import LIKELY, ends_at_sentence  # noqa: E402
from lenvm.guidance.request import LengthControl  # noqa: E402
from lenvm.model.bundled import bundled_value_model  # noqa: E402
from lenvm.model.tokenization import encode_prompt  # noqa: E402
from lenvm.model.value_model import LengthValueModel  # noqa: E402

PROMPTS = (
    "What is gravity?",
    "Why is the sky blue?",
    "How do bees make honey?",
    "Give me one tip for better sleep.",
    "What is the capital of Japan, and what is it known for?",
    "Explain photosynthesis to a child.",
    "Why do cats purr?",
    "How does a vaccine work?",
    "What does a compiler do?",
    "Describe the taste of coffee.",
    "Write a greeting for a new neighbour.",
    "Why do we have leap years?",
    "What is inflation?",
    "How do I boil an egg?",
    "Recommend a hobby for rainy days.",
    "What is a black hole?",
    "Why is exercise good for the heart?",
    "Tell me about the Great Wall of China.",
    "What is the difference between weather and climate?",
    "How can I remember names better?",
)
LIMITS = (40, 60)
MAX_TOKENS = 512


def controls(limit: int) -> dict[str, dict[str, Any] | None]:
    """By name. Those of `equal_to` aim under the limit: their tolerance's far side is the limit."""
    middle = int(limit / 1.2)
    return {
        "none": None,
        "at_most": {"at_most": limit},
        "at_most, evidence 2": {"at_most": limit, "evidence": 2.0},
        "at_most, evidence 3": {"at_most": limit, "evidence": 3.0},
        "at_most, evidence 5": {"at_most": limit, "evidence": 5.0},
        "at_most, not strict": {"at_most": limit, "strict": False},
        "tilt 10": {"tilt": 10.0},
        "tilt 40": {"tilt": 40.0},
        "equal_to, tolerance 0.2": {"equal_to": middle, "tolerance": 0.2},
    }


def measure(
    engine: TransformersEngine, fields: dict[str, Any] | None, num: int
) -> list[Completion]:
    control = None if fields is None else LengthControl.parse(fields)
    requests = [
        Request(
            id=f"{i}-{j}",
            prompt_token_ids=tuple(
                encode_prompt(engine.tokenizer, [{"role": "user", "content": prompt}])
            ),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=1000 * j + i),
            control=control,
        )
        for i, prompt in enumerate(PROMPTS)
        for j in range(num)
    ]
    return list(engine.generate(requests))


def describe(done: list[Completion], limit: int) -> dict[str, Any]:
    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)

    lengths = [len(c.token_ids) for c in done]
    return {
        "num": len(done),
        "sentence_end": mean([ends_at_sentence(c.text) for c in done]),
        "likely_end": mean([c.ended_by_itself and c.log_probs[-1] >= LIKELY for c in done]),
        "at_limit": mean([n == limit for n in lengths]),
        "over": mean([n > limit for n in lengths]),
        "mean_length": mean([float(n) for n in lengths]),
        "mean_log_prob": mean([math.fsum(c.log_probs) / len(c.log_probs) for c in done]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/control.md, which a test compares with the result file."""
    titles = [f"N = {n}: sentence, likely, length" for n in LIMITS]
    lines = [f"| control | {' | '.join(titles)} | over N |"]
    lines.append("|---" * (len(LIMITS) + 2) + "|")
    for name in controls(LIMITS[0]):
        found = [
            next((r for r in rows if (r["limit"], r["control"]) == (n, name)), None) for n in LIMITS
        ]
        cells = [
            f"{r['sentence_end']:.0%}, {r['likely_end']:.0%}, {r['mean_length']:.0f}" if r else "-"
            for r in found
        ]
        over = " and ".join(f"{r['over']:.0%}" if r else "-" for r in found)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {over} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/at_most_ends_cpu.json"
    )
    parser.add_argument("--samples", type=int, default=4, help="Answers per prompt.")
    options = parser.parse_args()
    torch.set_num_threads(2)
    model = LengthValueModel.from_pretrained(bundled_value_model(), device="cpu")
    engine = TransformersEngine.load("smollm2", model, device="cpu", max_requests=40)
    rows: list[dict[str, Any]] = []
    known: dict[str, list[Completion]] = {}
    for limit in LIMITS:
        for name, fields in controls(limit).items():
            key = json.dumps(fields)
            if key not in known:  # the same answers for every limit, where the control has none
                known[key] = measure(engine, fields, options.samples)
            done = known[key]
            rows.append(
                {"limit": limit, "control": name, **describe(done, limit), "fields": fields}
            )
            print(json.dumps(rows[-1]), flush=True)
    commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = {
        "schema": "lenvm.benchmark.at_most_ends/1",
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "generator": "smollm2",
        "value_model": "bundled",
        "num_prompts": len(PROMPTS),
        "num_samples": options.samples,
        "max_tokens": MAX_TOKENS,
        "rows": rows,
    }
    print(table(rows))
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
