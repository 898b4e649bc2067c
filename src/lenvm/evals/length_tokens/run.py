"""`lenvm eval length-tokens`: TD residuals of completions, token by token; positive = longer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.data.images import read_with_images
from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError, InputError
from lenvm.evals.length_tokens.statistics import build_tables, count_tokens
from lenvm.evals.length_tokens.tokens import token_texts
from lenvm.evals.prediction.predictors import Predictor
from lenvm.evals.prediction.run import hash_file
from lenvm.evals.runner import (
    Progress,
    Record,
    ignore_progress,
    load_config,
    load_records,
    write_results,
)
from lenvm.files import JsonlWriter, claim

EVALUATION = "length-tokens"
RECORD_SCHEMA = "lenvm.eval.length_tokens/1"


@dataclass(frozen=True)
class LengthTokensConfig:
    """What is read, and how it is counted. The second half may change without reading again."""

    files: tuple[Path, ...]
    split: str = "test"
    limit: int | None = None
    """This many completions, spread evenly over the files; None = all."""
    chunk: int = 8

    threshold: float = 0.01
    """|gain| beyond which an occurrence is an event."""
    merge: bool = True
    """Fold case and leading space."""
    min_count: int = 5
    top: int = 100
    num_contexts: int = 3

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation", "test", "all"):
            raise InputError(f"split is {self.split!r}; allowed: train, validation, test, all")
        if self.threshold < 0 or self.min_count < 1 or self.top < 1 or self.num_contexts < 0:
            raise InputError(
                f"threshold {self.threshold} and contexts {self.num_contexts} must be at least 0, "
                f"min_count {self.min_count} and top {self.top} at least 1"
            )

    def to_json(self, predictor: Predictor) -> dict[str, Any]:
        return {
            "files": {f.name: hash_file(f) for f in self.files},
            "split": self.split,
            "limit": self.limit,
            "model": predictor.name,
            "gamma": predictor.gamma,
            "head": predictor.head,
        }


def run_length_tokens(
    config: LengthTokensConfig,
    predictor: Predictor,
    tokenizer: Any,
    folder: Path,
    *,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """Read what is missing, count everything, write the folder; returns the summary."""
    manifest = config.to_json(predictor)
    manifest["special_ids"] = sorted(set(tokenizer.all_special_ids))
    wanted = _select(config)
    path = folder / "records.jsonl"
    claim(path, f"eval.{EVALUATION}", manifest)
    records = load_records(folder) if path.exists() else {}
    todo = [t for t in wanted if t.id not in records]
    with JsonlWriter(path) as writer:
        for start in range(0, len(todo), config.chunk):
            part = todo[start : start + config.chunk]
            for record in read_gains(part, predictor, tokenizer):
                writer.write(record)
                records[record["id"]] = record
            progress(EVALUATION, len(wanted) - len(todo) + start + len(part), len(wanted))
    return summarise(folder, records, manifest, config)


def regrade_length_tokens(folder: Path, config: LengthTokensConfig) -> dict[str, Any]:
    """Count a folder's records again, with another threshold, merging or minimum."""
    manifest = load_config(folder, EVALUATION)
    return summarise(folder, load_records(folder), manifest, config)


def read_gains(
    trajectories: Sequence[Trajectory], predictor: Predictor, tokenizer: Any
) -> list[Record]:
    """One record per completion: its tokens and their gains.

    The last token of a completion that was cut off has no gain (None): what follows is not known.
    """
    import torch

    from lenvm.returns import compute_td_residuals

    sequences, positions = [], []
    for t in trajectories:
        first = len(t.prompt_token_ids) - 1
        sequences.append([*t.prompt_token_ids, *t.completion_token_ids[:-1]])
        positions.append(list(range(first, first + t.length)))
    beliefs_of = predictor.read(sequences, positions, [t.images for t in trajectories])
    records = []
    for t, beliefs in zip(trajectories, beliefs_of, strict=True):
        values = torch.tensor([belief["value"] for belief in beliefs])
        gains: list[float | None] = [
            round(g, 7) for g in (-compute_td_residuals(values, predictor.gamma)).tolist()
        ]
        if not t.is_complete:
            gains[-1] = None
        records.append(
            {
                "schema": RECORD_SCHEMA,
                "id": t.id,
                "domain": t.domain,
                "token_ids": t.completion_token_ids,
                "tokens": token_texts(tokenizer, t.completion_token_ids),
                "gains": gains,
            }
        )
    return records


def summarise(
    folder: Path,
    records: dict[str, Record],
    manifest: dict[str, Any],
    config: LengthTokensConfig,
) -> dict[str, Any]:
    """summary.json from records; returns the summary. grades.jsonl counts every token."""
    special = frozenset(manifest["special_ids"])
    counts = count_tokens(
        records.values(),
        threshold=config.threshold,
        merge=config.merge,
        special_ids=special,
        num_contexts=config.num_contexts,
    )
    tables = build_tables(counts, records, min_count=config.min_count, top=config.top)
    grades = [
        {
            "token": key,
            "num": c.num,
            "mean_gain": c.mean_gain,
            "num_longer": c.num_events[1],
            "num_shorter": c.num_events[-1],
        }
        for key, c in counts.items()
    ]
    return write_results(
        folder,
        EVALUATION,
        model=manifest["model"],
        config=manifest,
        grades=grades,
        summary={
            "gamma": manifest["gamma"],
            "sign": "gain = -TD residual; positive = the token makes the expected answer longer",
            "threshold": config.threshold,
            "merged": config.merge,
            "min_count": config.min_count,
            "num_completions": len(records),
            "num_tokens": sum(c.num for c in counts.values()),
            **tables,
        },
    )


def _select(config: LengthTokensConfig) -> list[Trajectory]:
    """Unguided completions of the split. DataError where there is none."""
    if config.limit is None:
        found = list(_unguided(config))
    else:  # evenly over the files: samplers append what ends first, so the first ones are short
        count = sum(1 for _ in _unguided(config))
        limit = min(config.limit, count)
        chosen = {i * count // limit for i in range(limit)}
        found = [t for i, t in enumerate(_unguided(config)) if i in chosen]
    if not found:
        raise DataError(f"the files hold no unguided completion of split {config.split!r}")
    return found


def _unguided(config: LengthTokensConfig) -> Iterator[Trajectory]:
    for trajectory in read_with_images(*config.files):
        if config.split in ("all", trajectory.split) and trajectory.length_control is None:
            yield trajectory
