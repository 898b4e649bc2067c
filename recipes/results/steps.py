"""What a step of the plan does, by `kind`. Each continues where it stopped, keeps its raw results
as they come, and returns (figures, whether it is finished). Nothing is graded here that can be
graded on a machine without a GPU (`collect.py`).
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.results.answers import lifebench, speed, tradeoff
from recipes.results.lab import MEAN_PROMPT, Found, Lab, Options, OutOfTime, end_of
from recipes.results.prompts import asked_questions, load_prompts
from recipes.results.tokens import TokenWriter

from lenvm.data.prompts import Prompt
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Request
from lenvm.evals.tradeoff.grading_pool import Task, grade_all
from lenvm.guidance.request import LengthControl
from lenvm.model.tokenization import encode_prompt

MAX_PROMPT = 1100
"""Tokens that a prompt of a sampled set may have."""


# -- sampling -------------------------------------------------------------------------------------


def sample(lab: Lab, name: str, o: Options) -> Found:
    """Completions of the plan's `sets`, one after another in one stream, so that the GPU is full
    from the first to the last: {generator, batch, max_tokens, top_k, top_p, sets: [{name, prompts,
    per_domain, n, seconds, first?}], value_model?, controls?}. `n` is a number or one per domain.
    `first` numbers a set's first sample: not 0 where a set adds to the prompts of an earlier one.

    A set is finished when its own seconds are over: it is as large as they allow."""
    engine = lab.engine(
        o["generator"],
        o.get("value_model"),
        batch=o["batch"],
        tokens=o["max_tokens"] + MEAN_PROMPT,
        candidates=o.get("top_k") or 16,
    )
    controls = [c and LengthControl.parse(c) for c in o.get("controls", [None])]
    params = SamplingParams(
        top_k=o.get("top_k", 0),
        top_p=o.get("top_p", 1.0),
        min_p=o.get("min_p", 0.0),
        max_tokens=o["max_tokens"],
        seed=1,
    )
    writers = {s["name"]: lab.tokens(s["name"]).write() for s in o["sets"]}
    origin: dict[str, tuple[TokenWriter, Prompt, int]] = {}
    finished = {s["name"]: False for s in o["sets"]}

    def requests() -> Iterator[Request]:
        for s in o["sets"]:
            writer, end = writers[s["name"]], end_of(lab, s.get("seconds"))
            prompts = load_prompts(lab.data, s["prompts"], s["per_domain"])
            for prompt in prompts[: s.get("limit")]:
                n = s["n"] if isinstance(s["n"], int) else s["n"].get(prompt.domain, 0)
                wanted = range(s.get("first", 0), s.get("first", 0) + n)
                missing = [k for k in wanted if (prompt.prompt_hash, k) not in writer.done]
                if not missing:
                    continue
                ids = tuple(encode_prompt(engine.tokenizer, prompt.conversation))
                if len(ids) > MAX_PROMPT:
                    continue
                if time.monotonic() > end:
                    finished[s["name"]] = end < lab.deadline
                    break
                for k in missing:
                    request_id = f"{s['name']}/{prompt.prompt_hash}-{k}"
                    origin[request_id] = (writer, prompt, k)
                    stream = int(prompt.prompt_hash[:12], 16) * 1000 + k
                    control = controls[k % len(controls)]
                    yield Request(request_id, ids, params, control, index=stream)
            else:
                finished[s["name"]] = True

    start, tokens = time.monotonic(), 0
    try:
        for completion in engine.generate(requests()):
            writer, prompt, k = origin.pop(completion.request.id)
            writer.add(prompt, k, completion)
            tokens += len(completion.token_ids)
    finally:
        for writer in writers.values():
            writer.close()
    seconds = time.monotonic() - start
    rate = {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / max(seconds, 1e-9)}
    sets = {s["name"]: lab.tokens(s["name"]).summary() for s in o["sets"]}
    return {"generator": o["generator"], "rate": rate, "sets": sets}, all(finished.values())


def grade(lab: Lab, name: str, o: Options) -> Found:
    """Rewards of the `asked` completions of a set, 1 right and 0 wrong: {generator, tokens}."""
    folder, tokenizer = lab.tokens(o["tokens"]), lab.tokenizer(o["generator"])
    questions = asked_questions(lab.data)
    tasks = []
    for row in folder.trajectories():
        question = questions[row["messages"][-1]["content"].strip()]
        text = tokenizer.decode(row["completion_token_ids"], skip_special_tokens=True)
        is_complete = row["finish_reason"] == "stop"
        tasks.append(Task(text, question.gold, question.kind, question.options, is_complete))
    num_processes = max(2, (os.cpu_count() or 2) // 3)
    right = [float(r["correct"]) for r in grade_all(tasks, num_processes=num_processes)]
    folder.write_rewards(right)
    return {"tokens": o["tokens"], "graded": len(right), "right": sum(right) / len(right)}, True


# -- training -------------------------------------------------------------------------------------


def train(lab: Lab, name: str, o: Options) -> Found:
    """A value model: {backbone, data: [token folders], seconds, tokens_per_s, max_epochs, options}.

    As many epochs as fit: seconds x tokens_per_s / tokens read, at most max_epochs.
    """
    from lenvm.training.config import TrainingConfig
    from lenvm.training.trainer import train as run

    lab.release()
    files = [lab.trajectories(d) for d in o["data"]]
    num_tokens = sum(lab.tokens(d).summary()["num_read"] for d in o["data"])
    seconds = min(o["seconds"], lab.remaining_s)
    epochs = min(o["max_epochs"], seconds * o["tokens_per_s"] / max(num_tokens, 1))
    epochs = max(0.05, round(epochs, 2))
    previous = lab.folder / "models" / f"{name}.manifest.json"
    if previous.exists():  # what was begun goes on with its own number of epochs
        from lenvm.files import read_json

        epochs = read_json(previous)["config"]["epochs"]
    config = TrainingConfig.parse(
        {
            "data": [str(f) for f in files],
            "output": str(lab.folder / "models" / name),
            "backbone": lab.generator(o["backbone"]),
            "epochs": epochs,
            **o.get("options", {}),
        }
    )
    start = time.monotonic()
    result = run(config)
    return {
        "backbone": o["backbone"],
        "head": config.head,
        "trainable": config.trainable,
        "epochs": epochs,
        "data": list(o["data"]),
        "training_tokens": round(epochs * result.num_tokens),
        "gpu_seconds": time.monotonic() - start,
        **{k: v for k, v in vars(result).items() if k != "num_dropped"},
    }, True


# -- prediction -----------------------------------------------------------------------------------


def prediction(lab: Lab, name: str, o: Options) -> Found:
    """Predictions for held-out prompts by several models: {held_out, training, models, gammas,
    limit}. A distribution head answers for every gamma of `gammas`, a scalar head for its own."""
    from lenvm.evals.prediction.predictors import ValueModelPredictor
    from lenvm.evals.prediction.run import PredictionConfig, read_groups, run_prediction

    lab.release()
    files = tuple(lab.trajectories(n) for n in (o["held_out"], *o.get("training", ())))
    config = PredictionConfig(files, limit=o.get("limit"), num_traced=o.get("traced", 4))
    groups = read_groups(config)
    found: dict[str, Any] = {}
    for model_name in o["models"]:
        if lab.remaining_s <= 0:
            return found, False
        model = lab.value_model(model_name)
        own = model.config
        is_scalar = own.head == "scalar"
        for gamma in [None, *([] if is_scalar else o.get("gammas", ()))]:
            label = model_name if gamma is None else f"{model_name}@{gamma:g}"
            model.config = own if gamma is None else own.model_copy(update={"gamma": gamma})
            start = time.monotonic()
            predictor = ValueModelPredictor(model, label, batch_tokens=o.get("batch_tokens", 32768))
            folder = lab.folder / "prediction" / name / label
            summary = run_prediction(config, predictor, folder, groups=groups)
            found[label] = {
                "gamma": predictor.gamma,
                "head": own.head,
                "mre": {d: t["mre"]["value"] for d, t in summary["domains"].items() if t["mre"]},
                "seconds": time.monotonic() - start,
            }
            print(f"  {label}: {found[label]}", flush=True)
        del model
        lab.release()
    return found, True


# -- grids and tokens -----------------------------------------------------------------------------


def grid(lab: Lab, name: str, o: Options) -> Found:
    """Trainings side by side: {data, held_out, grid: {design, base, axes}, seconds}. A cell is
    begun only while there is time for another as long as the longest so far."""
    from lenvm.cli._eval_scaling import train_and_evaluate
    from lenvm.evals.prediction.run import PredictionConfig
    from lenvm.evals.scaling.grid import Grid, read_axes
    from lenvm.evals.scaling.run import run_grid

    lab.release()
    end, longest = end_of(lab, o.get("seconds")), 0.0
    held_out = lab.trajectories(o["held_out"])
    base = {**o["grid"]["base"], "data": [str(lab.trajectories(d)) for d in o["data"]]}
    axes = read_axes(f"plan, step {name}", o["grid"]["axes"])
    cells = Grid(
        _place(lab, base),
        {k: [_place(lab, v) for v in row] for k, row in axes.items()},
        o["grid"].get("design", "product"),
    )

    def run_cell(settings: Mapping[str, Any], folder: Path) -> dict[str, float]:
        nonlocal longest
        start = time.monotonic()
        if start + longest > end:
            raise OutOfTime("the next training would not fit")
        config = PredictionConfig((held_out,), limit=o.get("limit"))
        metrics = train_and_evaluate(settings, folder, config, lab.device)
        longest = max(longest, time.monotonic() - start)
        lab.release()
        print(f"  {folder.name} {time.monotonic() - start:.0f} s {metrics}", flush=True)
        return metrics

    start = time.monotonic()
    finished = True
    try:
        summary = run_grid(cells, lab.folder / "grids" / name, run_cell)
        finished = not summary["num_failed"]
        for note in summary["notes"]:
            print(f"  {note}", flush=True)
    except OutOfTime as error:
        print(f"  {error}", flush=True)
        finished = False
    return {"num_cells": len(cells.cells()), "gpu_seconds": time.monotonic() - start}, finished


def _place(lab: Lab, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `lenvm train` with the backbone's name replaced by where it is."""
    found = dict(settings)
    if "backbone" in found:
        found["backbone"] = lab.generator(found["backbone"])
    return found


def length_tokens(lab: Lab, name: str, o: Options) -> Found:
    """Which tokens make answers longer: {value_model, tokens, limit}."""
    from lenvm.evals.length_tokens.run import LengthTokensConfig, run_length_tokens
    from lenvm.evals.prediction.predictors import ValueModelPredictor

    lab.release()
    model = lab.value_model(o["value_model"])
    config = LengthTokensConfig(
        (lab.trajectories(o["tokens"]),), split="all", limit=o.get("limit"), chunk=64, min_count=30
    )
    predictor = ValueModelPredictor(model, o["value_model"], batch_tokens=32768, levels=())
    start = time.monotonic()
    summary = run_length_tokens(
        config, predictor, model.tokenizer, lab.folder / "length_tokens" / name
    )
    lab.release()
    return {"num_tokens": summary["num_tokens"], "seconds": time.monotonic() - start}, True


KINDS: dict[str, Callable[[Lab, str, Options], Found]] = {
    "sample": sample,
    "grade": grade,
    "train": train,
    "prediction": prediction,
    "lifebench": lifebench,
    "tradeoff": tradeoff,
    "speed": speed,
    "grid": grid,
    "length_tokens": length_tokens,
}
