"""The demo's page: how well is length predicted, how well controlled at what cost, what is seen."""

import itertools
from pathlib import Path
from typing import Any

from lenvm.files import read_json, read_jsonl, write_text
from lenvm.reports.page import Chart, bars, build_page, card, embed_json, escape, figure, table


def build_demo_report(folder: Path) -> Path:
    """Write `report.html` from `summary.json` and `traces.jsonl` of a demo folder."""
    summary = read_json(folder / "summary.json")
    traces = [row for _, row in read_jsonl(folder / "traces.jsonl")]
    lead = (
        f"{summary['generator']}: {summary['sampling']['num_trajectories']} completions of "
        f"{summary['sampling']['num_prompts']} prompts sampled, a value model trained on them, and "
        f"measured on held-out prompts, in {summary['seconds'] / 60:.1f} minutes on this machine."
    )
    body = "".join(
        (
            _cards(summary),
            _shortfalls(summary),
            _tokens(traces),
            _prediction(summary["prediction"]),
            _control(summary),
            _numbers(summary),
        )
    )
    path = folder / "report.html"
    write_text(path, build_page("What a language model knows of its own length", lead, body))
    return path


def shortfalls(summary: dict[str, Any]) -> list[str]:
    """What the run did not reach of what a user may expect, in words."""
    found = []
    prediction, equal = summary["prediction"], summary["equal_to"]
    if prediction["mre"] >= prediction["mre_constant"]:
        found.append(
            f"The prediction (error {prediction['mre']:.0%}) is no better than a constant "
            f"({prediction['mre_constant']:.0%})."
        )
    gain = equal["guided"]["length_score"] - equal["unguided"]["length_score"]
    if gain < 20:
        found.append(f"Control gains {gain:.0f} points of length score, fewer than 20.")
    lengths = [row["mean_length"] for row in summary["tilt"]]
    if any(a <= b for a, b in itertools.pairwise(lengths)):
        found.append("The mean length does not fall at every step of the tilt.")
    return found


def _cards(s: dict[str, Any]) -> str:
    p, e = s["prediction"], s["equal_to"]
    return (
        '<div class="cards">'
        + card(
            "How well is length predicted?",
            f"{p['mre']:.0%} error",
            f"before a token is written, on {p['num_prompts']} held-out prompts; "
            f"a constant guess has {p['mre_constant']:.0%}",
        )
        + card(
            "How well is it controlled?",
            f"{e['guided']['length_score']:.0f} of 100",
            f"length score at {' and '.join(map(str, e['targets']))} tokens; "
            f"{e['unguided']['length_score']:.0f} without control",
        )
        + card(
            "At what cost in text quality?",
            f"{e['guided']['log_prob'] - e['unguided']['log_prob']:+.2f} nats",
            "per token under the generator, guided minus unguided; the guided arm draws among few "
            "likely candidates, which alone raises it",
        )
        + "</div>"
    )


def _shortfalls(s: dict[str, Any]) -> str:
    return "".join(f'<p class="note">Not reached: {escape(line)}</p>' for line in shortfalls(s))


def _tokens(traces: list[dict[str, Any]]) -> str:
    parts = ["<h2>What does the model see?</h2>"]
    parts.append(
        '<p class="lead">A held-out answer, token by token. Point at a token, or reach it with '
        "Tab: the line in the curve follows.</p>"
    )
    for trace in traces:
        gains = _length_gains(trace)
        states = [{**s, "gain": g} for s, g in zip(trace["states"], gains, strict=True)]
        data = {"tokens": trace["tokens"], "states": states}
        parts.append(
            f'<section data-trace><p class="note">{escape(trace["domain"])}: '
            f"{escape(trace['prompt'])}</p>{_curve(trace)}"
            '<div class="legend"><button type="button" data-mode="length" aria-pressed="true">'
            "Predicted remaining</button>"
            '<button type="button" data-mode="gain" aria-pressed="false">Longer or shorter</button>'
            "<span>darker blue: more to come; second view: orange makes the answer longer, blue "
            f'shorter</span></div><div class="tokens"></div>{embed_json(data)}</section>'
        )
    return "".join(parts)


def _length_gains(trace: dict[str, Any]) -> list[float]:
    """-TD residual credited to each token, 0 for the prompt's state."""
    values, gamma = [s["value"] for s in trace["states"]], trace["gamma"]
    pairs = itertools.pairwise(values)
    return [0.0, *(-(-(1 - gamma) + gamma * after - before) for before, after in pairs)]


def _curve(trace: dict[str, Any]) -> str:
    states = trace["states"]
    most = max(max(s["length"], s["remaining_true"] or 0) for s in states) * 1.25
    chart = Chart(states[-1]["step"], most, "tokens written", "tokens to come", height=260)
    if "p10" in states[0]:
        chart.band([(s["step"], s["p10"], s["p90"]) for s in states])
    chart.line([(s["step"], s["length"]) for s in states], "main")
    if states[0]["remaining_true"] is not None:
        chart.line([(s["step"], s["remaining_true"]) for s in states], "other")
    chart.mark()
    return figure(
        chart.svg("predicted and true remaining tokens"),
        "Solid: predicted tokens to come, with its 80% interval. Dashed: the truth.",
    )


def _prediction(p: dict[str, Any]) -> str:
    most = max(max(q["true_mean"], q["predicted"]) for q in p["points"]) * 1.05
    chart = Chart(most, most, "true length (tokens)", "predicted length (tokens)", height=420)
    chart.line([(0, 0), (most, most)], "other")
    for q in p["points"]:
        numbers = f"predicted {q['predicted']:.0f}, true {q['true_mean']:.0f}"
        title = f"{q['domain']}: {numbers}\n{q['prompt']}"
        chart.dot(q["true_mean"], q["predicted"], title)
    rows = [
        [name, d["num_prompts"], f"{d['mre']:.0%}", f"{d['median']:.0%}"]
        for name, d in p["per_domain"].items()
    ]
    return (
        "<h2>How well is length predicted?</h2>"
        + figure(chart.svg("predicted against true length"), "One dot a held-out prompt.")
        + table(["domain", "prompts", "mean error", "median error"], rows)
    )


def _control(s: dict[str, Any]) -> str:
    e = s["equal_to"]
    rows = [
        ("without control", e["unguided"]["length_score"], "grey"),
        ("with control", e["guided"]["length_score"], "main"),
    ]
    tilts = [[f"{t['scale']:g}", t["mean_length"]] for t in s["tilt"]]
    promises = [
        [name, f"{s[key]['kept']:.0%}", s[key]["mean_length"], s[key]["log_prob"]]
        for name, key in (("at most 50", "at_most"), ("at least 150", "at_least"))
    ]
    samples = [
        [q["control"], q["prompt"], q["text"], q["num_tokens"], q["log_prob"]]
        for q in s.get("samples", [])
    ]
    return (
        "<h2>How well is it controlled, at what cost?</h2>"
        + figure(bars(rows, 100, ""), "Length score, 100 is exact.")
        + table(
            ["arm", "length score", "mean deviation", "log-probability per token"],
            [
                [arm, e[arm]["length_score"], f"{e[arm]['deviation']:.0%}", e[arm]["log_prob"]]
                for arm in ("unguided", "guided")
            ],
        )
        + '<p class="note">Log-probability per token under the unguided generator: how natural the '
        "text is to it. The guided arm draws among few likely candidates, the unguided one from "
        "all tokens, so the two are not strictly comparable.</p>"
        + table(["tilt (more = shorter)", "mean length"], tilts)
        + table(["promise", "kept", "mean length", "log-probability"], promises)
        + "<details><summary>Answers</summary>"
        + table(["control", "prompt", "answer", "tokens", "log-probability"], samples)
        + "</details>"
    )


def _numbers(s: dict[str, Any]) -> str:
    rows = [
        [f"{group}: {name}", value]
        for group in ("sampling", "training")
        for name, value in s[group].items()
    ]
    return "<h2>The run</h2>" + table(["figure", "value"], rows)
