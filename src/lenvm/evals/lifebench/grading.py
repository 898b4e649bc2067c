"""LIFEBench records -> grades -> the numbers of summary.json. No requests, so it can run again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lenvm.evals.bootstrap import Estimate, Resampler, average
from lenvm.evals.lifebench.arms import strip_countdown
from lenvm.evals.lifebench.items import CONSTRAINTS, measure_length
from lenvm.evals.lifebench.metrics import length_deviation, length_score
from lenvm.evals.quality import has_words, measure_record, summarise_quality

Grade = dict[str, Any]
Numbers = dict[str, Any]
SCORES = ("score", "deviation", "deviation_signed", "over", "under", "share_over", "share_under")
COLUMNS: dict[str, Callable[[Grade], float]] = {
    "mean_length": lambda g: g["length"],
    "score": lambda g: g["score"],
    "deviation": lambda g: abs(g["deviation"]),
    "deviation_signed": lambda g: g["deviation"],
    "over": lambda g: max(0.0, g["deviation"]),
    "under": lambda g: max(0.0, -g["deviation"]),
    "share_over": lambda g: g["deviation"] > 0,
    "share_under": lambda g: g["deviation"] < 0,
    "controlled_score": lambda g: g["controlled_score"],
}
"""What is averaged, by name."""


def grade_record(record: Mapping[str, Any]) -> Grade:
    """One record's numbers, the judge's left out.

    A failed request, or an answer without a word, scores 0 at LD = -1.
    """
    case = record["case"]
    failed = record["error"] is not None
    is_countdown = record["arm"] == "countdown"
    text = strip_countdown(record["text"]) if is_countdown else record["text"]
    empty = not failed and not has_words(text)
    num_tokens = record["visible_tokens"] if is_countdown else record["num_tokens"]
    length = 0 if failed or empty else measure_length(text, num_tokens or 0, case["unit"])
    deviation = length_deviation(length, case["target"])
    score = 0.0 if failed or empty else length_score(deviation, case["constraint"])
    quality = measure_record(record, text, answered=not (failed or empty))
    return {
        "id": record["id"],
        "arm": record["arm"],
        "item": record["item"],
        "sample": record["sample"],
        **{k: case[k] for k in ("constraint", "target", "category", "type", "language")},
        "failed": failed,
        "empty": empty,
        "length": length,
        "deviation": deviation,
        "score": score,
        "controlled_score": score if quality["ended_by_eos"] else 0.0,
        **quality,
    }


def summarise_arm(grades: Sequence[Grade], reference: Sequence[Grade], r: Resampler) -> Numbers:
    """Numbers of one arm. `reference`: the grades of the `prompt` arm, for `log_prob_loss`."""
    if not grades:
        return {"equal_to": None, "at_most": None, "at_least": None, "quality": None}
    by_constraint: Numbers = {}
    for constraint in CONSTRAINTS:
        rows = [g for g in grades if g["constraint"] == constraint]
        other = [g for g in reference if g["constraint"] == constraint]
        by_constraint[constraint] = _summarise_constraint(rows, other, r) if rows else None
    return {**by_constraint, "quality": summarise_quality(grades, reference, r)}


def _summarise_constraint(rows: list[Grade], reference: list[Grade], r: Resampler) -> Numbers:
    by_target = _group(rows, "target")
    reference_by_target = _group(reference, "target")
    columns = {target: _score_columns(group, r) for target, group in by_target.items()}
    macro = {
        name: average([c[name] for c in columns.values()]).to_json()
        for name in (*SCORES, "controlled_score")
    }
    return {
        **macro,
        "num_failed": sum(g["failed"] for g in rows),
        "num_empty": sum(g["empty"] for g in rows),
        "quality": summarise_quality(rows, reference, r),
        "by_target": [
            {
                "target": target,
                "num": len(group),
                **{name: estimate.to_json() for name, estimate in columns[target].items()},
                "quality": summarise_quality(group, reference_by_target.get(target, []), r),
                "unguided_as_long": _as_long(reference, target, r),
            }
            for target, group in by_target.items()
        ],
        "by_category": _by(rows, "category", r),
        "by_type": _by(rows, "type", r),
        "by_language": _by(rows, "language", r),
    }


def _as_long(reference: list[Grade], target: int, r: Resampler) -> Numbers | None:
    """What unguided answers of about the target's length are like, whatever they were asked for:
    long text repeats itself more, and what repeats is likely. None where there are none."""
    alike = [
        g
        for g in reference
        if abs(g["length"] - target) <= target / 4 and g["log_prob"] is not None
    ]
    if not alike:
        return None
    items = [g["item"] for g in alike]
    return {
        "num": len(alike),
        **{k: r.mean([g[k] for g in alike], items).to_json() for k in ("log_prob", "rep_4")},
    }


def _by(rows: list[Grade], name: str, r: Resampler) -> list[Numbers]:
    """Macro averages over targets within each value of a field."""
    found = []
    for value, group in _group(rows, name).items():
        parts = [_score_columns(p, r, SCORES[:3]) for p in _group(group, "target").values()]
        scores = {key: average([p[key] for p in parts]).to_json() for key in SCORES[:3]}
        found.append({name: value, "num": len(group), **scores})
    return found


def _score_columns(
    rows: list[Grade], r: Resampler, names: Sequence[str] = tuple(COLUMNS)
) -> dict[str, Estimate]:
    items = [g["item"] for g in rows]
    return {name: r.mean([COLUMNS[name](g) for g in rows], items) for name in names}


def _group(rows: Sequence[Grade], name: str) -> dict[Any, list[Grade]]:
    groups: dict[Any, list[Grade]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return dict(sorted(groups.items()))
