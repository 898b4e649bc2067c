"""The token view: what the model expects at every token, coloured, with the curve beside it.

Python writes the curve, the plain text (read where scripts are off) and the numbers as JSON;
page.js turns the text into tokens that can be pointed at and reached by keyboard.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lenvm.errors import DataError
from lenvm.reports.charts import Axis, Chart
from lenvm.reports.page import Html, details, embed_json, escape, legend
from lenvm.reports.tables import format_number, format_percent
from lenvm.reports.traces import TokenTrace, make_visible, markdown_table

HEADROOM = 1.2
GAIN_QUANTILE = 0.97
MAX_TABLE_TOKENS = 1500
IMAGE_TYPES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def _tops(traces: Sequence[TokenTrace]) -> list[float]:
    """Where the axis of each curve ends: the same for completions of the same tokens."""

    def reach(trace: TokenTrace) -> float:
        return HEADROOM * max([*trace.remaining_predicted, *(trace.remaining_true or [])]) or 1.0

    keys = [(t.prompt, tuple(t.token_ids)) for t in traces]
    return [
        max(reach(t) for t, other in zip(traces, keys, strict=True) if other == key) for key in keys
    ]


def token_view(traces: Sequence[TokenTrace], *, folder: Path | None = None) -> Html:
    """Several completions to choose from, or side by side. `folder`: where image files stand.

    Completions of the same tokens by several models start side by side.
    """
    longest = max(max(t.remaining_predicted) for t in traces) or 1.0
    strongest = _strongest(traces)
    shown = _first_shown(traces)
    chips = "".join(
        f'<button type="button" data-show="{i}" aria-pressed="{str(i in shown).lower()}">'
        f"{escape(name)}</button>"
        for i, name in enumerate(name_traces(traces))
    )
    picker = ""
    if len(traces) > 1:
        beside = str(len(shown) > 1).lower()
        picker = (
            f'<div class="chips" role="group" aria-label="Completions">{chips}</div>'
            f'<button type="button" data-compare aria-pressed="{beside}">Side by side</button>'
        )
    panels = "".join(
        _panel(trace, index, index in shown, top, folder)
        for index, (trace, top) in enumerate(zip(traces, _tops(traces), strict=True))
    )
    return Html(
        f'<div class="token-view" data-view><div class="view-bar">{picker}'
        '<div class="segmented" role="group" aria-label="Colour of the tokens">'
        '<button type="button" data-mode="remaining" aria-pressed="true">Tokens to come</button>'
        '<button type="button" data-mode="gain" aria-pressed="false">Longer or shorter</button>'
        f"</div></div>{_colour_keys(longest, strongest)}"
        f'<div class="panels">{panels}</div>'
        f"{embed_json([_numbers(t, longest, strongest) for t in traces])}</div>"
    )


def name_traces(traces: Sequence[TokenTrace]) -> list[str]:
    """A short name of each: what tells it from the others, then the beginning of its prompt."""
    fields: list[list[str]] = [
        [t.model for t in traces],
        [_control_words(t) for t in traces],
        [t.domain for t in traces],
    ]
    telling = [column for column in fields if len(set(column)) > 1]
    prompts = [" ".join(t.prompt.split()) for t in traces]
    names = []
    for index, prompt in enumerate(prompts):
        parts = [column[index] for column in telling if column[index]]
        if len(set(prompts)) > 1 or not parts:
            parts.append(prompt if len(prompt) <= 34 else prompt[:33].rstrip() + "…")
        names.append(" · ".join(parts))
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _control_words(trace: TokenTrace) -> str:
    if trace.control is None:
        return ""
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in trace.control.items())


def _first_shown(traces: Sequence[TokenTrace]) -> set[int]:
    first = (traces[0].prompt, traces[0].token_ids)
    return {i for i, t in enumerate(traces) if (t.prompt, t.token_ids) == first}


def _strongest(traces: Sequence[TokenTrace]) -> float:
    """The gain at which the colour is full: nearly the largest, so that one token is not all."""
    gains = sorted(abs(g) for t in traces for g in t.gains())
    return max(gains[int(GAIN_QUANTILE * (len(gains) - 1))], 1e-6)


def _colour_keys(longest: float, strongest: float) -> str:
    return (
        '<div class="scale" data-scale="remaining"><span>0</span><i class="ramp remaining"></i>'
        f"<span>{format_number(round(longest))} tokens predicted to come</span></div>"
        '<div class="scale" data-scale="gain" hidden><span>makes the answer shorter</span>'
        '<i class="ramp gain"></i><span>makes it longer</span>'
        f'<span class="soft">full colour from a TD gain of {strongest:.2g}</span></div>'
    )


def _panel(trace: TokenTrace, index: int, is_shown: bool, top: float, folder: Path | None) -> str:
    count = f"{format_number(trace.length)} tokens"
    size = count if trace.remaining_true else f"cut off after {count}: the true length is not known"
    about = [trace.model, _control_words(trace), size]
    plain = "".join(map(make_visible, trace.tokens))
    return (
        f'<article class="trace" data-trace="{index}"{"" if is_shown else " hidden"}>'
        f'<div class="asked"><p class="prompt" dir="auto">{escape(trace.prompt)}</p>'
        f"{_images(trace, folder)}"
        f'<p class="note">{escape(" · ".join(part for part in about if part))}</p></div>'
        f'<div class="trace-body"><div class="side">{_curve(trace, top)}'
        '<dl class="readout" aria-live="polite"></dl></div>'
        f'<div class="tokens" role="group" aria-label="Tokens; arrow keys move">{escape(plain)}'
        f"</div></div>{_table(trace)}</article>"
    )


def _curve(trace: TokenTrace, high: float) -> str:
    """Predicted and true tokens to come over the tokens written."""
    predicted, truth = trace.remaining_predicted, trace.remaining_true
    x = Axis(0, trace.length, "tokens written", whole=True)
    chart = Chart(x, Axis(0, high, "tokens to come"), height=230)
    keys = [("line main", "predicted")]
    if trace.remaining_low is not None and trace.remaining_high is not None:
        pairs = zip(trace.remaining_low, trace.remaining_high, strict=True)
        chart.band([(t, low, up) for t, (low, up) in enumerate(pairs)])
        keys.append(("area main", f"{format_percent(trace.interval)} interval"))
    if truth is not None:
        chart.line(list(enumerate(truth)), "truth")
        keys.append(("line truth", "true"))
    chart.line(list(enumerate(predicted)), "main")
    pins = (
        f'<div class="pins" data-x="{trace.length}" data-y="{high:.3f}" hidden><i class="rule"></i>'
        '<i class="pin truth"></i><i class="pin main"></i></div>'
    )
    words = f"predicted tokens to come fall from {predicted[0]:.0f} to {predicted[-1]:.0f}"
    if truth is not None:
        words += f"; the true length is {truth[0]}"
    return legend(keys) + chart.html(words, extra=pins)


def _table(trace: TokenTrace) -> Html:
    """The Markdown table of a completion, folded away; nothing for a very long one."""
    if trace.length > MAX_TABLE_TOKENS:
        return Html("")
    text = Html(f'<pre class="markdown" tabindex="0">{escape(markdown_table(trace))}</pre>')
    return details("As a Markdown table", text)


def _numbers(trace: TokenTrace, longest: float, strongest: float) -> dict[str, Any]:
    """What page.js needs: texts as shown, and columns rounded to what is shown."""

    def rounded(column: Sequence[float] | None, digits: int) -> list[float] | None:
        return None if column is None else [round(x, digits) for x in column]

    return {
        "tokens": [make_visible(t) for t in trace.tokens],
        "ids": trace.token_ids,
        "interval": format_percent(trace.interval),
        "value": rounded(trace.values, 5),
        "predicted": rounded(trace.remaining_predicted, 1),
        "low": rounded(trace.remaining_low, 1),
        "high": rounded(trace.remaining_high, 1),
        "true": trace.remaining_true,
        "gain": rounded(trace.gains(), 5),
        "tokenGain": rounded(trace.length_gains(), 1),
        "remainingShade": [round(100 * min(1, p / longest)) for p in trace.remaining_predicted],
        "gainShade": [round(100 * max(-1, min(1, g / strongest))) for g in trace.gains()],
    }


def _images(trace: TokenTrace, folder: Path | None) -> str:
    """The prompt's images, inside the page. DataError for one that is missing or not an image."""
    parts = []
    for name in trace.images:
        path = (folder or Path()) / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"image {path} of a trace: {error.strerror or error}") from None
        kind = next((t for magic, t in IMAGE_TYPES.items() if data.startswith(magic)), None)
        if kind is None:
            raise DataError(f"{path} is no image of a known type (png, jpeg, gif, webp)")
        text = base64.b64encode(data).decode()
        parts.append(f'<img alt="image of the prompt" src="data:image/{kind};base64,{text}">')
    return "".join(parts)
