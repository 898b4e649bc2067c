"""`lenvm eval lifebench`: arms x constraints x targets x items x samples, scores and quality."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from lenvm.errors import InputError
from lenvm.evals.arms import Arm
from lenvm.evals.bootstrap import Resampler
from lenvm.evals.generator import Generator, Sampling
from lenvm.evals.judge import Judge, load_judgements
from lenvm.evals.lifebench.arms import ArmSettings, applies, build_request, strip_countdown
from lenvm.evals.lifebench.grading import Grade, grade_record, summarise_arm
from lenvm.evals.lifebench.items import (
    CONSTRAINTS,
    UNITS,
    Constraint,
    LifebenchItem,
    Unit,
    load_lifebench,
)
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

EVALUATION = "lifebench"


@dataclass(frozen=True)
class LifebenchConfig:
    """What a run measures. The folder's manifest holds it; another one is refused there."""

    file: Path
    """A LIFEBench file."""
    arms: tuple[Arm, ...]
    constraints: tuple[Constraint, ...] = ("equal_to",)
    targets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    unit: Unit = "tokens"
    num_samples: int = 1
    limit: int | None = None
    """This many items, spread evenly over the file; None = all."""
    max_tokens: int | None = None
    """The same for every arm (but truncation); None = twice the largest target, at least 2,048."""
    sampling: Sampling = field(default_factory=lambda: Sampling(top_p=0.999, top_k=15))
    tokens_per_unit: float | None = None
    control: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets or min(self.targets) < 1:
            raise InputError(f"targets are {self.targets}; each must be at least 1")
        if self.unit not in UNITS:
            raise InputError(f"unit is {self.unit!r}; allowed: {', '.join(UNITS)}")
        unknown = [c for c in self.constraints if c not in CONSTRAINTS]
        if unknown or not self.constraints:
            raise InputError(f"constraints are {unknown}; allowed: {', '.join(CONSTRAINTS)}")
        if self.num_samples < 1:
            raise InputError(f"samples is {self.num_samples}; it must be at least 1")

    def settings(self) -> ArmSettings:
        largest = max(self.targets)
        if self.unit != "tokens":
            largest = round(largest * (self.tokens_per_unit or 1.35))
        return ArmSettings(
            sampling=self.sampling,
            max_tokens=self.max_tokens or max(2048, 2 * largest),
            unit=self.unit,
            tokens_per_unit=self.tokens_per_unit,
            control=self.control,
        )

    def to_json(self, model: str) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **values,
            "file": self.file.name,
            "file_sha256": hashlib.sha256(self.file.read_bytes()).hexdigest()[:16],
            "arms": [arm.name for arm in self.arms],
            "sampling": self.sampling.to_json(),
            "max_tokens": self.settings().max_tokens,
            "control": dict(self.control),
            "model": model,
        }


def run_lifebench(
    config: LifebenchConfig,
    generator: Generator,
    folder: Path,
    *,
    judge: Judge | None = None,
    allow_missing: bool = False,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """Answer what is missing, grade everything, write the folder; returns the summary. What the
    generator leaves out has failed, or with `allow_missing` waits for the next run.

    Raises DataError for a bad file, InputError for a target over the server's limit or a folder of
    another configuration.
    """
    items = load_lifebench(config.file, limit=config.limit)
    check_limit(config, generator)
    skipped = {arm.name: _why_skipped(arm, config, generator) for arm in config.arms}
    active = [arm for arm in config.arms if skipped[arm.name] is None]
    cases = _build_cases(config, items, active)
    manifest = config.to_json(generator.model)
    graded: dict[str, Grade] = {}

    def grade(record: Record) -> None:
        """While the server works on other answers: grading then costs no time of its own."""
        graded[record["id"]] = grade_record(record)

    records = run_cases(
        folder,
        EVALUATION,
        manifest,
        cases,
        generator,
        progress=progress,
        on_record=grade,
        allow_missing=allow_missing,
    )
    if judge is not None:
        judge.score(folder, [r for r in records if r["error"] is None], progress=progress)
    return summarise(folder, records, manifest, skipped, graded)


def regrade_lifebench(folder: Path) -> dict[str, Any]:
    """Grade a folder's records again, without a request. Skipped arms keep their sentences."""
    from lenvm.files import read_json

    manifest = load_config(folder, EVALUATION)
    earlier = folder / "summary.json"
    arms = read_json(earlier)["arms"] if earlier.exists() else []
    skipped = dict.fromkeys(manifest["arms"]) | {a["arm"]: a["skipped"] for a in arms}
    return summarise(folder, list(load_records(folder).values()), manifest, skipped)


def summarise(
    folder: Path,
    records: Sequence[Record],
    manifest: Mapping[str, Any],
    skipped: Mapping[str, str | None],
    graded: Mapping[str, Grade] | None = None,
) -> dict[str, Any]:
    """grades.jsonl and summary.json from records; returns the summary.

    `graded`: grades that are there already, by record id; the others are made.
    """
    judgements, known = load_judgements(folder), graded or {}
    grades = [
        {**(known.get(r["id"]) or grade_record(r)), "judge": judgements.get(r["id"])}
        for r in records
    ]
    resampler = Resampler([g["item"] for g in grades])
    reference = [g for g in grades if g["arm"] == "prompt"]
    arms = []
    for name, reason in skipped.items():
        rows = [g for g in grades if g["arm"] == name]
        arm = Arm.read(name)
        arms.append(
            {
                "arm": name,
                "label": arm.label,
                "family": arm.kind,
                "parameter": arm.parameter,
                "skipped": reason,
                "num_requests": len(rows),
                "num_failed": sum(g["failed"] for g in rows),
                **summarise_arm(rows, reference, resampler),
            }
        )
    notes = [f"{name} did not run: {reason}" for name, reason in skipped.items() if reason]
    notes += note_missing(
        grades,
        [name for name, reason in skipped.items() if not reason],
        ("constraint", "target", "item", "sample"),
        lambda name, grade: applies(Arm.read(name), grade["constraint"]),
    )
    for name in skipped:
        answers = [g for g in grades if g["arm"] == name and not g["failed"]]
        if answers and all(g["log_prob"] is None for g in answers):
            notes.append(f"{name}: the server reports no log-probabilities of the generator itself")
    return write_results(
        folder,
        EVALUATION,
        model=manifest["model"],
        config=manifest,
        grades=grades,
        num_failed=sum(g["failed"] for g in grades),
        notes=notes,
        summary={
            "unit": manifest["unit"],
            "targets": manifest["targets"],
            "num_items": len({g["item"] for g in grades}),
            "arms": arms,
        },
    )


def check_limit(config: LifebenchConfig, generator: Generator) -> None:
    """InputError where a target cannot fit the server's limit."""
    limit, settings = generator.max_length, config.settings()
    if limit is None:
        return
    over = [t for t in config.targets if settings.to_tokens(t, "en") >= limit]
    if over:
        raise InputError(
            f"targets {', '.join(map(str, over))} {config.unit} are over the limit of {limit} "
            f"tokens of {generator.model}, prompt included; leave them out"
        )
    if settings.max_tokens >= limit:
        raise InputError(
            f"max_tokens {settings.max_tokens} leaves no room for a prompt: {generator.model} "
            f"takes {limit} tokens, prompt included; lower max_tokens"
        )


def _why_skipped(arm: Arm, config: LifebenchConfig, generator: Generator) -> str | None:
    if not any(applies(arm, constraint) for constraint in config.constraints):
        return "cutting an answer off cannot make it longer"
    if arm.kind == "countdown" and config.unit == "tokens":
        return generator.lacks("count_tokens")
    return arm.why_skipped(generator)


def _build_cases(
    config: LifebenchConfig, items: Sequence[LifebenchItem], arms: Sequence[Arm]
) -> Iterator[Case]:
    settings = config.settings()
    samples = range(config.num_samples)
    for arm in arms:
        constraints = [c for c in config.constraints if applies(arm, c)]
        counts_text = arm.kind == "countdown" and config.unit == "tokens"
        for constraint, target, item, sample in product(
            constraints, config.targets, items, samples
        ):
            case_id = f"{arm.name}/{item.id}/{constraint}-{target}/{sample}"
            yield Case(
                arm=arm.name,
                item=item.id,
                sample=sample,
                request=build_request(arm, item, constraint, target, settings, case_id),
                fields={
                    "constraint": constraint,
                    "target": target,
                    "unit": config.unit,
                    "category": item.category,
                    "type": item.type,
                    "language": item.language,
                    "prompt": item.prompt(constraint, target, config.unit),
                },
                count_visible=strip_countdown if counts_text else None,
            )
