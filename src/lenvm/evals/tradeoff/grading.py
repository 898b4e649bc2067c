"""Trade-off records -> grades -> the numbers of summary.json. Grading runs in other processes."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from lenvm.evals.arms import Arm
from lenvm.evals.bootstrap import Estimate, Resampler
from lenvm.evals.quality import has_words, measure_record, summarise_quality
from lenvm.evals.tradeoff.arms import OWN, end_of_box, force_answer
from lenvm.evals.tradeoff.curves import (
    Point,
    accuracy_at,
    area_between,
    group_curves,
    pareto_front,
    pass_at_k,
)
from lenvm.evals.tradeoff.grading_pool import Task, grade_all

Grade = dict[str, Any]
Record = Mapping[str, Any]
FRACTIONS = (0.5, 2 / 3, 0.75, 0.9)
DRAFT, FORCED = "", "/forced"


def grade_records(
    records: Sequence[Record], *, on_progress: Callable[[int, int], None] = lambda d, t: None
) -> list[Grade]:
    """One grade per answer. A draft and its forced answer are one answer."""
    forced = {r["id"].removesuffix(FORCED): r for r in records if r["case"]["forced"]}
    drafts = [r for r in records if not r["case"]["forced"]]
    answers = [join_forced(r, forced.get(r["id"])) for r in drafts]
    gradable = [a for a in answers if a["error"] is None]
    tasks = [
        Task(
            text=a["text"],
            gold=a["case"]["gold"],
            kind=a["case"]["kind"],
            options=tuple(a["case"]["options"]),
            complete=a["finish_reason"] == "stop",
        )
        for a in gradable
    ]
    results = dict(
        zip([a["id"] for a in gradable], grade_all(tasks, on_progress=on_progress), strict=True)
    )
    wrong = {"correct": False, "extracted": None, "grader_error": None}
    return [
        {
            "id": a["id"],
            "arm": a["arm"],
            "item": a["item"],
            "sample": a["sample"],
            "failed": a["error"] is not None,
            "num_tokens": a["num_tokens"],
            "truncated": a["finish_reason"] == "length",
            **results.get(a["id"], wrong),
            **measure_record(a, a["text"], answered=a["error"] is None and has_words(a["text"])),
        }
        for a in answers
    ]


def join_forced(draft: Record, forced: Record | None) -> dict[str, Any]:
    """The answer of a draft and its continuation: both texts, both lengths.

    The continuation counts up to the brace that closes the forced box, its tokens in proportion. A
    draft whose continuation failed is a failed answer. The log-probability is the draft's.
    """
    answer = dict(draft)
    if forced is not None:
        end = end_of_box(forced["text"])
        share = end / len(forced["text"]) if forced["text"] else 1.0
        answer |= {
            "latency_s": draft["latency_s"] + forced["latency_s"],
            "text": force_answer(draft["text"]) + forced["text"][:end],
            "num_tokens": draft["num_tokens"] + ceil(forced["num_tokens"] * share),
            "error": forced["error"],
        }
    return answer


def summarise_grades(
    grades: Sequence[Grade], arms: Sequence[Arm], skipped: Mapping[str, str | None]
) -> dict[str, Any]:
    """Arms, Pareto front, curves and areas of a summary."""
    resampler = Resampler([g["item"] for g in grades])
    by_arm = {arm.name: [g for g in grades if g["arm"] == arm.name] for arm in arms}
    points = {
        arm.name: Point(arm.name, *_estimates(by_arm[arm.name], resampler))
        for arm in arms
        if any(not g["failed"] for g in by_arm[arm.name])
    }
    reference = points.get("prompt")
    rows = []
    for arm in arms:
        own = by_arm[arm.name]
        rows.append(
            {
                "arm": arm.name,
                "label": "unguided" if arm.kind == "prompt" else arm.label,
                "family": family_of(arm),
                "parameter": arm.parameter,
                "skipped": skipped[arm.name],
                "num_requests": len(own),
                "num_failed": sum(g["failed"] for g in own),
                **(_arm_numbers(own, points.get(arm.name), reference, resampler)),
                "quality": summarise_quality(own, by_arm.get("prompt", []), resampler)
                if own
                else None,
            }
        )
    return {
        "arms": rows,
        "pareto": pareto_front(list(points.values())),
        **_compare(arms, points, reference),
    }


def family_of(arm: Arm) -> str:
    """The curve that an arm is a point of."""
    return "unguided" if arm.kind == "prompt" else arm.kind


def _estimates(rows: Sequence[Grade], r: Resampler) -> tuple[Estimate, Estimate]:
    """(mean length over answers, accuracy over all requests)."""
    answered = [g for g in rows if not g["failed"]]
    return (
        r.mean([g["num_tokens"] for g in answered], [g["item"] for g in answered]),
        r.mean([g["correct"] for g in rows], [g["item"] for g in rows]),
    )


def _arm_numbers(
    rows: Sequence[Grade], point: Point | None, reference: Point | None, r: Resampler
) -> dict[str, Any]:
    names = ("pass_at_1", "pass_at_k", "mean_length", "relative_length", "truncated")
    if not rows:
        return dict.fromkeys(names)
    items: dict[str, list[bool]] = {}
    for grade in rows:
        items.setdefault(grade["item"], []).append(grade["correct"])
    most = min(len(row) for row in items.values())
    passes = {
        str(k): r.mean(
            [pass_at_k(len(v), sum(v), k) for v in items.values()], list(items)
        ).to_json()
        for k in sorted({1, 2, 4, 8, 16, 32, 64, most})
        if k <= most
    }
    answered = [g for g in rows if not g["failed"]]
    relative = point.length / reference.length if point and reference else None
    return {
        "pass_at_1": r.mean([g["correct"] for g in rows], [g["item"] for g in rows]).to_json(),
        "pass_at_k": passes,
        "mean_length": point.length.to_json() if point else None,
        "relative_length": relative.to_json() if relative else None,
        "truncated": r.mean(
            [g["truncated"] for g in answered], [g["item"] for g in answered]
        ).to_json(),
    }


def _compare(
    arms: Sequence[Arm], points: Mapping[str, Point], reference: Point | None
) -> dict[str, Any]:
    """Curves and areas; empty without the unguided arm, which ends every curve."""
    if reference is None:
        return {"curves": {}, "area_between": []}
    by_family: dict[str, list[Point]] = {}
    for arm in arms:
        if arm.kind != "prompt" and arm.name in points:
            by_family.setdefault(family_of(arm), []).append(points[arm.name])
    curves = group_curves(by_family, reference)
    tables = {}
    for family, curve in curves.items():
        at = []
        for fraction in FRACTIONS:
            length = Estimate(
                reference.length.value * fraction,
                reference.length.samples * fraction,
                reference.length.num_clusters,
            )
            found = accuracy_at(curve, length)
            at.append(
                {
                    "fraction": round(fraction, 3),
                    "length": length.value,
                    "accuracy": found.to_json() if found else None,
                }
            )
        tables[family] = {"arms": [p.arm for p in curve], "accuracy_at": at}
    areas = []
    for family in [f for f in curves if f in OWN]:
        for other in [f for f in curves if f != family]:
            if (area := area_between(curves[family], curves[other])) is not None:
                areas.append(
                    {
                        "family": family,
                        "against": other,
                        "from": area[0],
                        "to": area[1],
                        "area": area[2].to_json(),
                    }
                )
    return {"curves": tables, "area_between": areas}
