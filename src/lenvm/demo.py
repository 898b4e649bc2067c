"""`lenvm demo`: the whole path on one small machine. Sample, train, predict, guide, report.

Every stage leaves a file under the output folder and is skipped when it is there; a stage that was
killed goes on where it stopped. Stages are bounded in time, so that a slow machine trains on less.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lenvm.data.prompts import Prompt, load_bundled_prompts
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.engines.rollout import count_rows, in_order, rollout
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Completion, Request, TransformersEngine
from lenvm.files import claiming, read_json, write_json, write_text
from lenvm.guidance.request import LengthControl
from lenvm.model.bundled import DEFAULT_MODEL, bundled_value_model
from lenvm.model.device import pick_device, pick_dtype
from lenvm.model.prediction import predict_lengths, trace_values
from lenvm.model.value_model import LengthValueModel
from lenvm.training.config import TrainingConfig
from lenvm.training.metrics import constant_length, prompt_errors, summarise, true_length
from lenvm.training.trainer import TrainingResult, train

Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""


TRUNCATION: dict[str, Any] = {"top_k": 8, "min_p": 0.05}
"""Of every completion, guided or not. Few candidates a step: scoring them is what control costs."""

LONG_ENOUGH_TO_SHOW = 60
"""Tokens: a completion of this length or more shows how the value moves."""


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo. The defaults fit two cores and ten minutes."""

    generator: str = "smollm2"
    train_prompts: int = 36
    heldout_prompts: int = 24
    completions: int = 2
    max_tokens: int = 160
    submit_for_s: float = 30.0
    """No new completion is begun after this; those begun are finished."""
    batch: int = 48
    init_from: str | None = None
    """Value model to go on from. None: the package's own for the default generator, else none (a
    fresh head on the generator's own layers)."""
    last_layers: int = 4
    epochs: float = 1.0
    learning_rate: float = 3e-5
    head_learning_rate: float = 1e-4
    batch_tokens: int = 2048
    control_prompts: int = 5
    control_max_tokens: int = 130
    targets: tuple[int, ...] = (50, 100)
    tilts: tuple[float, ...] = (-60.0, 60.0)
    seed: int = 0


def run_demo(output: Path, config: DemoConfig, progress: Progress) -> dict[str, Any]:
    """Run what is missing; returns the summary. InputError for a folder of other settings."""
    with claiming(output, "demo", config.__dict__):
        summary_path = output / "summary.json"
        if summary_path.exists():
            found: dict[str, Any] = read_json(summary_path)
            return found
        summary = _run_stages(output, config, progress)
        write_json(summary_path, summary)
        return summary


def _run_stages(output: Path, config: DemoConfig, progress: Progress) -> dict[str, Any]:
    started = time.monotonic()
    device = pick_device()
    sampling = _sample(output, config, device, progress)
    trajectories = list(read_trajectories(output / "trajectories.jsonl"))
    training = _train(output, config, progress)
    progress("predict", 0, 2)
    mre_before = None
    if start := _init_from(config):
        mre_before = _predict(_load(start, device), trajectories)["mre"]
    progress("predict", 1, 2)
    model = _load(output / "model", device)
    prediction = _predict(model, trajectories) | {"mre_before_training": mre_before}
    _write_traces(output, model, trajectories)
    progress("predict", 2, 2)
    control = _control(output, config, model, trajectories, device, progress)
    return {
        "schema": "lenvm.demo/1",
        "generator": config.generator,
        "value_model": {
            "head": model.config.head,
            "gamma": model.config.gamma,
            "init_from": (start := _init_from(config)) and Path(start).name,
        },
        "sampling": sampling,
        "training": {
            "num_tokens": training.num_tokens,
            "tokens_per_s": training.tokens_per_s,
            "val_loss_first": training.val_loss_first,
            "val_loss_last": training.val_loss_last,
        },
        "prediction": prediction,
        **control,
        "seconds": time.monotonic() - started,
        "peak_memory_gb": peak_memory_gb(),
    }


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _prompts(config: DemoConfig) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, the domains taken in turn."""
    by_split: dict[bool, dict[str, list[Prompt]]] = {
        True: defaultdict(list),
        False: defaultdict(list),
    }
    for prompt in load_bundled_prompts():
        by_split[prompt.split == "train"][prompt.domain].append(prompt)
    return (
        _in_turn(by_split[True], config.train_prompts),
        _in_turn(by_split[False], config.heldout_prompts),
    )


def _in_turn(by_domain: dict[str, list[Prompt]], limit: int) -> list[Prompt]:
    columns = [by_domain[name] for name in sorted(by_domain)]
    longest = max(len(column) for column in columns)
    return [c[i] for i in range(longest) for c in columns if i < len(c)][:limit]


def _sample(output: Path, config: DemoConfig, device: str, progress: Progress) -> dict[str, Any]:
    result_path = output / "sampling.json"
    if result_path.exists():
        found: dict[str, Any] = read_json(result_path)
        return found
    engine = TransformersEngine.load(
        config.generator, dtype=pick_dtype(device), device=device, max_requests=config.batch
    )
    training, heldout = _prompts(config)
    mixed = [
        p for pair in zip(training, _spread(heldout, len(training)), strict=True) for p in pair if p
    ]
    path = output / "trajectories.jsonl"
    total, count, started = len(mixed) * config.completions, count_rows(path), time.monotonic()
    num_tokens = 0
    progress("sample completions", count, total)

    def advance(completion: Completion) -> None:
        nonlocal count, num_tokens
        count += 1
        num_tokens += len(completion.token_ids)
        progress("sample completions", count, total)

    rollout(
        engine,
        mixed,
        path,
        n=config.completions,
        sampling=SamplingParams(max_tokens=config.max_tokens, seed=config.seed, **TRUNCATION),
        model=config.generator,
        on_completion=advance,
        submit_for_s=config.submit_for_s,
    )
    seconds = time.monotonic() - started
    progress("sample completions", count, count)  # what time was left for
    rows = list(read_trajectories(path))
    result = {
        "num_prompts": len({t.prompt_hash for t in rows}),
        "num_trajectories": len(rows),
        "num_tokens": sum(t.length for t in rows),
        "num_truncated": sum(not t.is_complete for t in rows),
        "tokens_per_s": num_tokens / seconds,
    }
    write_json(result_path, result)
    return result


def _spread(items: Sequence[Prompt], width: int) -> list[Prompt | None]:
    """Items spread evenly over `width` places, so that any prefix holds its share of them."""
    places: list[Prompt | None] = [None] * width
    for i, item in enumerate(items[:width]):
        places[i * width // len(items)] = item
    return places


def _train(output: Path, config: DemoConfig, progress: Progress) -> TrainingResult:
    start = _init_from(config)
    settings: dict[str, Any] = {
        "data": [str(output / "trajectories.jsonl")],
        "output": str(output / "model"),
        "trainable": "last",
        "last_layers": config.last_layers,
        "censoring": "one_sided",
        "epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "head_learning_rate": config.head_learning_rate,
        "batch_tokens": config.batch_tokens,
        "evals": 2,
        "seed": config.seed,
    }
    settings |= {"init_from": start} if start else {"backbone": config.generator}
    return train(TrainingConfig.parse(settings), progress)


def _load(folder: Path | str, device: str) -> LengthValueModel:
    return LengthValueModel.from_pretrained(folder, device=device, dtype=pick_dtype(device))


def _init_from(config: DemoConfig) -> str | None:
    if config.init_from is None and config.generator == DEFAULT_MODEL:
        return str(bundled_value_model())
    return config.init_from


def _heldout(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Completions of test and validation prompts, by prompt."""
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for t in trajectories:
        if t.split != "train":
            groups[t.prompt_hash].append(t)
    return groups


def _predict(model: LengthValueModel, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Prompt-boundary errors on held-out prompts, against the constant predictor.

    A truncated completion counts with the length at which it was cut, in truth and prediction
    alike: both are limited to max_tokens.
    """
    groups = _heldout(trajectories)
    gamma = model.config.gamma
    limit = max(t.length for t in trajectories)
    lengths = {p: [t.length for t in rows] for p, rows in groups.items()}
    prompts = [rows[0].prompt_token_ids for rows in groups.values()]
    numbers = predict_lengths(model, prompts)
    raw = torch.stack([r[-1] for r in model.read(prompts)])
    from lenvm.returns import value_to_length

    expected = value_to_length(model.belief(raw).value(), gamma).clamp(max=limit)
    predicted = dict(zip(groups, expected.tolist(), strict=True))
    train_groups: dict[str, list[int]] = defaultdict(list)
    for t in trajectories:
        if t.split == "train":
            train_groups[t.prompt_hash].append(t.length)
    constant = constant_length(list(train_groups.values()), gamma)
    domains = {p: rows[0].domain for p, rows in groups.items()}
    errors = summarise(prompt_errors(predicted, lengths, gamma), domains)
    baseline = summarise(prompt_errors(dict.fromkeys(groups, constant), lengths, gamma), domains)
    return {
        "num_prompts": len(groups),
        "mre": errors["mre"],
        "mre_constant": baseline["mre"],
        "median": errors["median"],
        "median_constant": baseline["median"],
        "per_domain": errors["per_domain"],
        "points": [
            {
                "prompt": rows[0].messages[-1]["content"] if rows[0].messages else "",
                "domain": rows[0].domain,
                "predicted": predicted[p],
                "p10": n["p10"],
                "p90": n["p90"],
                "true_mean": true_length(lengths[p], gamma),
                "true_lengths": lengths[p],
            }
            for (p, rows), n in zip(groups.items(), numbers, strict=True)
        ],
    }


def _write_traces(output: Path, model: LengthValueModel, rows: Sequence[Trajectory]) -> None:
    """`traces.jsonl`: one held-out completion of every domain, token by token."""
    import json

    by_domain: dict[str, list[Trajectory]] = defaultdict(list)
    for t in rows:
        if t.split != "train":
            by_domain[t.domain].append(t)
    lines = []
    for group in by_domain.values():
        t = max(group, key=lambda t: (t.is_complete, min(t.length, LONG_ENOUGH_TO_SHOW)))
        states = trace_values(model, t.prompt_token_ids, t.completion_token_ids)
        tokens = [model.tokenizer.decode([i]) for i in t.completion_token_ids]
        prompt = t.messages[-1]["content"] if t.messages else t.prompt_text
        trace = {
            "schema": "lenvm.trace/1",
            "prompt": prompt,
            "domain": t.domain,
            "tokens": tokens,
            "token_ids": t.completion_token_ids,
            "gamma": model.config.gamma,
            "states": states,
        }
        lines.append(json.dumps(trace, ensure_ascii=False))
    write_text(output / "traces.jsonl", "".join(line + "\n" for line in lines))


def _control(
    output: Path,
    config: DemoConfig,
    model: LengthValueModel,
    trajectories: Sequence[Trajectory],
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Guided against unguided completions of the same held-out prompts."""
    path = output / "control.json"
    if path.exists():
        found: dict[str, Any] = read_json(path)
        return found
    engine = TransformersEngine.load(
        config.generator, model, dtype=pick_dtype(device), device=device, max_requests=config.batch
    )
    groups = list(_heldout(trajectories).values())[: config.control_prompts]
    controls: dict[str, dict[str, Any]] = {
        f"equal_to {t}": {"equal_to": t, "tolerance": 0.05} for t in config.targets
    }
    controls |= {f"tilt {s:g}": {"tilt": s} for s in config.tilts}
    controls |= {"at_most 40": {"at_most": 40}, "at_least 90": {"at_least": 90}}
    requests = [
        Request(
            f"{name}/{i}",
            tuple(rows[0].prompt_token_ids),
            SamplingParams(max_tokens=config.control_max_tokens, seed=config.seed, **TRUNCATION),
            LengthControl.parse(control),
            index=i,
        )
        for name, control in controls.items()
        for i, rows in enumerate(groups)
    ]
    done: list[Completion] = []
    for completion in engine.generate(requests):
        done.append(completion)
        progress("generate with control", len(done), len(requests))
    by_name: dict[str, list[Completion]] = defaultdict(list)
    for completion in in_order(iter(done), requests):
        by_name[completion.request.id.split("/")[0]].append(completion)
    unguided = [min(rows[0].length, config.control_max_tokens) for rows in groups]
    log_prob = _unguided_log_prob(engine, groups)
    result = _summarise_control(config, by_name, unguided, log_prob)
    result["samples"] = [
        {
            "prompt": rows[0].messages[-1]["content"] if rows[0].messages else "",
            "control": name,
            "text": by_name[name][i].text,
            "num_tokens": len(by_name[name][i].token_ids),
            "finish_reason": by_name[name][i].finish_reason,
            "log_prob": _mean_log_prob([by_name[name][i]]),
        }
        for name in by_name
        for i, rows in enumerate(groups[:3])
    ]
    write_json(path, result)
    return result


def _summarise_control(
    config: DemoConfig,
    by_name: dict[str, list[Completion]],
    unguided: list[int],
    log_prob: float,
) -> dict[str, Any]:
    scores: dict[str, dict[str, list[float]]] = {
        "unguided": defaultdict(list),
        "guided": defaultdict(list),
    }
    guided_log_probs = []
    for target in config.targets:
        completions = by_name[f"equal_to {target}"]
        guided_log_probs.append(_mean_log_prob(completions))
        arms = {"unguided": unguided, "guided": [len(c.token_ids) for c in completions]}
        for arm, lengths in arms.items():
            for length in lengths:
                deviation = (length - target) / target
                scores[arm]["length_score"].append(length_score(deviation))
                scores[arm]["deviation"].append(abs(deviation))
    means = {
        arm: {k: sum(v) / len(v) for k, v in columns.items()} for arm, columns in scores.items()
    }
    means["unguided"]["log_prob"] = log_prob
    means["guided"]["log_prob"] = sum(guided_log_probs) / len(guided_log_probs)
    tilt = [
        {"scale": scale, "mean_length": _mean_length(by_name[f"tilt {scale:g}"])}
        for scale in config.tilts
    ]
    tilt.append({"scale": 0.0, "mean_length": sum(unguided) / len(unguided)})
    tilt.sort(key=lambda row: row["scale"])
    return {
        "equal_to": {"targets": list(config.targets), **means},
        "at_most": _promise(by_name["at_most 40"], lambda n: n <= 40),
        "at_least": _promise(by_name["at_least 90"], lambda n: n >= 90),
        "tilt": tilt,
    }


def length_score(deviation: float) -> float:
    """LIFEBench's Equal-To score of a length deviation (L_out - L) / L."""
    from math import exp

    return 100 * exp(5 * deviation) if deviation < 0 else 100 * exp(-2 * deviation)


def _promise(completions: list[Completion], kept: Callable[[int], bool]) -> dict[str, float]:
    lengths = [len(c.token_ids) for c in completions]
    return {
        "kept": sum(map(kept, lengths)) / len(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "log_prob": _mean_log_prob(completions),
    }


def _mean_length(completions: list[Completion]) -> float:
    return sum(len(c.token_ids) for c in completions) / len(completions)


def _mean_log_prob(completions: list[Completion]) -> float:
    """Per token, under the unguided generator."""
    every = [x for c in completions for x in c.log_probs]
    return sum(every) / len(every)


@torch.inference_mode()
def _unguided_log_prob(engine: TransformersEngine, groups: list[list[Trajectory]]) -> float:
    """The same of the unguided completions, by one forward each."""
    total, count = 0.0, 0
    for rows in groups:
        ids = torch.tensor([[*rows[0].prompt_token_ids, *rows[0].completion_token_ids]])
        logits = engine.generator(ids.to(engine.device)).logits[0].float()
        start = len(rows[0].prompt_token_ids)
        picked = (
            logits[start - 1 : -1]
            .log_softmax(-1)
            .gather(-1, ids[0, start:, None].to(engine.device))
        )
        total, count = total + picked.sum().item(), count + rows[0].length
    return total / count
