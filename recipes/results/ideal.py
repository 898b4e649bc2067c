"""What any control by length alone could reach at best, from unguided answers and no value model.

Answers to a question are samples of the generator's p(y). Under p(y) exp(-price |y|) their mean
length and accuracy are weighted means of the same samples, and so they are under p(y | |y| <= T).
That is what rule `conditional` samples with an exact value model: what is missing to these curves
is the value model's error, what is missing beyond them no value model can give.

A weighted mean over the same samples that it normalises by is biased where few samples carry the
weight: points whose effective number of answers a question falls under 8 are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recipes.results.prompts import read
from recipes.results.tokens import TokenFolder

from lenvm.evals.bootstrap import Estimate, Resampler
from lenvm.evals.tradeoff.grader import guess_kind
from lenvm.evals.tradeoff.grading_pool import Task, grade_all

Array = NDArray[np.float64]
PRICES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of each question's answers, the shortest: T is that quantile of its own lengths."""
LEAST_EFFECTIVE = 8.0


def ideal(folder: TokenFolder, tokenizer: Any, gold: Mapping[str, str]) -> dict[str, Any]:
    """Curves of the sampled questions that `gold` answers; each point's mean length and accuracy as
    shares of the unguided ones."""
    questions: dict[str, list[tuple[int, Task]]] = {}
    for row in folder.trajectories():
        question = row["messages"][-1]["content"].strip()
        if question not in gold:
            continue
        ids, answer = row["completion_token_ids"], gold[question]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        is_complete = row["finish_reason"] == "stop"
        task = Task(text, answer, guess_kind(answer), complete=is_complete)
        questions.setdefault(question, []).append((len(ids), task))
    tasks = [task for answers in questions.values() for _, task in answers]
    correct = iter(bool(r["correct"]) for r in grade_all(tasks))
    samples = {
        q: (
            np.array([n for n, _ in answers], dtype=np.float64),
            np.array([next(correct) for _ in answers], dtype=np.float64),
        )
        for q, answers in questions.items()
    }
    return {
        "answers": len(tasks),
        "questions": len(samples),
        "accuracy": float(np.mean([c.mean() for _, c in samples.values()])),
        "mean_length": float(np.mean([n.mean() for n, _ in samples.values()])),
        "curves": {
            "price": _curve(samples, PRICES, _priced),
            "shortest": _curve(samples, SHARES, _shortest),
        },
    }


def gsm8k_gold(data: Path) -> dict[str, str]:
    """Question -> answer of the GSM8K test items."""
    return {
        str(row["question"]).strip(): str(row["answer"]).split("####")[-1].strip()
        for row in read(data, "gsm8k/test_first660.jsonl")
    }


def _priced(lengths: Array, price: float) -> Array:
    weights: Array = np.exp(-price * (lengths - lengths.min()))
    return weights


def _shortest(lengths: Array, share: float) -> Array:
    return (lengths <= np.quantile(lengths, share)).astype(np.float64)


def _curve(
    samples: Mapping[str, tuple[Array, Array]],
    settings: Sequence[float],
    weigh: Callable[[Array, float], Array],
) -> list[dict[str, Any]]:
    names = list(samples)
    resampler = Resampler(names)

    def mean(values: Sequence[float]) -> Estimate:
        return resampler.mean(values, names)

    plain = [mean([float(x[i].mean()) for x in samples.values()]) for i in (0, 1)]
    points = []
    for setting in settings:
        found, effective = [], []
        for lengths, correct in samples.values():
            weights = weigh(lengths, setting)
            weights = weights / weights.sum()
            found.append((float(weights @ lengths), float(weights @ correct)))
            effective.append(1 / float((weights**2).sum()))
        if np.mean(effective) < LEAST_EFFECTIVE:
            continue
        length, accuracy = (mean(list(column)) for column in zip(*found, strict=True))
        points.append(
            {
                "setting": setting,
                "relative_length": (length / plain[0]).to_json(),
                "relative_accuracy": (accuracy / plain[1]).to_json(),
                "effective_answers": float(np.mean(effective)),
            }
        )
    return points
