"""LIFEBench on a page: score against quality, score against target, every arm's numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.reports.charts import Axis, Chart, pick_kind
from lenvm.reports.page import Html, columns, details, figure, headline, join, legend, note
from lenvm.reports.results import Result
from lenvm.reports.tables import (
    DASH,
    Bar,
    bars,
    estimate,
    format_fixed,
    format_number,
    format_pace,
    format_percent,
    format_signed,
    read_bounds,
    table,
)

Arm = Mapping[str, Any]
OTHERS = ("prompt", "countdown", "truncate", "eos_decay", "eos_bias")
"""Families that need no value model; every other one is a rule, ours or a user's own."""
CONSTRAINTS = {"equal_to": "Equal to", "at_most": "At most", "at_least": "At least"}
SCORE = "score (cut-off answers count 0)"


def _is_lenvm(arm: Arm) -> bool:
    return arm["family"] not in OTHERS


def answer(results: Sequence[Result]) -> Html:
    """How well is length controlled, and what does that cost?"""
    s = results[0].summary
    constraint, arms = _first_constraint(s)
    if not arms:
        return note(f"No arm of {results[0].path.name} ran.")
    best = _best(arms, constraint)
    plain = next((a for a in arms if a["family"] == "prompt"), None)
    words = f"length score, {CONSTRAINTS[constraint].lower()} {_targets(s)}: {best['label']}"
    if plain is not None and plain is not best:
        words += f"; {_score(plain, constraint):.0f} by the prompt alone"
    words += f"; {format_number(s['num_items'])} tasks, {s['model']}"
    parts = [headline(f"{_score(best, constraint):.0f} of 100", words)]
    parts.append(_against_quality(arms, constraint, height=215))
    if plain is not None and plain is not best:
        parts.append(note(_cost(best, plain, constraint)))
    for other in results[1:]:
        name, rows = _first_constraint(other.summary)
        if rows:
            top = _best(rows, name)
            parts.append(note(f"{other.model}: {_score(top, name):.0f} of 100, {top['label']}."))
    return join(*parts)


def _targets(s: Mapping[str, Any]) -> str:
    targets = [format_number(t) for t in s["targets"]]
    if len(targets) > 4:
        return f"{targets[0]} to {targets[-1]} {s['unit']}"
    return f"{' or '.join(p for p in (', '.join(targets[:-1]), targets[-1]) if p)} {s['unit']}"


def _first_constraint(s: Mapping[str, Any]) -> tuple[str, list[Arm]]:
    """The first constraint that was measured, and the arms that ran it."""
    for name in CONSTRAINTS:
        arms = [a for a in s["arms"] if a[name] is not None]
        if arms:
            return name, arms
    return "equal_to", []


def _score(arm: Arm, constraint: str) -> float:
    return float(arm[constraint]["controlled_score"]["value"])


def _best(arms: Sequence[Arm], constraint: str) -> Arm:
    """The best LenVM arm; the best of all where none ran. Of equal ones, the more natural text."""

    def merit(arm: Arm) -> tuple[int, float]:
        quality = _log_prob(arm, constraint)
        return round(_score(arm, constraint)), quality["value"] if quality else float("-inf")

    own = [a for a in arms if _is_lenvm(a)]
    return max(own or arms, key=merit)


def _cost(arm: Arm, plain: Arm, constraint: str) -> str:
    """A sentence on quality and speed."""
    mine, other = arm[constraint]["quality"], plain[constraint]["quality"]
    parts = []
    if (loss := mine["log_prob_loss"]) is not None:
        words = "less" if loss["value"] >= 0 else "more"
        parts.append(f"text that is {abs(loss['value']):.2f} nats per token {words} likely")
    if mine["natural_end"] and other["natural_end"]:
        shares = [format_percent(q["natural_end"]["value"]) for q in (mine, other)]
        parts.append(f"{shares[0]} natural ends (prompt alone: {shares[1]})")
    if mine.get("ms_per_token") and other.get("ms_per_token"):
        paces = [f"{format_pace(q['ms_per_token']['value'])} ms" for q in (mine, other)]
        parts.append(f"{paces[0]} per token (prompt alone: {paces[1]})")
    return f"At the cost of: {'; '.join(parts)}." if parts else "Its cost was not measured."


def section_body(result: Result) -> Html:
    """Everything about one result."""
    s = result.summary
    parts = []
    kinds = {a["arm"]: pick_kind(i) for i, a in enumerate(s["arms"])}
    for constraint, title in CONSTRAINTS.items():
        arms = [a for a in s["arms"] if a[constraint] is not None]
        if arms:
            head = Html(f"<h3>{title} {_targets(s)}</h3>")
            drawn = columns(
                _against_quality(arms, constraint, height=300),
                _against_target(arms, constraint, kinds, height=300),
            )
            parts.append(join(head, drawn, _scores(arms, constraint), _quality(arms, constraint)))
            parts.append(
                details("By target, category, task type and language", _finer(arms, constraint))
            )
    parts.append(
        note(
            "Length deviation LD = (length - target) / target. Score: 100 exp(5 LD) below the "
            "target, 100 exp(-2 LD) above it; “at most” gives 100 to everything up to the target, "
            "“at least” from it on; failed requests and empty answers score 0. Both are macro "
            "averages over targets. An answer that was cut off has the right length without being "
            "one, so the charts count it 0. Log-probability: per token, under the "
            "generator without control, so 0 is certain and lower is less natural. rep-4: share "
            "of word 4-grams that occurred before. Natural end: by EOS and at a sentence's end. "
            "Likely end: by an EOS that the generator itself gave at least 1%."
        )
    )
    return join(*parts)


def _against_quality(arms: Sequence[Arm], constraint: str, *, height: int) -> Html:
    """Score against log-probability per token, where the server reports one; else bars."""
    rows = [(a, a[constraint]["controlled_score"], _log_prob(a, constraint)) for a in arms]
    known = [(a, score, quality) for a, score, quality in rows if quality is not None]
    if len(known) < 2:
        drawn = [
            Bar(a["label"], v["value"], f"{v['value']:.0f}", _kind(a), v["low"], v["high"])
            for a, v, _ in rows
        ]
        return bars("Score; cut-off answers count 0", drawn, 100)
    x = Axis.fit(
        [end for _, _, q in known for end in read_bounds(q)],
        "log-prob. per token → more natural",
        zero=False,
        pad=0.12,
    )
    chart = Chart(x, Axis(0, 105, SCORE, marks=(0, 25, 50, 75, 100)), height=height)
    for a, score, quality in known:
        at = (quality["value"], score["value"])
        (left, right), (low, high) = read_bounds(quality), read_bounds(score)
        chart.span((left, at[1]), (right, at[1]), _kind(a))
        chart.span((at[0], low), (at[0], high), _kind(a))
    for a, score, quality in known:
        tip = f"{a['label']}\nscore {score['value']:.0f}, log-prob. {quality['value']:.2f}"
        chart.dot(quality["value"], score["value"], _kind(a), tip)
    chart.name_points([(q["value"], v["value"], _short(a)) for a, v, q in known])
    found = {_kind(a) for a, _, _ in known}
    names = {"main": "LenVM", "base": "other ways"}
    drawing = legend([(f"dot {kind}", name) for kind, name in names.items() if kind in found])
    drawing += chart.html("length score against quality, one dot an arm")
    left_out = len(arms) - len(known)
    caption = f"{left_out} arms have no log-probabilities." if left_out else ""
    return figure(drawing, caption, title="Right length against natural text")


def _log_prob(arm: Arm, constraint: str) -> Mapping[str, float] | None:
    found: Mapping[str, float] | None = arm[constraint]["quality"]["log_prob"]
    return found


def _short(arm: Arm) -> str:
    name = str(arm["family"]).replace("_", " ")
    return name if arm["parameter"] is None else f"{name} {arm['parameter']:g}"


def _kind(arm: Arm) -> str:
    return "main" if _is_lenvm(arm) else "base"


def _against_target(
    arms: Sequence[Arm], constraint: str, kinds: Mapping[str, str], *, height: int
) -> Html:
    targets = [t["target"] for a in arms for t in a[constraint]["by_target"]]
    marks = tuple(sorted(set(targets)))
    x = Axis(min(targets) / 1.12, max(targets) * 1.12, "target", log=True, marks=marks)
    chart = Chart(x, Axis(0, 105, SCORE, marks=(0, 25, 50, 75, 100)), height=height)
    keys = []
    for arm in arms:
        rows, kind = arm[constraint]["by_target"], kinds[arm["arm"]]
        chart.line([(r["target"], r["controlled_score"]["value"]) for r in rows], kind)
        for r in rows:
            tip = f"{arm['label']}, {r['target']}\nscore {r['controlled_score']['value']:.0f}"
            chart.dot(r["target"], r["controlled_score"]["value"], kind, tip)
        keys.append((f"line {kind}", _short(arm)))
    drawing = legend(keys) + chart.html("score at each target, one line an arm")
    return figure(drawing, "", title="Score by target")


def _scores(arms: Sequence[Arm], constraint: str) -> Html:
    rows = []
    for arm in arms:
        c = arm[constraint]
        rows.append(
            [
                arm["label"],
                estimate(c["score"]),
                estimate(c["controlled_score"]),
                estimate(c["deviation"], format_percent),
                *(format_percent(c[name]["value"]) for name in ("over", "under")),
                *(format_percent(c[name]["value"]) for name in ("share_over", "share_under")),
                c["num_failed"],
                c["num_empty"],
            ]
        )
    names = ["arm", "score", "cut-off = 0", "deviation", "too long by", "too short by"]
    names += ["too long", "too short", "failed", "empty"]
    return table(names, rows, caption="Length")


def _quality(arms: Sequence[Arm], constraint: str) -> Html:
    judged = any(a[constraint]["quality"]["judge"] for a in arms)
    told = any(a[constraint]["quality"].get("likely_end") for a in arms)
    rows = []
    for arm in arms:
        q = arm[constraint]["quality"]
        rows.append(
            [
                arm["label"],
                estimate(q["log_prob"], format_signed),
                None if arm["family"] == "prompt" else estimate(q["log_prob_loss"], format_signed),
                _value(q["rep_4"], format_percent),
                *(_value(q[name], format_fixed) for name in ("distinct_1", "distinct_2")),
                *(_value(q[n], format_percent) for n in ("ended_by_eos", "sentence_end")),
                estimate(q["natural_end"], format_percent),
                *([_value(q.get("likely_end"), format_percent)] if told else []),
                _value(q.get("ms_per_token"), format_pace),
                *([estimate(q["judge"])] if judged else []),
            ]
        )
    names = ["arm", "log-prob.", "loss", "rep-4", "distinct-1", "distinct-2", "EOS"]
    names += ["sentence end", "natural end", *(["likely end"] if told else []), "ms per token"]
    names += ["judge (1-10)"] if judged else []
    return table(names, rows, caption="Quality and speed")


def _value(interval: Mapping[str, float] | None, write: Any) -> str:
    return str(write(interval["value"] if interval else None))


def _finer(arms: Sequence[Arm], constraint: str) -> Html:
    found = []
    for key, name in (("target", "by_target"), ("category", "by_category")):
        found.append(_grid(arms, constraint, key, name))
    found += [_grid(arms, constraint, k, f"by_{k}") for k in ("type", "language")]
    return join(*found)


def _grid(arms: Sequence[Arm], constraint: str, key: str, name: str) -> Html:
    """Scores: one row an arm, one column a value of the field; nothing for one value alone."""
    values = list(dict.fromkeys(row[key] for a in arms for row in a[constraint][name]))
    if len(values) < 2 and key != "target":
        return Html("")
    rows = []
    for arm in arms:
        by_value = {row[key]: row for row in arm[constraint][name]}
        cells = [_cell(by_value.get(value)) for value in values]
        rows.append([arm["label"], *cells])
    return table(["arm", *map(str, values)], rows, caption=f"Score (deviation) by {key}")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["score"] is None:
        return DASH
    return f"{row['score']['value']:.0f} ({format_percent(row['deviation']['value'])})"
