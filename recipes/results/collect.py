"""Raw results of a lab -> the files of benchmarks/results, each with its headline.

Runs on any machine: answers are graded here. Of a step that is not finished, only those samples of
items count that every arm has answered, so that arms are compared on the same questions.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recipes.results.plan import Plan
from recipes.results.prompts import find_conditioned

from lenvm.evals.arms import DEFAULTS, FEATURES, Arm
from lenvm.evals.bootstrap import Resampler
from lenvm.evals.lifebench.run import EVALUATION as LIFEBENCH
from lenvm.evals.lifebench.run import summarise as summarise_lifebench
from lenvm.evals.runner import Record, load_config, load_records
from lenvm.evals.tradeoff.arms import OWN
from lenvm.evals.tradeoff.run import EVALUATION as TRADEOFF
from lenvm.evals.tradeoff.run import summarise as summarise_tradeoff
from lenvm.files import read_json, read_jsonl, write_json

Numbers = dict[str, Any]
BASELINES = ("budget", "budget_answer", "concise", "eos_bias")
TWO_THIRDS = 0.667


def collect(plan: Plan, lab: Path, out: Path, data: Path | None = None) -> Iterator[Path]:
    """Write every result file that there is something for; their paths. data: shared/data, to tell
    the held-out instructions' sources apart."""
    parts: dict[str, Callable[[Plan, Path, list[Numbers]], Numbers]] = {
        "prediction": partial(_prediction, data=data),
        "decoding": _decoding,
        "frontier": _frontier,
        "lifebench": _lifebench,
        "tradeoff": _tradeoff,
        "scaling": _grids,
        "ablations": _grids,
        "length_tokens": _length_tokens,
    }
    for name, build in parts.items():
        steps = [
            read_json(path)
            for step in plan.steps
            if step.result == name and (path := lab / "steps" / f"{step.name}.json").exists()
        ]
        if not steps:
            continue
        found = {
            "schema": "lenvm.results/1",
            **{k: steps[-1].get(k) for k in ("commit", "hardware", "versions")},
            "command": f"python -m recipes.results collect {lab}, of what `run` left there",
            "plan": "recipes/results/plan.toml",
            "steps": {s["name"]: _cost(s) for s in steps},
            "training": _trainings(lab),
            "sampling": _samplings(lab),
            "speed": {s["name"]: s["figures"] for s in _all_steps(lab, "speed")},
            **build(plan, lab, steps),
        }
        suffix = "" if name in ("decoding", "length_tokens") else "_h200"
        path = out / f"{name}{suffix}.json"
        write_json(path, found)
        yield path


def _cost(step: Mapping[str, Any]) -> Numbers:
    """What a step took."""
    names = ("tokens", "seconds", "tokens_per_s", "guidance_s", "num_answers", "num_left")
    figures = {k: v for k, v in step["figures"].items() if k in names}
    facts = {k: step.get(k) for k in ("finished", "hardware", "commit")}
    return {**facts, "gpu_seconds": step["seconds"], **figures}


def _all_steps(lab: Path, kind: str) -> Iterator[Numbers]:
    for path in sorted((lab / "steps").glob("*.json")):
        step = read_json(path)
        if step["kind"] == kind:
            yield dict(step)


def _trainings(lab: Path) -> Numbers:
    names = ("backbone", "head", "trainable", "epochs", "data", "training_tokens", "gpu_seconds")
    names += ("tokens_per_s", "num_sequences", "val_loss_first", "val_loss_last", "gamma")
    return {
        s["name"]: {k: s["figures"][k] for k in names if k in s["figures"]}
        for s in _all_steps(lab, "train")
    }


def _samplings(lab: Path) -> Numbers:
    graded = {s["figures"]["tokens"]: s["figures"]["right"] for s in _all_steps(lab, "grade")}
    return {
        name: {"step": s["name"], "generator": s["figures"]["generator"], **row}
        | {"tokens_per_s": s["figures"].get("rate", {}).get("tokens_per_s")}
        | ({"share_right": graded[name]} if name in graded else {})
        for s in _all_steps(lab, "sample")
        for name, row in s["figures"]["sets"].items()
    }


# -- prediction -----------------------------------------------------------------------------------


def _prediction(
    plan: Plan, lab: Path, steps: Sequence[Numbers], data: Path | None = None
) -> Numbers:
    conditioned = find_conditioned(data) if data else set()
    models: Numbers = {}
    for step in steps:
        held_out = step["options"]["held_out"]
        for path in sorted((lab / "prediction" / step["name"]).glob("*/summary.json")):
            summary = read_json(path)
            kept = ("gamma", "head", "num_prompts", "num_completions", "num_censored", "domains")
            models[path.parent.name] = {"held_out": held_out} | {k: summary[k] for k in kept}
            for table in models[path.parent.name]["domains"].values():
                table.pop("positions", None)  # `decoding` has them
            if conditioned:
                sources = by_source(path.parent / "grades.jsonl", conditioned)
                models[path.parent.name]["instructions_by_source"] = sources
    main = models.get(plan.headline["prediction"])
    headline = {
        f"mre_{domain}": _value(main and _point(main["domains"].get(domain, {})))
        for domain in ("math", "code", "instructions")
    }
    pairs = _paired(lab, plan.headline.get("against_scalar", ""), models)
    return {"headline": headline, "models": models, "against_scalar": pairs}


def predictions(lab: Path) -> Iterator[Path]:
    """Folders of predictions at the prompt, one a model; `decoding` steps have folders, too."""
    for path in sorted(lab.glob("prediction/*/*/summary.json")):
        step = lab / "steps" / f"{path.parents[1].name}.json"
        if step.exists() and read_json(step)["result"] == "prediction":
            yield path.parent


def _decoding(plan: Plan, lab: Path, steps: Sequence[Numbers]) -> Numbers:
    """Errors of the remaining length inside answers, of steps that trace enough of them."""
    models: Numbers = {}
    for step in steps:
        for path in sorted((lab / "prediction" / step["name"]).glob("*/summary.json")):
            summary = read_json(path)
            domains = {d: table["positions"] for d, table in summary["domains"].items()}
            models[path.parent.name] = {k: summary[k] for k in ("gamma", "head")} | {
                **{k: step["options"].get(k) for k in ("traced", "limit")},
                "domains": domains,
            }
    main = plan.headline.get("against_scalar", "")
    folders = {path.name: path for s in steps for path in lab.glob(f"prediction/{s['name']}/*")}
    scalars = [n for n, m in models.items() if m["head"] == "scalar" and main in folders]
    nearer = {n: nearer_share(folders[main], folders[n]) for n in scalars}
    return {"headline": {}, "models": models, "nearer_than_scalar": nearer}


def nearer_share(ours: Path, theirs: Path) -> list[Numbers]:
    """How often a model is nearer to an answer's rest than another, by place: [{at, share}]."""

    def errors(folder: Path) -> dict[tuple[str, int, float], float]:
        return {
            (row["id"], p["sample"], p["at"]): abs(p["predicted"] - p["remaining"])
            for _, row in read_jsonl(folder / "records.jsonl")
            for p in row["positions"]
        }

    own, other = errors(ours), errors(theirs)
    found = []
    for at in sorted({key[2] for key in own}):
        keys = [k for k in own if k[2] == at and k in other]
        ids = [k[0] for k in keys]
        wins = [0.5 * ((own[k] < other[k]) + (own[k] <= other[k])) for k in keys]
        found.append({"at": at, "share": Resampler(ids).mean(wins, ids).to_json()})
    return found


def by_source(grades: Path, conditioned: set[str]) -> Numbers:
    """Error of the geometric mean on held-out instructions with conditions on form (IFEval) and
    without (WildChat): {source: {num_prompts, mre}}."""
    rows = [row for _, row in read_jsonl(grades) if row["domain"] == "instructions"]
    found: Numbers = {}
    for name, inside in (("ifeval", True), ("wildchat", False)):
        own = [r for r in rows if (r["id"] in conditioned) == inside]
        own = [r for r in own if r.get("predicted_geometric")]
        errors = [abs(r["predicted_geometric"] / r["length_true"] - 1) for r in own]
        if errors:
            mre = Resampler([r["id"] for r in own]).mean(errors, [r["id"] for r in own])
            found[name] = {"num_prompts": len(own), "mre": mre.to_json()}
    return found


def _paired(lab: Path, main: str, models: Numbers) -> Numbers:
    """The distribution head's relative error less a scalar head's at the same gamma, prompt by
    prompt: {scalar model: {domain: estimate}}."""
    found: Numbers = {}
    folders = {path.name: path for path in predictions(lab)}
    for name, model in models.items():
        own = folders.get(f"{main}@{model['gamma']:g}")
        if model["head"] != "scalar" or own is None:
            continue
        ours, theirs = (
            {row["id"]: row for _, row in read_jsonl(folder / "grades.jsonl")}
            for folder in (own, folders[name])
        )
        found[name] = {}
        for domain in sorted({grade["domain"] for grade in ours.values()}):
            ids = [i for i, grade in ours.items() if grade["domain"] == domain]
            less = [ours[i]["relative_error"] - theirs[i]["relative_error"] for i in ids]
            found[name][domain] = Resampler(ids).mean(less, ids).to_json()
    return found


def _point(domain: Numbers) -> Numbers | None:
    """Error of a head's best point prediction: the geometric mean where it knows one."""
    found: Numbers | None = (domain.get("geometric") or domain).get("mre")
    return found


def _coverage_80(plan: Plan, lab: Path) -> float | None:
    for folder in predictions(lab):
        if folder.name == plan.headline["prediction"]:
            coverage = read_json(folder / "summary.json")["domains"]["all"]["coverage"]
            return _value(coverage and coverage["80"])
    return None


# -- LIFEBench ------------------------------------------------------------------------------------


def _frontier(plan: Plan, lab: Path, steps: Sequence[Numbers]) -> Numbers:
    runs = {s["name"]: _grade(lab, s["name"], LIFEBENCH, summarise_lifebench) for s in steps}
    arms = _arms(runs.get(plan.headline["frontier"]))
    best = arms.get(plan.headline["arm"], {}).get("equal_to") or {}
    hard = arms.get("hard", {}).get("equal_to") or {}
    return {
        "headline": {
            "equal_to_score": _value(best.get("score")),
            "log_prob_loss": _value(best.get("quality", {}).get("log_prob_loss")),
            "coverage_80": _coverage_80(plan, lab),
            "hard_rule_score": _value(hard.get("score")),
            "hard_rule_log_prob_loss": _value(hard.get("quality", {}).get("log_prob_loss")),
        },
        "arm": plan.headline["arm"],
        "runs": runs,
    }


def _lifebench(plan: Plan, lab: Path, steps: Sequence[Numbers]) -> Numbers:
    runs = {s["name"]: _grade(lab, s["name"], LIFEBENCH, summarise_lifebench) for s in steps}
    equal_to = plan.headline["frontier"]
    if (lab / "answers" / equal_to / "records.jsonl").exists():
        runs[equal_to] = _grade(lab, equal_to, LIFEBENCH, summarise_lifebench)
    arms, limits = _arms(runs.get(equal_to)), _arms(runs.get(plan.headline["limits"]))
    best = arms.get(plan.headline["arm"], {}).get("equal_to") or {}
    plain = arms.get("prompt", {}).get("equal_to") or {}
    limit = limits.get(plan.headline["limits_arm"], {})
    quality = best.get("quality", {})
    return {
        "headline": {
            "equal_to_score": _value(best.get("score")),
            "equal_to_score_unguided": _value(plain.get("score")),
            "equal_to_deviation": _value(best.get("deviation")),
            "at_most_score": _value((limit.get("at_most") or {}).get("score")),
            "at_least_score": _value((limit.get("at_least") or {}).get("score")),
            "natural_endings": _value(quality.get("natural_end")),
            "natural_endings_unguided": _value(plain.get("quality", {}).get("natural_end")),
            "log_prob_loss": _value(quality.get("log_prob_loss")),
        },
        "arm": plan.headline["arm"],
        "runs": runs,
    }


# -- trade-off ------------------------------------------------------------------------------------


def _tradeoff(plan: Plan, lab: Path, steps: Sequence[Numbers]) -> Numbers:
    options = {step.name: step.options for step in plan.steps}
    runs = {}
    for name in (step["name"] for step in steps):
        own = options[name].get("value_model")
        shared = {
            other: options[other].get("value_model") == own
            for other in options[name].get("arms_from", [])
        }
        runs[name] = _grade(lab, name, TRADEOFF, summarise_tradeoff, shared)
        runs[name]["gains"] = _gains(lab / "graded" / name / "grades.jsonl")
    names = plan.headline["gsm8k"]
    main = next(
        (runs[n] for n in ([names] if isinstance(names, str) else names) if n in runs), None
    )
    guided = _at_two_thirds(main, OWN)
    # a single prompt is no curve: it counts where its answers are about as short
    single = [
        a["pass_at_1"]["value"]
        for a in _arms(main).values()
        if a["family"] == "concise"
        and a["relative_length"]
        and a["relative_length"]["value"] <= 0.7
    ]
    other = max([_at_two_thirds(main, BASELINES) or 0.0, *single])
    plain = _arms(main).get("prompt", {})
    return {
        "headline": {
            "gsm8k_accuracy_unguided": _value(plain.get("pass_at_1")),
            "gsm8k_accuracy_at_two_thirds_length": guided,
            "best_baseline_at_two_thirds_length": other,
        },
        "runs": runs,
    }


def _gains(grades: Path) -> Numbers:
    """Accuracy of each arm less the unguided one's, answer by answer: {arm: estimate}."""
    right: dict[str, dict[tuple[str, int], float]] = {}
    for _, row in read_jsonl(grades):
        right.setdefault(row["arm"], {})[row["item"], row["sample"]] = float(row["correct"])
    plain = right.pop("prompt", {})
    resampler = Resampler([item for item, _ in plain])
    return {
        arm: resampler.mean([own[k] - plain[k] for k in keys], [item for item, _ in keys]).to_json()
        for arm, own in right.items()
        if (keys := [k for k in own if k in plain])
    }


def _at_two_thirds(summary: Numbers | None, families: Sequence[str]) -> float | None:
    """Best accuracy of these families at two thirds of the unguided length; None where no curve
    gets there."""
    rows = [
        row["accuracy"]["value"]
        for family in families
        for row in ((summary or {}).get("curves", {}).get(family) or {}).get("accuracy_at", [])
        if row["fraction"] == TWO_THIRDS and row["accuracy"]
    ]
    return max(rows, default=None)


# -- grids and tokens -----------------------------------------------------------------------------


def _grids(plan: Plan, lab: Path, steps: Sequence[Numbers]) -> Numbers:
    runs = {}
    for step in steps:
        path = lab / "grids" / step["name"] / "records.jsonl"
        records = list(load_records(path.parent).values()) if path.exists() else []
        done = [r for r in records if r["error"] is None]
        runs[step["name"]] = {
            "data": step["options"]["data"],
            "held_out": step["options"]["held_out"],
            "grid": step["options"]["grid"],
            "cells": [{"axes": r["axes"], "metrics": r["metrics"]} for r in done],
            "failed": [{"axes": r["axes"], "error": r["error"]} for r in records if r["error"]],
        }
    return {"headline": {}, "runs": runs}


def _length_tokens(plan: Plan, lab: Path, steps: Sequence[Numbers]) -> Numbers:
    runs = {}
    for step in steps:
        summary = read_json(lab / "length_tokens" / step["name"] / "summary.json")
        dropped = ("schema", "config", "notes")
        runs[step["name"]] = {k: v for k, v in summary.items() if k not in dropped}
    return {"headline": {}, "runs": runs}


# -- inside ---------------------------------------------------------------------------------------


def _grade(
    lab: Path,
    name: str,
    evaluation: str,
    summarise: Callable[..., Numbers],
    shared: Mapping[str, bool] | None = None,
) -> Numbers:
    """Grades and summary of a folder of answers, under lab/graded; made once for what is there.

    shared: other steps of the same generator, questions and sampling, and whether their value model
    is the same. Their answers without one, or with the same, are this step's, too: the same
    requests with the same seeds.
    """
    source, target = lab / "answers" / name, lab / "graded" / name
    shared = {lab / "answers" / other: same for other, same in (shared or {}).items()}
    sources = [source, *shared]
    stamp = max((folder / "records.jsonl").stat().st_mtime_ns for folder in sources)
    made = target / "summary.json"
    if not made.exists() or made.stat().st_mtime_ns < stamp:
        manifest = load_config(source, evaluation)
        records = list(load_records(source).values())
        for other, all_arms in shared.items():
            manifest, records = _share(manifest, records, other, evaluation, all_arms)
        kept = keep_complete(records)
        skipped = dict.fromkeys(manifest["arms"])
        target.mkdir(parents=True, exist_ok=True)
        summarise(target, kept, manifest, skipped)
    summary = read_json(made)
    dropped = ("schema", "evaluation", "config", "num_records")
    return {"sampling": summary["config"]["sampling"]} | {
        k: v for k, v in summary.items() if k not in dropped
    }


def _share(
    manifest: Numbers, records: list[Record], other: Path, evaluation: str, all_arms: bool
) -> tuple[Numbers, list[Record]]:
    """Both, with the arms of another folder, or those that need no value model. ValueError where
    its requests were others."""
    theirs = load_config(other, evaluation)
    own = {k: v for k, v in manifest.items() if k != "arms"}
    if own != {k: v for k, v in theirs.items() if k != "arms"}:
        raise ValueError(f"{other}: answers to other requests; they cannot be shared")
    arms = [
        name
        for name in theirs["arms"]
        if (all_arms or "control" not in FEATURES.get(Arm.parse(name, DEFAULTS).kind, ()))
        and name not in manifest["arms"]
    ]
    more = [r for r in load_records(other).values() if r["arm"] in arms]
    return manifest | {"arms": [*arms, *manifest["arms"]]}, [*more, *records]


def keep_complete(records: Sequence[Record]) -> list[Record]:
    """The records of those (sample, item) that every arm has answered."""
    plain = [r for r in records if not r["case"].get("forced")]
    counts = Counter((r["sample"], r["item"]) for r in plain)
    most = max(counts.values(), default=0)
    return [r for r in records if counts[r["sample"], r["item"]] == most]


def _arms(summary: Numbers | None) -> dict[str, Numbers]:
    return {a["arm"]: a for a in (summary or {}).get("arms", [])}


def _value(interval: Mapping[str, float] | None) -> float | None:
    return None if interval is None else interval["value"]
