"""The demo's page: how well is length predicted, how well controlled at what cost, what is seen.

Reads `summary.json` and `traces.jsonl` of a demo folder, and, where they are there, the training's
metrics beside the model. Nothing is computed that the files do not say.
"""

import itertools
import math
from pathlib import Path

from lenvm.errors import DataError
from lenvm.files import read_json, write_text
from lenvm.reports.demo_sections import (
    Numbers,
    control_details,
    prediction_details,
    run_details,
)
from lenvm.reports.page import Html, build_page, headline, join, note, panel, split, verdict
from lenvm.reports.prediction import scatter
from lenvm.reports.results import DEMO_SCHEMA
from lenvm.reports.tables import Bar, bars, format_number, format_percent, format_signed
from lenvm.reports.token_view import token_view
from lenvm.reports.traces import TokenTrace, read_traces

REQUIRED = ("sampling", "training", "prediction", "equal_to", "tilt")
WANTED_GAIN = 20.0
"""Points of length score that control should gain."""


def build_demo_report(folder: Path) -> Path:
    """Write `report.html` from `summary.json` and `traces.jsonl` of a demo folder.

    Raises DataError for a file that is missing or of another form.
    """
    path = folder / "report.html"
    write_text(path, build_demo_page(folder))
    return path


def build_demo_page(folder: Path) -> str:
    """The page of a demo folder, as HTML."""
    summary = load_demo_summary(folder)
    s, minutes = summary["sampling"], summary.get("seconds")
    lead = (
        f"{summary.get('generator', 'A model')} wrote {format_number(s['num_trajectories'])} "
        f"answers to {format_number(s['num_prompts'])} prompts. A value model learned from them "
        "how much is still to come, and was measured on prompts that it had not seen"
        + (f"; all in {minutes / 60:.1f} minutes on this machine." if minutes else ".")
    )
    title = "What a language model knows of its own length"
    return build_page(title, lead, build_body(folder), kind="demo report")


def build_body(folder: Path) -> Html:
    """The demo's answers and details, for its own page or as a part of another."""
    summary = load_demo_summary(folder)
    traces = read_traces(folder / "traces.jsonl")
    answers = join(_predicted(summary), _controlled(summary), _seen(traces, folder))
    return join(
        Html(f'<div class="answers">{answers}</div>'),
        prediction_details(summary["prediction"]),
        control_details(folder, summary),
        run_details(folder, summary),
    )


def load_demo_summary(folder: Path) -> Numbers:
    """`summary.json` of a demo. DataError where it is something else or lacks a part."""
    path = folder / "summary.json"
    summary = read_json(path)
    found = summary.get("schema") if isinstance(summary, dict) else None
    if found != DEMO_SCHEMA:
        raise DataError(f"{path} has schema {found!r}; a demo's is {DEMO_SCHEMA!r}")
    missing = [name for name in REQUIRED if name not in summary]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; run `lenvm demo` again")
    return dict(summary)


def shortfalls(summary: Numbers) -> list[str]:
    """What the run did not reach of what a user may expect, in words."""
    return [
        text
        for reached, text in (*_prediction_goal(summary), *_control_goals(summary))
        if not reached
    ]


def _prediction_goal(summary: Numbers) -> list[tuple[bool, str]]:
    p = summary["prediction"]
    if p["mre"] < p["mre_constant"]:
        share = format_percent(1 - p["mre"] / p["mre_constant"])
        return [(True, f"The prediction's error is {share} smaller than a constant guess's.")]
    text = (
        f"The prediction (error {format_percent(p['mre'])}) is no better than a constant guess "
        f"({format_percent(p['mre_constant'])})."
    )
    return [(False, text)]


def _control_goals(summary: Numbers) -> list[tuple[bool, str]]:
    equal = summary["equal_to"]
    gain = equal["guided"]["length_score"] - equal["unguided"]["length_score"]
    enough = gain >= WANTED_GAIN
    wanted = f"the goal is {WANTED_GAIN:.0f}" if enough else f"fewer than {WANTED_GAIN:.0f}"
    verb = "gains" if gain >= 0 else "loses"
    score = (enough, f"Control {verb} {abs(gain):.0f} points of length score; {wanted}.")
    rows = sorted(summary["tilt"], key=lambda row: row["scale"])
    lengths = [row["mean_length"] for row in rows]
    falls = all(a > b for a, b in itertools.pairwise(lengths))
    course = " → ".join(format_number(round(n)) for n in lengths)
    words = "falls with the tilt" if falls else "does not fall at every step of the tilt"
    return [score, (falls, f"The mean length {words}: {course} tokens.")]


# -- the first screen ----------------------------------------------------------------------------


def _predicted(summary: Numbers) -> Html:
    p = summary["prediction"]
    worst = 1.05 * max(p["mre"], p["mre_constant"])
    rows = [
        Bar("LenVM", p["mre"], format_percent(p["mre"])),
        Bar("constant", p["mre_constant"], format_percent(p["mre_constant"]), "base"),
    ]
    number = headline(
        f"{format_percent(p['mre'])} error",
        f"on average, before a token is written; {p['num_prompts']} held-out prompts",
    )
    goals = join(*(verdict(*goal) for goal in _prediction_goal(summary)))
    answer = join(number, bars("Relative error, less is better", rows, worst), goals)
    drawn = scatter(p.get("points", []), height=210)
    return panel("How well is length predicted?", split(answer, drawn), number=1)


def _controlled(summary: Numbers) -> Html:
    e = summary["equal_to"]
    number = headline(
        f"{e['guided']['length_score']:.0f} of 100",
        f"length score for exactly {' or '.join(map(str, e['targets']))} tokens; "
        f"{e['unguided']['length_score']:.0f} without control",
    )
    goals = join(*(verdict(*goal) for goal in _control_goals(summary)))
    arms = (("with control", e["guided"], "main"), ("without", e["unguided"], "base"))
    drawn = bars(
        "Length score, 100 is exact",
        [Bar(n, a["length_score"], f"{a['length_score']:.0f}", k) for n, a, k in arms],
        100,
    )
    if all(arm.get("log_prob") is not None for _, arm, _ in arms):
        drawn += bars(
            "Cost in text: how likely the model finds its tokens",
            [Bar(n, math.exp(a["log_prob"]), _likely(a["log_prob"]), k) for n, a, k in arms],
            1,
        )
    rates = [(n, a["tokens_per_s"], k) for n, a, k in arms if a.get("tokens_per_s")]
    if rates:
        drawn += bars(
            "Cost in speed: tokens per second",
            [Bar(n, rate, format_number(rate), k) for n, rate, k in rates],
            1.05 * max(rate for _, rate, _ in rates),
        )
    drawn += _tilt(summary["tilt"])
    answer = split(number + goals, drawn)
    return panel("How well is it controlled, at what cost?", answer, number=2)


def _likely(log_prob: float) -> str:
    """Geometric mean of the token probabilities, from the mean log-probability."""
    return format_percent(math.exp(log_prob))


def _tilt(rows: list[Numbers]) -> Html:
    ordered = sorted(rows, key=lambda row: row["scale"])
    longest = 1.05 * max(row["mean_length"] for row in ordered)
    return bars(
        "Mean length by tilt",
        [
            Bar(
                f"tilt {format_signed(r['scale'], 0)}" if r["scale"] else "no tilt",
                r["mean_length"],
                format_number(round(r["mean_length"])),
                "main" if r["scale"] else "base",
            )
            for r in ordered
        ],
        longest,
    )


def _seen(traces: list[TokenTrace], folder: Path) -> Html:
    words = note(
        "An answer to a held-out prompt, token by token. Point at a token or at the curve, or use "
        "the arrow keys."
    )
    view = token_view(traces, folder=folder)
    return panel("What does the model see?", words + view, number=3, wide=True)
