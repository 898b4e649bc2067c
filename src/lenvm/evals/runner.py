"""The one runner: cases -> requests -> records.jsonl, resumable; grades.jsonl and summary.json.

An evaluation makes `Case`s (arms x items x samples), `run_cases` answers those that have no answer
yet, and the evaluation turns records into grades and a summary. Only `run_cases` sends requests.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lenvm.errors import DataError
from lenvm.evals.generator import GenerationRequest, GenerationResponse, Generator
from lenvm.files import JsonlWriter, claim, read_json, read_jsonl, write_bytes, write_json

RECORD_SCHEMA = "lenvm.eval.record/1"
SUMMARY_SCHEMA = "lenvm.eval.summary/1"
Record = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Case:
    """One answer that an evaluation needs. `request.id` is the case's id."""

    arm: str
    item: str
    sample: int
    request: GenerationRequest
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What grading needs, stored in the record as `case`."""
    cluster: str = ""
    """What is resampled for intervals; "" = the item."""
    count_visible: Callable[[str], str] | None = None
    """Text -> the text that counts; its tokens are stored as `visible_tokens`."""

    @property
    def id(self) -> str:
        return self.request.id


def run_cases(
    folder: Path,
    evaluation: str,
    config: Mapping[str, Any],
    cases: Iterable[Case],
    generator: Generator,
    *,
    progress: Progress = ignore_progress,
    on_record: Callable[[Record], None] = lambda record: None,
    allow_missing: bool = False,
) -> list[Record]:
    """Answer the cases that `folder/records.jsonl` has no good answer for; all records, in order.

    `on_record` gets each new record while others are still being answered. What failed earlier is
    asked again. A case that the generator leaves out has failed; with `allow_missing` (a generator
    that stops when its time is over) it is left to the next run, without a record. Raises
    InputError where the folder holds another configuration, EndpointError where the server stops
    answering (what is done is kept).
    """
    path = folder / "records.jsonl"
    claim(path, f"eval.{evaluation}", config)
    records = load_records(folder) if path.exists() else {}
    wanted = {case.id: case for case in cases}
    todo = [c for c in wanted.values() if records.get(c.id, {"error": ""})["error"] is not None]
    done = len(wanted) - len(todo)
    progress(evaluation, done, len(wanted))
    with JsonlWriter(path) as writer:

        def keep(response: GenerationResponse) -> None:
            record = _to_record(wanted[response.id], response, generator)
            writer.write(record)
            records[response.id] = record
            on_record(record)
            nonlocal done
            done += 1
            progress(evaluation, done, len(wanted))

        if todo:
            generator.generate((_seeded(case.request) for case in todo), keep)
        for case in () if allow_missing else todo:
            if case.id not in records:
                keep(GenerationResponse(case.id, error="the generator gave no answer"))
    return [records[case_id] for case_id in wanted if case_id in records]


def load_records(folder: Path) -> dict[str, Record]:
    """Records of a folder by id; of several with one id the last counts. DataError names a line."""
    records: dict[str, Record] = {}
    for number, row in read_jsonl(folder / "records.jsonl"):
        if not str(row.get("schema", "")).startswith("lenvm.eval.") or "id" not in row:
            raise DataError(f"{folder / 'records.jsonl'}:{number}: not a record of an evaluation")
        records[row["id"]] = row
    return records


def load_config(folder: Path, evaluation: str) -> dict[str, Any]:
    """The configuration that made a folder. DataError where it holds another evaluation."""
    manifest = read_json(folder / "records.jsonl.manifest.json")
    if manifest.get("kind") != f"eval.{evaluation}":
        raise DataError(f"{folder} holds {manifest.get('kind')!r}, not 'eval.{evaluation}'")
    return dict(manifest["config"])


def note_missing(
    grades: Sequence[Mapping[str, Any]],
    arms: Iterable[str],
    fields: Sequence[str],
    applies: Callable[[str, Mapping[str, Any]], bool] = lambda arm, grade: True,
) -> list[str]:
    """A sentence for each arm that lacks requests which another has: the run was stopped.

    `fields` tell requests of one arm apart; `applies`: whether an arm is asked what a grade was.
    """
    every = {tuple(g[f] for f in fields): g for g in grades}
    found: dict[str, int] = {}
    for grade in grades:
        found[grade["arm"]] = found.get(grade["arm"], 0) + 1
    notes = []
    for arm in arms:
        wanted = sum(applies(arm, grade) for grade in every.values())
        if (missing := wanted - found.get(arm, 0)) > 0:
            notes.append(
                f"{arm}: {missing} of {wanted} requests were not sent, the run was stopped; the "
                "same command continues it (without --regrade)"
            )
    return notes


def write_results(
    folder: Path,
    evaluation: str,
    *,
    model: str,
    config: Mapping[str, Any],
    grades: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    num_failed: int = 0,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Replace grades.jsonl and summary.json; returns the summary."""
    from lenvm import __version__

    lines = [encode_line(grade) for grade in grades]
    write_bytes(folder / "grades.jsonl", b"".join(line + b"\n" for line in lines))
    whole = {
        "schema": SUMMARY_SCHEMA,
        "evaluation": evaluation,
        "model": model,
        "lenvm_version": __version__,
        "config": dict(config),
        "num_records": len(grades),
        "num_failed": num_failed,
        "notes": list(notes),
        **summary,
    }
    write_json(folder / "summary.json", whole)
    return dict(read_json(folder / "summary.json"))


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One JSON line without its newline."""
    import json

    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _seeded(request: GenerationRequest) -> GenerationRequest:
    """The request with its own seed, made from the run's seed and its id."""
    sampling = request.sampling
    if sampling.seed is None:
        return request
    seed = zlib.crc32(f"{sampling.seed}/{request.id}".encode())
    return replace(request, sampling=replace(sampling, seed=seed))


def _to_record(case: Case, response: GenerationResponse, generator: Generator) -> Record:
    visible = None
    if case.count_visible is not None and response.error is None:
        visible = generator.count_tokens(case.count_visible(response.text))
    return {
        "schema": RECORD_SCHEMA,
        "id": case.id,
        "arm": case.arm,
        "item": case.item,
        "cluster": case.cluster or case.item,
        "sample": case.sample,
        "case": dict(case.fields),
        "text": response.text,
        "num_tokens": response.num_tokens,
        "num_prompt_tokens": response.num_prompt_tokens,
        "finish_reason": response.finish_reason,
        "mean_log_prob": response.mean_log_prob,
        "last_log_prob": response.last_log_prob,
        "visible_tokens": visible,
        "latency_s": round(response.latency_s, 4),
        "error": response.error,
    }
