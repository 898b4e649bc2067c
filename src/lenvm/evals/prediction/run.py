"""`lenvm eval length-prediction`: predictions for the prompts of trajectory files, their errors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.errors import DataError
from lenvm.evals.prediction.baselines import predict_baselines
from lenvm.evals.prediction.grading import grade_prompt, summarise_domain
from lenvm.evals.prediction.groups import Groups, PromptGroup, load_groups
from lenvm.evals.prediction.predictors import Predictor
from lenvm.evals.runner import (
    Progress,
    Record,
    ignore_progress,
    load_config,
    load_records,
    write_results,
)
from lenvm.files import JsonlWriter, claim

EVALUATION = "length-prediction"
RECORD_SCHEMA = "lenvm.eval.prediction/1"
POSITIONS = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class PredictionConfig:
    """What a run measures."""

    files: tuple[Path, ...]
    """Trajectory files. Their training split, if there is one, fits the baselines."""
    split: str = "test"
    min_completions: int = 2
    limit: int | None = None
    num_traced: int = 4
    """Completions of each prompt that are read for the error during decoding."""
    chunk: int = 16
    """Prompts that are predicted together."""

    def to_json(self, predictor: Predictor) -> dict[str, Any]:
        return {
            "files": {f.name: hash_file(f) for f in self.files},
            "split": self.split,
            "min_completions": self.min_completions,
            "limit": self.limit,
            "num_traced": self.num_traced,
            "model": predictor.name,
            "gamma": predictor.gamma,
            "head": predictor.head,
        }


def run_prediction(
    config: PredictionConfig,
    predictor: Predictor,
    folder: Path,
    *,
    groups: Groups | None = None,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """Predict what is missing, grade everything, write the folder; returns the summary. groups:
    what `read_groups` gave, where several predictors share it."""
    groups = groups or read_groups(config)
    manifest = config.to_json(predictor)
    path = folder / "records.jsonl"
    claim(path, f"eval.{EVALUATION}", manifest)
    records = load_records(folder) if path.exists() else {}
    total = len(groups.evaluated)
    todo = [g for g in groups.evaluated if g.id not in records]
    with JsonlWriter(path) as writer:
        for start in range(0, len(todo), config.chunk):
            part = todo[start : start + config.chunk]
            for record in predict_groups(part, predictor, config.num_traced):
                writer.write(record)
                records[record["id"]] = record
            progress(EVALUATION, total - len(todo) + start + len(part), total)
    return summarise(folder, records, groups, manifest)


def read_groups(config: PredictionConfig) -> Groups:
    """The prompts that a run predicts, and those that fit its baselines."""
    return load_groups(
        config.files,
        split=config.split,
        min_completions=config.min_completions,
        limit=config.limit,
    )


def regrade_prediction(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Grade a folder's records again. The trajectory files are read for the baselines."""
    manifest = load_config(folder, EVALUATION)
    if {f.name: hash_file(f) for f in files} != manifest["files"]:
        raise DataError(
            f"{folder} was made from {', '.join(manifest['files'])}; give the same, unchanged files"
        )
    keys = ("split", "min_completions", "limit")
    groups = load_groups(files, **{k: manifest[k] for k in keys})
    return summarise(folder, load_records(folder), groups, manifest)


def predict_groups(
    groups: Sequence[PromptGroup], predictor: Predictor, num_traced: int
) -> list[Record]:
    """One record per prompt: the belief at its end, and at relative positions of completions.

    The prompt's own belief is the first position of its first completion: one reading gives both.
    """
    sequences, positions, images = [], [], []
    for group in groups:
        last = len(group.prompt_token_ids) - 1
        for ids in group.completions[:num_traced] or [[]]:
            places = [last + int(at * len(ids)) for at in POSITIONS]
            sequences.append([*group.prompt_token_ids, *ids][: places[-1] + 1])
            positions.append(places)
            images.append(group.images)
    found = iter(predictor.read(sequences, positions, images))
    records = []
    for group in groups:
        traced = group.completions[:num_traced]
        beliefs = [next(found) for _ in traced or [[]]]
        points = [
            point
            for sample, (ids, row) in enumerate(zip(traced, beliefs, strict=False))
            for point in _trace(sample, len(ids), row)
        ]
        records.append(_to_record(group, beliefs[0][0], points))
    return records


def _trace(sample: int, length: int, beliefs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "sample": sample,
            "at": at,
            "step": int(at * length),
            "remaining": length - int(at * length),
            "predicted": belief.get("geometric_mean", belief["length"]),
        }
        for at, belief in zip(POSITIONS, beliefs, strict=True)
    ]


def _to_record(
    group: PromptGroup, prediction: dict[str, Any], points: list[dict[str, Any]]
) -> Record:
    return {
        "schema": RECORD_SCHEMA,
        "id": group.id,
        "domain": group.domain,
        "prompt_text": group.text[:500],
        "prompt_tokens": len(group.prompt_token_ids),
        "lengths": group.lengths,
        "censored": group.censored,
        "prediction": prediction,
        "positions": points,
    }


def summarise(
    folder: Path, records: dict[str, Record], groups: Groups, manifest: dict[str, Any]
) -> dict[str, Any]:
    """grades.jsonl and summary.json from records; returns the summary."""
    gamma, head = manifest["gamma"], manifest["head"]
    baselines, fitted_on = predict_baselines(groups.evaluated, groups.training, gamma)
    grades = [
        grade_prompt(
            {"censored": group.censored, **records[group.id]},  # older records do not tell
            {n: float(b[i]) for n, b in baselines.items()},
            gamma,
            head,
        )
        for i, group in enumerate(groups.evaluated)
    ]
    counts = {g.id: len(g.completions) for g in groups.evaluated}
    domains = ["all", *sorted({g["domain"] for g in grades})]
    tables = {}
    for domain in domains:
        rows = [g for g in grades if domain in ("all", g["domain"])]
        tables[domain] = summarise_domain(rows, sum(counts[g["id"]] for g in rows))
    censored = sum(len(g.censored) for g in groups.evaluated)
    return write_results(
        folder,
        EVALUATION,
        model=manifest["model"],
        config=manifest,
        grades=grades,
        notes=_notes(groups, censored),
        summary={
            "gamma": gamma,
            "head": head,
            "num_prompts": len(grades),
            "num_completions": sum(counts.values()),
            "num_censored": censored,
            "num_guided": groups.num_guided,
            "baseline_fit": fitted_on,
            "domains": tables,
        },
    )


def _notes(groups: Groups, num_censored: int) -> list[str]:
    found = {
        f"{num_censored} completions were cut off; their lengths are not known, so true lengths "
        "leave them out, which makes them look shorter; coverage counts those that had grown past "
        "an interval when they were cut off": num_censored,
        f"{groups.num_guided} guided completions are left out": groups.num_guided,
        f"{groups.num_too_few} prompts have too few complete completions": groups.num_too_few,
    }
    return [sentence for sentence, count in found.items() if count]


def hash_file(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256. DataError where it does not exist."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    return digest.hexdigest()[:16]
