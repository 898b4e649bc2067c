"""One HTML file that opens without a network: skeleton, escaping, and the blocks of a page.

Everything that comes from a file passes through `escape` or `embed_json`. HTML that is already safe
is marked `Html`, so that nothing is escaped twice and nothing by accident not at all.
"""

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

CONTROL_PICTURES = {c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\n\t"} | {0x7F: "␡"}


class Html(str):
    """Text that is HTML already. What is added to it is escaped unless it is HTML too."""

    __slots__ = ()

    def __add__(self, other: str) -> "Html":
        return Html(super().__add__(escape(other)))


def escape(text: object) -> str:
    """Text for HTML, quotes included; control characters as pictures, lone surrogates as U+FFFD.

    `Html` passes unchanged.
    """
    if isinstance(text, Html):
        return text
    clean = str(text).encode("utf-8", "replace").decode().translate(CONTROL_PICTURES)
    return html.escape(clean, quote=True)


def join(*parts: Html) -> Html:
    """HTML one after the other."""
    return Html("".join(parts))


def embed_json(value: Any) -> Html:
    """JSON in a script element: no string in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json">{text}</script>')


def build_page(title: str, lead: str, body: Html, *, kind: str = "report") -> str:
    """A whole page. `title`, `lead` and `kind` (the small line over the title) are text."""
    from lenvm import __version__

    css, head_js, js = (_asset(name) for name in ("page.css", "theme.js", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{css}</style><script>{head_js}</script></head>"
        '<body><a class="skip" href="#content">Skip to the content</a><main id="content">'
        f'<header class="top"><div><p class="kind">lenvm {escape(__version__)} · {escape(kind)}</p>'
        f"<h1>{escape(title)}</h1></div>"
        '<button id="theme" type="button" hidden>Dark</button></header>'
        f'<p class="lead">{escape(lead)}</p>{body}</main>'
        f'<div id="tip" aria-hidden="true"></div><script>{js}</script></body></html>\n'
    )


def _asset(name: str) -> str:
    return (files("lenvm.reports") / "assets" / name).read_text(encoding="utf-8")


def panel(question: str, content: Html, *, number: int | None = None, wide: bool = False) -> Html:
    """A box that answers one question."""
    count = f'<span class="count">{number}</span>' if number else ""
    kind = "panel wide" if wide else "panel"
    return Html(f'<section class="{kind}"><h2>{count}{escape(question)}</h2>{content}</section>')


def headline(number: str, note: object) -> Html:
    """The number that answers the question, and what it is."""
    return Html(
        f'<p class="headline"><strong>{escape(number)}</strong> <span>{escape(note)}</span></p>'
    )


def verdict(reached: bool, text: str) -> Html:
    """Whether a goal was reached, in words as well as in colour."""
    word, kind = ("Reached", "yes") if reached else ("Not reached", "no")
    return Html(f'<p class="verdict {kind}"><b>{word}.</b> {escape(text)}</p>')


def section(title: str, content: Html, *, anchor: str = "", note: object = "") -> Html:
    """A part of the page below the first screen."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return Html(f"<section{name}><h2>{escape(title)}</h2>{lead}{content}</section>")


def figure(drawing: Html, caption: object, *, title: str = "") -> Html:
    """A drawing with its title above and its caption below."""
    head = f'<p class="figure-title">{escape(title)}</p>' if title else ""
    foot = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{head}{drawing}{foot}</figure>")


def columns(*parts: Html) -> Html:
    """Parts side by side where there is room, else below each other."""
    inside = "".join(f"<div>{part}</div>" for part in parts)
    return Html(f'<div class="columns">{inside}</div>')


def split(left: Html, right: Html) -> Html:
    """Two parts of a panel."""
    return Html(f'<div class="split"><div>{left}</div><div>{right}</div></div>')


def details(summary: str, content: Html, *, is_open: bool = False) -> Html:
    """A part that is folded away at first."""
    state = " open" if is_open else ""
    return Html(f"<details{state}><summary>{escape(summary)}</summary>{content}</details>")


def note(text: object) -> Html:
    """A paragraph in the small soft type."""
    return Html(f'<p class="note">{escape(text)}</p>')


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """Keys of a chart: (css kind, text)."""
    items = "".join(
        f'<li><i class="key {escape(kind)}"></i>{escape(text)}</li>' for kind, text in entries
    )
    return Html(f'<ul class="legend">{items}</ul>')
