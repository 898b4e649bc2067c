"""One HTML file that opens without a network: skeleton, escaping, tables, and SVG charts."""

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any


def escape(text: object) -> str:
    """Text for HTML, quotes included."""
    return html.escape(str(text), quote=True)


def embed_json(value: Any) -> str:
    """JSON for a script element: no string in it can end the element."""
    text = json.dumps(value, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json">{text}</script>'


def build_page(title: str, lead: str, body: str) -> str:
    """A whole page; `body` is HTML, title and lead are text."""
    assets = files("lenvm.reports") / "assets"
    css, js = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>"
        '<button id="theme" type="button">Light / dark</button></header>'
        f'<p class="lead">{escape(lead)}</p>{body}</main>'
        f'<div id="tip" role="status"></div><script>{js}</script></body></html>\n'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; cells are escaped; a cell of text (str) after the first is left-aligned."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = (
            f'<td class="text">{escape(c)}</td>' if isinstance(c, str) else f"<td>{_number(c)}</td>"
            for c in row
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def card(question: str, big: str, note: str) -> str:
    """A number that answers a question."""
    return (
        f'<div class="card"><h3>{escape(question)}</h3><div class="big">{escape(big)}</div>'
        f"<p>{escape(note)}</p></div>"
    )


def figure(svg: str, caption: str) -> str:
    """An SVG with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _number(x: object) -> str:
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return escape(x)


class Chart:
    """Axes of an SVG of `width` x `height`, x and y from 0 or `low` up to the given ends."""

    LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40

    def __init__(
        self, x_end: float, y_end: float, x_label: str, y_label: str, *, height: int = 300
    ) -> None:
        self.width, self.height = 720, height
        self.x_end, self.y_end = x_end or 1.0, y_end or 1.0
        self.parts: list[str] = []
        for i in range(5):
            y = self.y_end * i / 4
            self.parts.append(
                f'<line class="axis" x1="{self.LEFT}" x2="{self.width - self.RIGHT}" '
                f'y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"/>'
                f'<text x="{self.LEFT - 8}" y="{self.y(y) + 4:.1f}" text-anchor="end">'
                f"{y:.0f}</text>"
            )
            x = self.x_end * i / 4
            self.parts.append(
                f'<text x="{self.x(x):.1f}" y="{height - 22}" text-anchor="middle">{x:.0f}</text>'
            )
        self.parts.append(
            f'<text x="{self.width / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}'
            f'</text><text transform="translate(12 {height / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )

    def x(self, value: float) -> float:
        return self.LEFT + value / self.x_end * (self.width - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        room = self.height - self.TOP - self.BOTTOM
        return self.TOP + room * (1 - min(value, self.y_end) / self.y_end)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" points="{path}"/>')

    def band(self, points: Sequence[tuple[float, float, float]]) -> None:
        forth = [f"{self.x(x):.1f},{self.y(low):.1f}" for x, low, _ in points]
        back = [f"{self.x(x):.1f},{self.y(high):.1f}" for x, _, high in reversed(points)]
        self.parts.append(f'<polygon class="band" points="{" ".join(forth + back)}"/>')

    def dot(self, x: float, y: float, title: str) -> None:
        self.parts.append(
            f'<circle class="dot" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="5">'
            f"<title>{escape(title)}</title></circle>"
        )

    def mark(self) -> None:
        """The line that follows the token under the pointer."""
        self.parts.append(
            f'<line class="mark" data-left="{self.LEFT}" '
            f'data-width="{self.width - self.LEFT - self.RIGHT}" '
            f'y1="{self.TOP}" y2="{self.height - self.BOTTOM}"/>'
        )

    def svg(self, label: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(label)}">{"".join(self.parts)}</svg>'
        )


def bars(rows: Sequence[tuple[str, float, str]], end: float, unit: str) -> str:
    """Horizontal bars: (label, value, kind), kind `main` or `grey`."""
    height = 34 * len(rows) + 8
    parts = []
    for i, (label, value, kind) in enumerate(rows):
        y, width = 8 + 34 * i, max(0.0, min(1.0, value / end)) * 440
        parts.append(
            f'<text x="150" y="{y + 16}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="bar-{kind}" x="160" y="{y}" width="{width:.1f}" height="22" rx="3"/>'
            f'<text x="{168 + width:.1f}" y="{y + 16}">{value:.1f}{escape(unit)}</text>'
        )
    return f'<svg viewBox="0 0 720 {height}" role="img">{"".join(parts)}</svg>'
