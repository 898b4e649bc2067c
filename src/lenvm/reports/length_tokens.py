"""Length tokens on a page: which tokens make an answer longer or shorter, in clouds and context."""

from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.reports.clouds import draw_cloud
from lenvm.reports.page import Html, columns, details, escape, figure, headline, join, note
from lenvm.reports.results import Result
from lenvm.reports.tables import Bar, bars, format_number, format_percent, format_signed, table
from lenvm.reports.traces import make_visible

Row = Mapping[str, Any]
SHOWN_IN_PANEL = 7
SIDES = {"longer": "Longer", "shorter": "Shorter"}


def answer(results: Sequence[Result]) -> Html:
    """What does the model see? The tokens that move it most."""
    s = results[0].summary
    longer, shorter = s["longer_by_mean"], s["shorter_by_mean"]
    if not longer and not shorter:
        return note(f"No token of {results[0].path.name} moves the prediction.")
    found = [
        (rows[0]["token"], word)
        for rows, word in ((longer, "longer"), (shorter, "shorter"))
        if rows
    ]
    (token, word), *rest = found
    words = f"makes the expected answer {word}, more than any other token"
    words += "".join(f"; “{other}” makes it {way}" for other, way in rest)
    count = f"{format_number(s['num_completions'])} answers, {s['model']}"
    number = headline(f"“{token}”", f"{words}; {count}")
    strongest = max(abs(r["mean_gain"]) for r in [*longer[:1], *shorter[:1]])
    parts = [
        _gain_bars(f"Make the answer {side}", rows[:SHOWN_IN_PANEL], side, strongest)
        for side, rows in (("longer", longer), ("shorter", shorter))
    ]
    return join(number, *parts)


def _gain_bars(title: str, rows: Sequence[Row], side: str, end: float) -> Html:
    return bars(
        title,
        [
            Bar(r["token"], abs(r["mean_gain"]), format_signed(r["mean_gain"], 3), side)
            for r in rows
        ],
        end,
    )


def section_body(result: Result) -> Html:
    """Everything about one result."""
    s = result.summary
    about = note(
        "A token's gain is minus its TD residual: positive = after it the model expects a longer "
        f"answer than before. An event is an occurrence beyond {s['threshold']:g}. "
        f"{format_number(s['num_tokens'])} tokens of {format_number(s['num_completions'])} answers"
        + (", case and leading space folded" if s["merged"] else "")
        + f"; by mean, tokens with at least {s['min_count']} occurrences. White space is shown as "
        "\\n, \\t and ␣."
    )
    clouds = [_cloud(s, side) for side in SIDES]
    by_mean = columns(*(_table(s[f"{side}_by_mean"], side, "by mean gain") for side in SIDES))
    by_event = columns(
        *(_table(s[f"{side}_by_event"], side, "by number of events") for side in SIDES)
    )
    return join(
        about,
        columns(*clouds),
        by_mean,
        details("By number of events", by_event),
        details("In context", columns(*(_contexts(s, side) for side in SIDES))),
    )


def _cloud(s: Mapping[str, Any], side: str) -> Html:
    """A picture of the side's tokens; a sentence where it cannot be drawn."""
    rows = s[f"{side}_by_mean"] or s[f"{side}_by_event"]
    weights = {r["token"]: abs(r["mean_gain"]) for r in rows}
    if not weights:
        return note(f"No token makes the answer {side}.")
    cloud = draw_cloud(weights, side)
    if isinstance(cloud, str):
        return note(cloud)
    picture = Html(
        f'<img class="cloud" alt="{escape(", ".join(list(weights)[:20]))}" '
        f'src="data:image/png;base64,{cloud.base64}">'
    )
    left_out = (
        f" {cloud.num_left_out} in other scripts: see the table." if cloud.num_left_out else ""
    )
    caption = f"Size: mean gain.{left_out}"
    return figure(picture, caption, title=f"Tokens that make the answer {side}")


def _table(rows: Sequence[Row], side: str, order: str) -> Html:
    cells = [
        [
            Html(f"<code>{escape(r['token'])}</code>"),
            format_signed(r["mean_gain"], 3),
            r["num"],
            r["num_events"],
            format_percent(r["event_share"]),
        ]
        for r in rows[:15]
    ]
    names = ["token", "mean gain", "occurrences", "events", "share"]
    return table(names, cells, caption=f"{SIDES[side]}, {order}")


def _contexts(s: Mapping[str, Any], side: str) -> Html:
    lines = []
    kind = ' class="shorter"' if side == "shorter" else ""
    for row in (s[f"{side}_by_mean"] or s[f"{side}_by_event"])[:12]:
        texts = {(c["before"], c["token"], c["after"]): c for c in reversed(row["contexts"])}
        for c in sorted(texts.values(), key=lambda c: -abs(c["gain"]))[:2]:
            before, token, after = (_one_line(c[k]) for k in ("before", "token", "after"))
            lines.append(
                [
                    Html(
                        f'<span class="context" dir="auto">{before}<mark{kind}>{token}</mark>'
                        f"{after}</span>"
                    ),
                    format_signed(c["gain"], 3),
                ]
            )
    return table(["occurrence", "gain"], lines, caption=SIDES[side])


def _one_line(text: str) -> str:
    return escape(make_visible(text).replace("\n", "")) if text else ""
