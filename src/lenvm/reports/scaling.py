"""Scaling and ablations on a page: a metric along each axis of the grid, and every cell."""

from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.reports.charts import Axis, Chart, pick_kind
from lenvm.reports.page import Html, columns, details, figure, join, legend, note
from lenvm.reports.results import Result
from lenvm.reports.tables import (
    Bar,
    bars,
    estimate,
    format_number,
    format_percent,
    read_bounds,
    table,
)

Cell = Mapping[str, Any]
METRICS = {"val_loss": "validation loss", "mre": "relative error at the prompt"}
POSITIONS = (0.0, 0.25, 0.5, 0.75)
NAMES = {"num_prompts": "training prompts", "completions": "completions per prompt"}
MAX_SERIES = 8


def section_body(result: Result) -> Html:
    """Everything about one result."""
    s = result.summary
    metrics = [m for m in METRICS if m in s["metrics"]]
    if not s["cells"]:
        return note("No cell of the grid has a result yet.")
    draw = _ablations if s["design"] == "ablation" else _curves
    seeds = sorted({c["num_seeds"] for c in s["cells"]})
    about = note(
        f"{format_number(len(s['cells']))} trainings, each over "
        f"{' or '.join(map(str, seeds))} seed{'s' if seeds[-1] > 1 else ''}"
        + ("; intervals over seeds." if _has_intervals(s["cells"]) else ".")
    )
    return join(about, draw(s, metrics), details("Every cell", _cells(s)))


def _has_intervals(cells: Sequence[Cell]) -> bool:
    """False where every cell has too few seeds for one."""
    return any(m and m["low"] is not None for c in cells for m in c["metrics"].values())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- a full grid: one chart per metric and numeric axis ------------------------------------------


def _curves(s: Mapping[str, Any], metrics: Sequence[str]) -> Html:
    many = {name: labels for name, labels in s["axes"].items() if len(labels) > 1}
    charts = []
    for name, labels in many.items():
        for metric in metrics:
            charts.append(_curve(s, metric, name, labels, [n for n in many if n != name]))
    return columns(*charts) if charts else note("Every axis has one value.")


def _curve(
    s: Mapping[str, Any], metric: str, name: str, labels: Sequence[Any], others: Sequence[str]
) -> Html:
    """A metric along one axis; one line per value of the next axis, the largest of the rest."""
    by = others[0] if others and len(s["axes"][others[0]]) <= MAX_SERIES else None
    fixed = {n: s["axes"][n][-1] for n in others if n != by}
    numeric = all(_is_number(v) and v > 0 for v in labels)
    cells = [
        c
        for c in s["cells"]
        if all(c["axes"][n] == v for n, v in fixed.items()) and c["metrics"].get(metric)
    ]
    if not cells:
        return note(f"No cell has {METRICS[metric]} along {_name(name)}.")
    place = {label: label if numeric else i for i, label in enumerate(labels)}
    x = Axis(
        min(place.values()) / 1.1 if numeric else -0.15,
        max(place.values()) * 1.1 if numeric else len(labels) - 0.85,
        _name(name),
        log=numeric,
        marks=tuple(place.values()),
        names=None if numeric else tuple(map(str, labels)),
    )
    ends = [end for c in cells for end in read_bounds(c["metrics"][metric])]
    y = Axis.fit(ends, METRICS[metric], zero=False, percent=metric != "val_loss")
    chart = Chart(x, y, height=250)
    series = s["axes"][by] if by else [None]
    for i, value in enumerate(series):
        row = [c for c in cells if by is None or c["axes"][by] == value]
        points = [(place[c["axes"][name]], c["metrics"][metric], c) for c in row]
        kind = pick_kind(i)
        chart.line([(p, m["value"]) for p, m, _ in points], kind)
        for p, m, c in points:
            low, high = read_bounds(m)
            chart.span((p, low), (p, high), kind)
            tip = f"{_describe(c)}\n{METRICS[metric]} {y.write(m['value'])}"
            chart.dot(p, m["value"], kind, tip)
    keys = [(f"line {pick_kind(i)}", f"{v}") for i, v in enumerate(series)] if by else []
    at = ", ".join(f"{_name(n)} {v}" for n, v in fixed.items())
    title = f"{METRICS[metric].capitalize()} by {_name(name)}"
    caption = (f"Lines: {_name(by)}. " if by else "") + (f"At {at}." if at else "")
    drawing = (legend(keys) if keys else Html("")) + chart.html(title)
    return figure(drawing, caption, title=title)


# -- ablations: each axis alone ------------------------------------------------------------------


def _ablations(s: Mapping[str, Any], metrics: Sequence[str]) -> Html:
    base = {name: labels[0] for name, labels in s["axes"].items()}
    parts = []
    for name, labels in s["axes"].items():
        if len(labels) < 2:
            continue
        cells = [c for label in labels for c in s["cells"] if c["axes"] == {**base, name: label}]
        drawn = [_bars(cells, name, base[name], metric) for metric in metrics]
        if f"mre_at_{POSITIONS[1]:g}" in s["metrics"]:
            drawn.append(_positions(cells, name))
        parts.append(Html(f"<h3>{_name(name).capitalize()}</h3>") + columns(*drawn))
    return join(*parts)


def _bars(cells: Sequence[Cell], name: str, base: object, metric: str) -> Html:
    write = format_number if metric == "val_loss" else format_percent
    rows = []
    for c in cells:
        m = c["metrics"].get(metric)
        label = str(c["axes"][name])
        kind = "base" if c["axes"][name] == base else "main"
        value, low, high = (m["value"], m["low"], m["high"]) if m else (None, None, None)
        rows.append(Bar(label, value, write(value), kind, low, high))
    end = 1.05 * max((r.high or r.value or 0.0 for r in rows), default=1.0)
    return bars(f"{METRICS[metric].capitalize()}, less is better", rows, end)


def _positions(cells: Sequence[Cell], name: str) -> Html:
    """Error of the remaining length at relative positions, one line a value."""
    lines = {}
    for c in cells:
        found = [(at, c["metrics"].get(f"mre_at_{at:g}")) for at in POSITIONS]
        lines[str(c["axes"][name])] = [(at, m["value"]) for at, m in found if m]
    errors = [y for line in lines.values() for _, y in line]
    if not errors:
        return Html("")
    x = Axis(0, 0.8, "share of the answer that is written", percent=True, marks=POSITIONS)
    chart = Chart(x, Axis.fit(errors, "relative error", percent=True), height=190)
    for i, (label, line) in enumerate(lines.items()):
        chart.line(line, pick_kind(i))
        for at, y in line:
            chart.dot(at, y, pick_kind(i), f"{label}\n{format_percent(y)}")
    keys = legend([(f"line {pick_kind(i)}", label) for i, label in enumerate(lines)])
    drawing = keys + chart.html("relative error while the answer is written")
    return figure(drawing, "", title="While it is written")


# -- cells ---------------------------------------------------------------------------------------


def _cells(s: Mapping[str, Any]) -> Html:
    shown = [m for m in (*METRICS, "median_re") if m in s["metrics"]]
    rows = [
        [
            *(
                c["axes"][name] if _is_number(c["axes"][name]) else str(c["axes"][name])
                for name in s["axes"]
            ),
            c["num_seeds"],
            *(estimate(c["metrics"].get(m)) for m in shown),
        ]
        for c in s["cells"]
    ]
    names = [*map(_name, s["axes"]), "seeds", *(METRICS.get(m, "median error") for m in shown)]
    return table(names, rows)


def _describe(cell: Cell) -> str:
    return ", ".join(f"{_name(n)} {v}" for n, v in cell["axes"].items())


def _name(axis: str) -> str:
    return NAMES.get(axis, axis.replace("_", " "))
