"""`lenvm eval tradeoff`: questions x arms x samples, graded; accuracy against length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lenvm.errors import InputError
from lenvm.evals.arms import Arm
from lenvm.evals.generator import Generator, Sampling
from lenvm.evals.runner import (
    Case,
    Progress,
    Record,
    ignore_progress,
    load_config,
    load_records,
    note_missing,
    run_cases,
    write_results,
)
from lenvm.evals.tradeoff.arms import FORCED_TOKENS, ArmSettings, build_request, force_answer
from lenvm.evals.tradeoff.grading import FORCED, grade_records, summarise_grades
from lenvm.evals.tradeoff.items import Question, hash_questions, load_questions

EVALUATION = "tradeoff"


@dataclass(frozen=True)
class TradeoffConfig:
    """What a run measures."""

    source: str
    """A file, a name (gsm8k, math500, aime24, aime25, amc23, mathvista ...) or a hub name."""
    arms: tuple[Arm, ...]
    num_samples: int = 4
    limit: int | None = None
    max_tokens: int = 1024
    sampling: Sampling = field(default_factory=lambda: Sampling(min_p=0.01))
    control: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.max_tokens < 1:
            raise InputError(
                f"samples {self.num_samples}, max_tokens {self.max_tokens}: both must be at least 1"
            )

    def to_json(self, model: str, questions: list[Question]) -> dict[str, Any]:
        return {
            "source": Path(self.source).name,
            "questions": hash_questions(
                [replace(q, image=q.image and Path(q.image).name) for q in questions]
            ),
            "arms": [arm.name for arm in self.arms],
            "num_samples": self.num_samples,
            "limit": self.limit,
            "max_tokens": self.max_tokens,
            "sampling": self.sampling.to_json(),
            "control": self.control,
            "model": model,
        }


def run_tradeoff(
    config: TradeoffConfig,
    generator: Generator,
    folder: Path,
    *,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """Answer what is missing, grade everything, write the folder; returns the summary."""
    records, manifest, skipped = answer_questions(config, generator, folder, progress=progress)
    return summarise(folder, records, manifest, skipped, progress=progress)


def answer_questions(
    config: TradeoffConfig,
    generator: Generator,
    folder: Path,
    *,
    allow_missing: bool = False,
    progress: Progress = ignore_progress,
) -> tuple[list[Record], dict[str, Any], dict[str, str | None]]:
    """Answer what is missing, without grading: (records, manifest, why arms were skipped). What the
    generator leaves out has failed, or with `allow_missing` waits for the next run.

    `regrade_tradeoff` grades the folder, on any machine.
    """
    questions = load_questions(config.source, limit=config.limit)
    check_limit(config, generator)
    skipped = {arm.name: arm.why_skipped(generator) for arm in config.arms}
    active = [arm for arm in config.arms if skipped[arm.name] is None]
    manifest = config.to_json(generator.model, questions)
    cases = list(_build_cases(config, questions, active))
    options: dict[str, Any] = {"progress": progress, "allow_missing": allow_missing}
    records = run_cases(folder, EVALUATION, manifest, cases, generator, **options)
    follow_ups = list(_force_answers(cases, records))
    if follow_ups:
        records += run_cases(folder, EVALUATION, manifest, follow_ups, generator, **options)
    return records, manifest, skipped


def regrade_tradeoff(folder: Path, *, progress: Progress = ignore_progress) -> dict[str, Any]:
    """Grade a folder's records again, without a request."""
    from lenvm.files import read_json

    manifest = load_config(folder, EVALUATION)
    earlier = folder / "summary.json"
    arms = read_json(earlier)["arms"] if earlier.exists() else []
    skipped = dict.fromkeys(manifest["arms"]) | {a["arm"]: a["skipped"] for a in arms}
    records = list(load_records(folder).values())
    return summarise(folder, records, manifest, skipped, progress=progress)


def summarise(
    folder: Path,
    records: Sequence[Record],
    manifest: Mapping[str, Any],
    skipped: Mapping[str, str | None],
    *,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """grades.jsonl and summary.json from records; returns the summary."""
    grades = grade_records(records, on_progress=lambda done, total: progress("grade", done, total))
    arms = [Arm.read(name) for name in skipped]
    notes = [f"{name} did not run: {reason}" for name, reason in skipped.items() if reason]
    notes += note_missing(grades, [a for a, why in skipped.items() if not why], ("item", "sample"))
    errors = sum(g["grader_error"] is not None for g in grades)
    if errors:
        notes.append(f"{errors} answers could not be graded and count as wrong (grader_error)")
    return write_results(
        folder,
        EVALUATION,
        model=manifest["model"],
        config=manifest,
        grades=grades,
        num_failed=sum(g["failed"] for g in grades),
        notes=notes,
        summary={
            "benchmark": manifest["source"],
            "num_items": len({g["item"] for g in grades}),
            "num_samples": manifest["num_samples"],
            "num_grader_errors": errors,
            **summarise_grades(grades, arms, skipped),
        },
    )


def check_limit(config: TradeoffConfig, generator: Generator) -> None:
    """InputError where max_tokens leaves no room for a prompt."""
    limit = generator.max_length
    if limit is not None and config.max_tokens >= limit:
        raise InputError(
            f"max_tokens {config.max_tokens} leaves no room for a prompt: {generator.model} takes "
            f"{limit} tokens, prompt included; lower max_tokens"
        )


def _build_cases(
    config: TradeoffConfig, questions: Sequence[Question], arms: Sequence[Arm]
) -> Iterator[Case]:
    settings = ArmSettings(config.sampling, config.max_tokens, config.control)
    for arm in arms:
        for question in questions:
            for sample in range(config.num_samples):
                case_id = f"{arm.name}/{question.id}/{sample}"
                yield Case(
                    arm=arm.name,
                    item=question.id,
                    sample=sample,
                    request=build_request(arm, question, settings, case_id),
                    fields={
                        "gold": question.gold,
                        "kind": question.kind,
                        "options": list(question.options),
                        "question": question.question[:2000],
                        "forced": False,
                    },
                )


def _force_answers(cases: Sequence[Case], records: Sequence[Record]) -> Iterator[Case]:
    """The second requests of `budget_answer`: drafts that were cut off are made to answer."""
    of_case = {case.id: case for case in cases}
    for record in records:
        case = of_case[record["id"]]
        cut = record["error"] is None and record["finish_reason"] == "length"
        if not case.arm.startswith("budget_answer") or not cut:
            continue
        request = replace(
            case.request,
            id=case.id + FORCED,
            max_tokens=FORCED_TOKENS,
            answer_prefix=force_answer(record["text"]),
        )
        yield replace(
            case, request=request, fields={**case.fields, "forced": True}, cluster=case.item
        )
