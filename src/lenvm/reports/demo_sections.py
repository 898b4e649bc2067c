"""The demo's page below its first screen: every prompt, every answer, the run in numbers."""

import itertools
import math
from pathlib import Path
from typing import Any

from lenvm.files import read_jsonl
from lenvm.reports.charts import Axis, Chart
from lenvm.reports.page import Html, columns, details, escape, figure, join, legend, note, section
from lenvm.reports.prediction import scatter
from lenvm.reports.tables import format_number, format_percent, format_signed, table

Numbers = dict[str, Any]


def prediction_details(p: Numbers) -> Html:
    columns_ = ["", "prompts", "mean error", "median error"]
    rows: list[list[object]] = [
        [name, d["num_prompts"], format_percent(d["mre"]), format_percent(d["median"])]
        for name, d in p.get("per_domain", {}).items()
    ]
    rows.append(["all", p["num_prompts"], format_percent(p["mre"]), _percent(p, "median")])
    rows.append(
        [
            "constant guess",
            p["num_prompts"],
            format_percent(p["mre_constant"]),
            _percent(p, "median_constant"),
        ]
    )
    points = p.get("points", [])
    found = table(columns_, rows, caption="Relative error by kind of prompt")
    found += note(
        "The error is |predicted - true| / true. The true length of a prompt is that of several "
        "answers, averaged in the model's own scale (the paper's Eq. 14). A constant guess says "
        "the same for every prompt: what fits the training prompts best."
    )
    drawn = Html("")
    if any("p10" in q for q in points):
        drawn = figure(
            scatter(points, height=320, intervals=True),
            "Vertical lines: the interval that should hold 80% of all answers' lengths.",
        )
    return section("Prediction", columns(drawn, found) if drawn else found) + Html(
        details("Every held-out prompt", _points_table(points)) if points else ""
    )


def _points_table(points: list[Numbers]) -> Html:
    rows = [
        [
            " ".join(q["prompt"].split())[:160],
            q["domain"],
            round(q["predicted"]),
            round(q["true_mean"]),
            format_percent(abs(q["predicted"] - q["true_mean"]) / q["true_mean"]),
            ", ".join(map(str, q.get("true_lengths", []))),
        ]
        for q in points
    ]
    names = ["prompt", "kind", "predicted", "true", "error", "its answers"]
    return table(names, rows, text_columns=(0, 1))


def _percent(row: Numbers, name: str) -> str:
    return format_percent(row.get(name))


# -- control -------------------------------------------------------------------------------------


def control_details(folder: Path, s: Numbers) -> Html:
    e = s["equal_to"]
    rows = [
        [
            name,
            format_number(arm["length_score"]),
            format_percent(arm["deviation"]),
            format_signed(arm.get("log_prob")),
        ]
        for name, arm in (("without control", e["unguided"]), ("with control", e["guided"]))
    ]
    names = ["", "length score", "mean deviation", "log-probability per token"]
    exact = table(names, rows, caption=f"Equal to {' or '.join(map(str, e['targets']))} tokens")
    parts = [exact]
    promises = [
        [
            name.replace("_", " "),
            format_percent(s[name]["kept"]),
            s[name]["mean_length"],
            format_signed(s[name].get("log_prob")),
        ]
        for name in ("at_most", "at_least")
        if name in s
    ]
    if promises:
        names = ["", "kept", "mean length", "log-probability per token"]
        parts.append(table(names, promises, caption="Limits"))
    text = note(
        "The length score is LIFEBench's: 100 for the exact length, less the further from it, and "
        "sooner below the target than above. The log-probability is the generator's own, without "
        "control: how natural the text is to it. Higher is better; its exponential is the bar "
        "above. The controlled arms draw among few likely candidates, the other from all tokens, "
        "which alone raises theirs: the two are not strictly comparable."
    )
    samples = _samples(folder, s)
    folded = details("Answers with and without control", samples) if samples else ""
    return section("Control", columns(*parts) + text + folded)


def _samples(folder: Path, s: Numbers) -> Html:
    """The answers, prompt by prompt."""
    rows = list(s.get("samples") or [])
    path = folder / "samples.jsonl"
    if not rows and path.exists():
        rows = [row for _, row in read_jsonl(path)]
    parts = []
    for prompt, group in itertools.groupby(rows, key=lambda row: row["prompt"]):
        cells = [
            [
                row["control"],
                row["num_tokens"],
                format_signed(row.get("log_prob", row.get("logprob"))),
                Html(f'<div class="answer" dir="auto">{escape(row["text"].strip())}</div>'),
            ]
            for row in group
        ]
        names = ["control", "tokens", "log-prob.", "answer"]
        parts.append(table(names, cells, caption=prompt.strip()[:240], text_columns=(0, 3)))
    return join(*parts)


# -- the run -------------------------------------------------------------------------------------

NAMES = {
    "num_prompts": "prompts",
    "num_trajectories": "answers",
    "num_tokens": "tokens",
    "num_truncated": "answers cut off",
    "tokens_per_s": "tokens per second",
    "val_loss_first": "validation loss at first",
    "val_loss_last": "validation loss at last",
}


def run_details(folder: Path, s: Numbers) -> Html:
    tables = [
        table(
            [group, ""],
            [[NAMES.get(n, n.replace("_", " ")), v] for n, v in s[group].items() if _is_number(v)],
        )
        for group in ("sampling", "training")
    ]
    model = s.get("value_model", {})
    about = ", ".join(f"{name} {value}" for name, value in model.items())
    drawn = _training_curve(folder, s["training"])
    return section(
        "The run", columns(*tables, *drawn), note=f"Value model: {about}." if about else ""
    )


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _training_curve(folder: Path, training: Numbers) -> list[Html]:
    """Loss over steps, where the files tell it."""
    rows = training.get("curve") or []
    path = folder / "model.metrics.jsonl"
    if not rows and path.exists():
        rows = [row for _, row in read_jsonl(path)]

    def series(*names: str) -> list[tuple[float, float]]:
        found = [(r["step"], next((r[n] for n in names if _known(r.get(n))), None)) for r in rows]
        return [(x, y) for x, y in found if y is not None]

    train, val = series("loss"), series("val_loss", "eval_loss")
    if len(train) < 2 and len(val) < 2:
        return []
    points = [*train, *val]
    x = Axis(0, max(step for step, _ in points), "step")
    y = Axis.fit([loss for _, loss in points], "loss")
    chart = Chart(x, y, height=200)
    chart.line(train, "base")
    chart.line(val, "main")
    for step, loss in val:
        chart.dot(step, loss, "main", f"step {step}: {loss:.4g}")
    keys = legend([("line base", "training"), ("line main", "validation")])
    return [figure(keys + chart.html("loss over training steps"), "", title="Training")]


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
