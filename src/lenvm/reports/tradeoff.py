"""Trade-off on a page: accuracy against length with intervals, the gaps between the curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.reports.charts import Axis, Chart, pick_kind
from lenvm.reports.page import Html, columns, figure, headline, join, legend, note
from lenvm.reports.results import Result
from lenvm.reports.tables import (
    Bar,
    bars,
    estimate,
    format_number,
    format_pace,
    format_percent,
    format_signed,
    read_bounds,
    table,
)

Arm = Mapping[str, Any]
LENVM = ("shortest", "price", "tilt", "at_most")
NAMES = {
    "shortest": "LenVM shortest",
    "price": "LenVM price",
    "tilt": "LenVM tilt",
    "at_most": "LenVM at most",
    "budget": "truncation",
    "budget_answer": "truncation, forced answer",
    "concise": "“be concise”",
    "eos_bias": "EOS bias",
    "unguided": "unguided",
}
KINDS = {
    "shortest": "main",
    "price": "s6",
    "tilt": "s5",
    "at_most": "s2",
    "budget": "base",
    "budget_answer": "s1",
}
KINDS |= {"concise": "s3", "eos_bias": "s4", "unguided": "ink"}
SHORTER = 0.667
"""The share of the unguided length that the headline speaks of."""


def answer(results: Sequence[Result], *, is_first: bool = True) -> Html:
    """What a shorter answer costs in accuracy. `is_first`: the panel has no other headline."""
    s = results[0].summary
    number, words = _headline(s)
    if not is_first:
        return note(f"On {_benchmark(s)}: {number}, {words}.")
    about = f"{words}; {_benchmark(s)}, {s['model']}"
    return join(headline(number, about), _plane(s, height=215))


def _benchmark(s: Mapping[str, Any]) -> str:
    """Its name, of a file without the ending, and how many questions that is."""
    name = str(s["benchmark"]).removesuffix(".jsonl")
    return f"{name} ({format_number(s['num_items'])} questions)"


def _headline(s: Mapping[str, Any]) -> tuple[str, str]:
    """(number, what it is): accuracy at two thirds of the unguided length, or the best."""
    plain = next((a for a in s["arms"] if a["family"] == "unguided" and a["pass_at_1"]), None)
    found = {f: at for f, c in s["curves"].items() if (at := _accuracy_at(c)) is not None}
    own = next((f for f in LENVM if f in found), None)
    if own is None or plain is None:
        ran = [a for a in s["arms"] if a["pass_at_1"]]
        best = max(ran, key=lambda a: a["pass_at_1"]["value"], default=None)
        if best is None:
            return "no answer", "no arm ran"
        return f"{format_percent(best['pass_at_1']['value'])} right", best["label"]
    words = (
        f"with {NAMES[own]} at two thirds of the length; unguided "
        f"{format_percent(plain['pass_at_1']['value'])}"
    )
    if "budget" in found:
        words += f", truncation {format_percent(found['budget'])}"
    return f"{format_percent(found[own])} right", words


def _accuracy_at(curve: Mapping[str, Any]) -> float | None:
    for row in curve["accuracy_at"]:
        if row["fraction"] == SHORTER and row["accuracy"]:
            return float(row["accuracy"]["value"])
    return None


def section_body(result: Result) -> Html:
    """Everything about one result."""
    s = result.summary
    gaps = _gaps(s)
    drawn = columns(_plane(s, height=360), gaps) if gaps else _plane(s, height=360)
    text = note(
        f"{format_number(s['num_items'])} questions, {s['num_samples']} answers each; all arms "
        "with the same sampling and the same limit. Lengths are generated tokens. A family is a "
        "line through its arms, by length; the gap is the mean difference in accuracy over the "
        "lengths that both lines reach. On the Pareto front (*): no arm is both shorter and better."
    )
    return join(drawn, _arms(s), text)


def _plane(s: Mapping[str, Any], *, height: int) -> Html:
    arms = {a["arm"]: a for a in s["arms"] if a["pass_at_1"] and a["mean_length"]}
    if not arms:
        return note("No arm has an answer.")
    lengths = [end for a in arms.values() for end in read_bounds(a["mean_length"])]
    shares = [read_bounds(a["pass_at_1"])[1] for a in arms.values()]
    x = Axis.fit(lengths, "mean length (tokens)", zero=False)
    y = Axis(0, min(1.0, 1.08 * max(*shares, 0.1)), "pass@1", percent=True)
    chart = Chart(x, y, height=height)
    for family, curve in s["curves"].items():
        points = [_at(arms[name]) for name in curve["arms"] if name in arms]
        chart.line(points, _kind(family))
    for a in arms.values():
        (length, accuracy), kind = _at(a), _kind(a["family"])
        (left, right), (low, high) = read_bounds(a["mean_length"]), read_bounds(a["pass_at_1"])
        chart.span((left, accuracy), (right, accuracy), kind)
        chart.span((length, low), (length, high), kind)
    for a in arms.values():
        tip = (
            f"{a['label']}\n{format_percent(a['pass_at_1']['value'])} right, "
            f"{a['mean_length']['value']:.0f} tokens"
        )
        chart.dot(*_at(a), _kind(a["family"]), tip)
    families = dict.fromkeys(a["family"] for a in arms.values())
    keys = legend([(f"dot {_kind(f)}", NAMES.get(f, f)) for f in families])
    drawing = keys + chart.html("accuracy against mean length, one dot an arm")
    return figure(drawing, "", title="Accuracy against length, with 95% intervals")


def _at(arm: Arm) -> tuple[float, float]:
    return arm["mean_length"]["value"], arm["pass_at_1"]["value"]


def _kind(family: str) -> str:
    return KINDS.get(family, pick_kind(5))


def _gaps(s: Mapping[str, Any]) -> Html:
    rows = [
        [
            f"{NAMES.get(a['family'], a['family'])} over {NAMES.get(a['against'], a['against'])}",
            estimate(a["area"], lambda x: format_percent(x, signed=True)),
            f"{a['from']:.0f} to {a['to']:.0f}",
        ]
        for a in s["area_between"]
    ]
    table_ = table(["", "mean gap", "tokens"], rows, caption="Between the curves") if rows else ""
    own = [f for f in LENVM if f in s["curves"]]
    others = [f for f in s["curves"] if f not in LENVM]
    found = {f: _accuracy_at(s["curves"][f]) for f in (*own, *others)}
    shown = [
        Bar(NAMES.get(f, f), v, format_percent(v), "main" if f in LENVM else "base")
        for f, v in found.items()
        if v is not None
    ]
    drawn = bars("pass@1 at two thirds of the unguided length", shown, 1.0) if shown else ""
    return join(*(Html(part) for part in (drawn, table_) if part))


def _arms(s: Mapping[str, Any]) -> Html:
    rows = []
    for a in s["arms"]:
        if a["skipped"] is not None or not a["num_requests"]:
            continue
        passes = a["pass_at_k"] or {}
        most = max(passes, key=int, default=None)
        q = a.get("quality") or {}
        rows.append(
            [
                ("* " if a["arm"] in s["pareto"] else "") + a["label"],
                estimate(a["pass_at_1"], format_percent),
                f"{format_percent(passes[most]['value'])} ({most})" if most else None,
                estimate(a["mean_length"]),
                _value(a["relative_length"], format_percent),
                _value(a["truncated"], format_percent),
                _value(q.get("log_prob"), format_signed),
                _value(q.get("rep_4"), format_percent),
                _value(q.get("sentence_end"), format_percent),
                _value(q.get("ms_per_token"), format_pace),
                a["num_failed"],
            ]
        )
    names = ["arm", "pass@1", "pass@k (k)", "mean length", "of unguided", "cut off"]
    names += ["log-prob.", "rep-4", "sentence end", "ms per token", "failed"]
    return table(names, rows, caption="Every arm")


def _value(interval: Mapping[str, float] | None, write: Any) -> str:
    return str(write(interval["value"] if interval else None))
