"""Length prediction on a page: scatter, calibration, error while decoding, intervals, baselines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.reports.charts import Axis, Chart, pick_kind
from lenvm.reports.page import Html, columns, details, figure, headline, join, legend, note
from lenvm.reports.results import Result
from lenvm.reports.tables import (
    Bar,
    bars,
    estimate,
    format_fixed,
    format_number,
    format_percent,
    table,
)

Numbers = Mapping[str, Any]
LOG_FROM_RATIO = 12.0
"""Lengths that differ by more than this factor are drawn on logarithmic axes."""
SMALL_DOTS_FROM = 150
MAX_DOTS = 3000
MANY_CENSORED = 0.05
"""From this share of answers on the first screen says that they were cut off."""
BASELINES = {
    "constant": "constant guess",
    "constant_per_domain": "constant per domain",
    "prompt_length": "prompt length",
    "ridge": "surface features",
}


def scatter(
    points: Sequence[Numbers],
    *,
    height: int = 0,
    intervals: bool = False,
    prompt: str = "held-out prompt",
) -> Html:
    """Predicted against true length, one dot a prompt, one colour a domain.

    points: `domain`, `predicted`, `true_mean`; `prompt`, `p10` and `p90` where they are known.
    prompt: what a dot is.
    """
    if not points:
        return Html("")
    step = -(-len(points) // MAX_DOTS)
    points = points[::step]
    lengths = [q[name] for q in points for name in ("true_mean", "predicted")]
    log = max(lengths) / max(1.0, min(lengths)) > LOG_FROM_RATIO
    x = Axis.fit(lengths, "true length (tokens)", log=log)
    chart = Chart(x, x.named("predicted length (tokens)"), height=height, square=not height)
    chart.diagonal()
    domains = sorted({q["domain"] for q in points})
    small = " small" if len(points) > SMALL_DOTS_FROM else ""
    kinds = {domain: pick_kind(i) for i, domain in enumerate(domains)}
    for q in points:
        if intervals and "p10" in q:
            at = q["true_mean"]
            chart.span((at, q["p10"]), (at, q["p90"]), kinds[q["domain"]])
    for q in points:
        text = " ".join(q.get("prompt", q["domain"]).split())[:110]
        tip = f"{text}\npredicted {q['predicted']:.0f}, true {q['true_mean']:.0f}"
        chart.dot(q["true_mean"], q["predicted"], kinds[q["domain"]] + small, tip)
    keys = [(f"dot {kinds[domain]}", domain) for domain in domains]
    shown = f"Each {prompt} (dashed: exact)"
    if step > 1:
        shown = f"Every {step}th {prompt} (dashed: exact)"
    drawing = legend(keys) + chart.html("predicted against true length")
    return figure(drawing, "", title=shown)


def answer(results: Sequence[Result]) -> Html:
    """How well is length predicted? The first result's number; all results as bars."""
    first = results[0].summary
    table_ = first["domains"]["all"]
    number = headline(
        f"{format_percent(table_['mre']['value'])} error",
        f"on average before a token is written, {format_percent(table_['median_re']['value'])} in "
        f"the median; {format_number(first['num_prompts'])} prompts, {first['model']}",
    )
    rows = [_bar(r.model, r.summary["domains"]["all"]["mre"], "main") for r in results]
    known = {n: b["mre"] for n, b in table_["baselines"].items() if b["mre"]}
    rows += [_bar(BASELINES.get(name, name), mre, "base") for name, mre in known.items()]
    end = 1.05 * max(row.high or 0.0 for row in rows)
    words = _against_best(table_["mre"], known)
    drawn = scatter(_points(results[0]), height=215, prompt=_prompt(first))
    return join(number, _warn_censored(first), drawn, words) + bars(
        "Relative error, less is better", rows, end
    )


def _prompt(s: Numbers) -> str:
    """What a measured prompt is: one that training did not see, where the split says so."""
    return "held-out prompt" if s["config"]["split"] in ("validation", "test") else "prompt"


def _warn_censored(s: Numbers) -> Html:
    """A sentence where so many answers were cut off that the true lengths are not the true ones."""
    cut, every = s["num_censored"], s["num_censored"] + s["num_completions"]
    if cut <= MANY_CENSORED * every:
        return Html("")
    return note(
        f"Careful: {format_number(cut)} of {format_number(every)} answers were cut off and are "
        "left out, so the true lengths look shorter than they are. Sample with a larger "
        "--max-tokens."
    )


def _against_best(own: Numbers, known: Mapping[str, Numbers]) -> Html:
    if not known:
        return Html("")
    best = min(known, key=lambda name: known[name]["value"])
    ratio = own["value"] / known[best]["value"] if known[best]["value"] else math.inf
    name = BASELINES.get(best, best)
    words = f"{format_percent(abs(1 - ratio))} {'smaller' if ratio <= 1 else 'larger'} than"
    if ratio >= 2:
        words = f"{ratio:.1f} times"
    return note(f"{words} the error of the best guess without a value model ({name}).")


def _bar(name: str, interval: Numbers, kind: str) -> Bar:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    return Bar(name, value, format_percent(value), kind, low, high)


def section_body(result: Result) -> Html:
    """Everything about one result."""
    s = result.summary
    every = s["domains"]["all"]
    names = [d for d in s["domains"] if d != "all"]
    drawn = [_calibration(every["calibration"])]
    if any(s["domains"][d]["positions"] for d in names):
        drawn.append(_positions(s["domains"], names))
    parts = [columns(scatter(_points(result), height=330, prompt=_prompt(s)), *drawn[:1])]
    more = [*drawn[1:], _pit(every["pit"])] if every["pit"] else drawn[1:]
    if every["coverage"]:
        more.append(_coverage(s["domains"]))
    if more:
        parts.append(columns(*more))
    return join(*parts, _errors(s["domains"]), details("What the columns mean", _meaning(s)))


def _points(result: Result) -> list[dict[str, Any]]:
    return [
        {"domain": g["domain"], "predicted": g["predicted"], "true_mean": g["length_true"]}
        for g in result.grades()
    ]


def _calibration(rows: Sequence[Numbers]) -> Html:
    lengths = [row[name] for row in rows for name in ("predicted", "actual")]
    log = max(lengths) / max(1.0, min(lengths)) > LOG_FROM_RATIO
    x = Axis.fit(lengths, "mean prediction (tokens)", log=log)
    chart = Chart(x, x.named("mean true length (tokens)"), height=330)
    chart.diagonal()
    chart.line([(row["predicted"], row["actual"]) for row in rows], "main")
    for row in rows:
        tip = (
            f"{row['num']} prompts: {row['predicted']:.0f} predicted, {row['actual']:.0f} in truth"
        )
        chart.dot(row["predicted"], row["actual"], "main", tip)
    drawing = legend([("line main", "tenths of the prompts"), ("line truth", "exact")])
    drawing += chart.html("mean true length against mean prediction")
    return figure(drawing, "", title="Calibration: is a prediction right on average?")


def _positions(domains: Mapping[str, Numbers], names: Sequence[str]) -> Html:
    rows = {d: [p for p in domains[d]["positions"] if p["median_re"]] for d in names}
    errors = [p["median_re"]["value"] for row in rows.values() for p in row]
    x = Axis(
        0, 0.8, "share of the answer that is written", percent=True, marks=(0, 0.25, 0.5, 0.75)
    )
    chart = Chart(x, Axis.fit(errors, "median relative error", percent=True), height=230)
    for i, (name, row) in enumerate(rows.items()):
        chart.line([(p["at"], p["median_re"]["value"]) for p in row], pick_kind(i))
        for p in row:
            tip = f"{name}, {p['num']} answers\n{format_percent(p['median_re']['value'])}"
            chart.dot(p["at"], p["median_re"]["value"], pick_kind(i), tip)
    keys = legend([(f"line {pick_kind(i)}", name) for i, name in enumerate(rows)])
    return figure(
        keys + chart.html("median error of the remaining length at relative positions"),
        "Of the tokens still to come, in single answers: no model can know what will be drawn.",
        title="While it is written",
    )


def _pit(shares: Sequence[float]) -> Html:
    most = max(0.2, *shares)
    x = Axis(0, 1, "where the true length falls in the predicted distribution", percent=True)
    chart = Chart(x, Axis(0, 1.05 * most, "share of answers", percent=True), height=230)
    for i, share in enumerate(shares):
        width = 1 / len(shares)
        tip = f"{format_percent(share)} of the answers"
        chart.column((i + 0.04) * width, (i + 0.96) * width, share, "main", tip)
    chart.level(1 / len(shares))
    drawing = chart.html("histogram of the probability integral transform")
    return figure(
        drawing,
        "Flat (dashed) is calibrated. A hump: intervals too wide. A bowl: too narrow.",
        title="Calibration of the distribution (PIT)",
    )


def _coverage(domains: Mapping[str, Numbers]) -> Html:
    levels = list(domains["all"]["coverage"])
    rows = [
        [name, *(estimate(d["coverage"][level], format_percent) for level in levels)]
        for name, d in domains.items()
        if d["coverage"]
    ]
    names = ["", *(f"{level}%" for level in levels)]
    return table(names, rows, caption="Share of answers inside the predicted interval of")


def _errors(domains: Mapping[str, Numbers]) -> Html:
    rows: list[list[object]] = []
    for domain, d in domains.items():
        for name, numbers in [("value model", d), *d["baselines"].items()]:
            first = "" if rows and name != "value model" else f"{domain} ({d['num_prompts']})"
            rows.append(
                [
                    first,
                    BASELINES.get(name, name),
                    *(
                        estimate(numbers[key], format_percent)
                        for key in ("mre", "median_re", "mre_mean", "mre_median")
                    ),
                    estimate(numbers.get("mae"), _whole),
                    *(estimate(numbers.get(key), _rank) for key in ("spearman", "kendall")),
                ]
            )
    names = ["domain (prompts)", "predictor", "mean error", "median error", "of the mean"]
    names += ["of the median", "absolute (tokens)", "Spearman", "Kendall"]
    return table(names, rows, text_columns=(0, 1), caption="Errors, with 95% intervals")


def _whole(x: float | None) -> str:
    return format_number(None if x is None else round(x))


def _rank(x: float | None) -> str:
    return format_fixed(x)


def _meaning(s: Numbers) -> Html:
    fitted = {"train": "on the training prompts", "cross-fit": "on the other four fifths"}
    return note(
        "Error: |predicted - true| / true, where the true length of a prompt is that of its "
        f"{format_number(s['num_completions'])} completions in all, averaged in the value's own "
        "scale (Eq. 14); “of the mean” and “of the median” compare with these in place of it. "
        "Spearman and Kendall: is the order of the prompts right, which is what a scheduler "
        f"needs. Baselines are fitted {fitted.get(s['baseline_fit'], s['baseline_fit'])}. Head: "
        f"{s['head']}, gamma {s['gamma']:g}."
    )
