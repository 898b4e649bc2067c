"""Result folders with made-up numbers that look like real ones. For tests of pages only."""

import json
import math
import random
import re
from pathlib import Path

GAMMA = 0.992

MATH = """To find out how many eggs Janet sells, we start from what her ducks lay each day.

1. The ducks lay 16 eggs per day.
2. She eats 3 eggs for breakfast and bakes muffins with 4 more, so 3 + 4 = 7 eggs are used.
3. That leaves 16 - 7 = 9 eggs to sell.

Wait, let me check the price as well: each egg brings $2, so 9 x $2 = $18.

Therefore, Janet makes **$18** every day at the farmers' market."""

CODE = '''Here is a function that removes the first and last occurrence of a character:

```python
def remove_occ(text: str, char: str) -> str:
    """Remove the first and the last `char`."""
    first = text.find(char)
    if first < 0:
        return text
    text = text[:first] + text[first + 1:]
    last = text.rfind(char)
    return text if last < 0 else text[:last] + text[last + 1:]
```

The function looks for the first occurrence, cuts it out, and does the same from the end. If the \
character does not occur at all, the text comes back unchanged.'''

CHAT = """Of course! Here is a short note you can send:

Hi Maria,
thank you so much for the lovely dinner on Saturday 🙂 The lemon cake was wonderful, and the \
children have not stopped talking about your dog since.

\tWarm regards,
\tTom

In Arabic you could close with مع أطيب التحيات, if her parents read along."""

PROMPTS = {
    "math": "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and "
    "bakes muffins for her friends every day with four. She sells the rest at the farmers' market "
    "daily for $2 per fresh duck egg. How much in dollars does she make every day?",
    "code": "Write a python function to remove first and last occurrence of a given character from "
    "the string.",
    "instructions": "Write a short thank-you note to a friend who had us over for dinner.",
}
TEXTS = {"math": MATH, "code": CODE, "instructions": CHAT}


def split_tokens(text: str) -> list[str]:
    return re.findall(r" ?[^\W\d_]{1,7}|\d| ?[^\w\s]+|\n+|\t|\s", text)


def make_trace(
    domain: str, *, seed: int = 0, bias: float = 1.0, cut: bool = False, **about
) -> dict:
    """A trace whose prediction wanders about the truth and is surer towards the end."""
    rng = random.Random(f"{domain}{seed}")
    tokens = [*split_tokens(TEXTS[domain]), "<|im_end|>"]
    if cut:
        tokens = tokens[: len(tokens) // 2]
    drift, predicted = rng.gauss(0, 0.25), []
    for t in range(len(tokens) + 1):
        drift = 0.93 * drift + rng.gauss(0, 0.07)
        if t and tokens[t - 1].strip() in ("Wait", "Here", "Therefore"):
            drift += 0.5 if tokens[t - 1].strip() == "Wait" else -0.35
        left = len(tokens) - t + (90 if cut else 0)
        predicted.append(max(0.6, bias * left * math.exp(drift)) if left else 0.0)
    return {
        "schema": "lenvm.trace/1",
        "prompt": PROMPTS[domain],
        "domain": domain,
        "tokens": tokens,
        "token_ids": [rng.randrange(49_000) for _ in tokens],
        "gamma": GAMMA,
        "values": [GAMMA**p - 1 for p in predicted],
        "remaining_predicted": predicted,
        "remaining_low": [0.62 * p for p in predicted],
        "remaining_high": [1.7 * p for p in predicted],
        "remaining_true": None if cut else list(range(len(tokens), -1, -1)),
        "finish_reason": "length" if cut else "stop",
        **about,
    }


def write_jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_points(num: int = 24) -> list[dict]:
    rng = random.Random(1)
    points = []
    for i in range(num):
        domain = list(PROMPTS)[i % 3]
        typical = {"math": 130, "code": 90, "instructions": 170}[domain]
        truth = typical * math.exp(rng.gauss(0, 0.45))
        predicted = truth * math.exp(rng.gauss(0, 0.3))
        points.append(
            {
                "prompt": f"Question {i}: {PROMPTS[domain]}",
                "domain": domain,
                "predicted": min(predicted, 256),
                "p10": 0.6 * predicted,
                "p90": min(256, 1.6 * predicted),
                "true_mean": min(truth, 256),
                "true_lengths": [round(truth * 0.9), round(truth * 1.1)],
            }
        )
    return points


def make_demo_summary(**changes) -> dict:
    answers = {
        "equal_to 60": (61, -0.93),
        "equal_to 120": (118, -0.88),
        "tilt 10": (84, -0.8),
        "at_most 50": (47, -1.02),
    }
    return {
        "schema": "lenvm.demo/1",
        "generator": "smollm2",
        "value_model": {"head": "distribution", "gamma": 0.98201},
        "sampling": {
            "num_prompts": 72,
            "num_trajectories": 144,
            "num_tokens": 20_114,
            "num_truncated": 21,
            "tokens_per_s": 331.4,
        },
        "training": {
            "num_tokens": 26_700,
            "tokens_per_s": 402.0,
            "val_loss_first": 4.62,
            "val_loss_last": 4.05,
            "curve": [
                {"step": 2 * i, "loss": 3.9 + 1.2 * math.exp(-i / 6) + 0.1 * math.sin(7 * i)}
                for i in range(1, 20)
            ]
            + [
                {"step": 0, "val_loss": 4.62},
                {"step": 20, "val_loss": 4.2},
                {"step": 38, "val_loss": 4.05},
            ],
        },
        "prediction": {
            "num_prompts": 24,
            "mre": 0.312,
            "mre_constant": 0.468,
            "median": 0.251,
            "median_constant": 0.334,
            "per_domain": {
                "code": {"mre": 0.271, "median": 0.22, "num_prompts": 8},
                "instructions": {"mre": 0.402, "median": 0.31, "num_prompts": 8},
                "math": {"mre": 0.263, "median": 0.21, "num_prompts": 8},
            },
            "points": make_points(),
        },
        "equal_to": {
            "targets": [60, 120],
            "unguided": {"length_score": 34.1, "deviation": 0.71, "log_prob": -0.62},
            "guided": {"length_score": 78.6, "deviation": 0.06, "log_prob": -0.91},
        },
        "at_most": {"kept": 1.0, "mean_length": 44.1, "log_prob": -1.04},
        "at_least": {"kept": 0.875, "mean_length": 161.0, "log_prob": -0.97},
        "tilt": [
            {"scale": -10.0, "mean_length": 161.2},
            {"scale": 0.0, "mean_length": 133.0},
            {"scale": 10.0, "mean_length": 92.4},
        ],
        "samples": [
            {
                "prompt": PROMPTS[domain],
                "control": control,
                "text": TEXTS[domain],
                "num_tokens": count,
                "finish_reason": "stop",
                "log_prob": log_prob,
            }
            for domain in PROMPTS
            for control, (count, log_prob) in answers.items()
        ],
        "seconds": 512.0,
        **changes,
    }


def write_demo(folder: Path, **changes) -> Path:
    """A demo folder."""
    write_jsonl(folder / "traces.jsonl", [make_trace(domain) for domain in PROMPTS])
    (folder / "summary.json").write_text(json.dumps(make_demo_summary(**changes)))
    return folder
