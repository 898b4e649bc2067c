"""Tables, bars in tables, and how numbers are written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lenvm.reports.page import Html, escape

DASH, MINUS = "\u2013", "\u2212"
Interval = Mapping[str, Any] | None
"""{"value", "low", "high"} as evaluations write it; None = not defined, and bounds that are None =
too few clusters for an interval."""


def format_number(x: float | int | None) -> str:
    """A number as a reader wants it: whole above 100, else three digits; - for none."""
    if x is None:
        return DASH
    if isinstance(x, int) or abs(x) >= 100:
        return f"{x:,.0f}".replace("-", MINUS)
    return f"{x:.3g}".replace("-", MINUS)


def format_percent(x: float | None, *, signed: bool = False) -> str:
    """A fraction in percent; one decimal below ten percent."""
    if x is None:
        return DASH
    percent = 100 * x
    digits = 1 if 0 < abs(percent) < 9.95 else 0
    return f"{percent:{'+' if signed else ''},.{digits}f}%".replace("-", MINUS)


def format_signed(x: float | None, digits: int = 2) -> str:
    """A number with its sign."""
    return DASH if x is None else f"{x:+,.{digits}f}".replace("-", MINUS)


def format_fixed(x: float | None) -> str:
    """Two decimals."""
    return DASH if x is None else f"{x:.2f}".replace("-", MINUS)


def format_pace(x: float | None) -> str:
    """Milliseconds: one decimal below a hundred."""
    return DASH if x is None else f"{x:,.{0 if x >= 100 else 1}f}"


def read_bounds(interval: Mapping[str, Any]) -> tuple[float, float]:
    """(low, high) to draw: the value itself where there is no interval."""
    value: float = interval["value"]
    low, high = interval["low"], interval["high"]
    return (value, value) if low is None or high is None else (low, high)


def estimate(interval: Interval, write: Callable[[float | None], str] = format_number) -> Html:
    """A value with its 95% interval in small type."""
    if not interval:
        return Html(DASH)
    if interval["low"] is None:
        return Html(escape(write(interval["value"])))
    value, low, high = (write(interval[key]) for key in ("value", "low", "high"))
    return Html(f'{escape(value)} <span class="interval">{escape(low)} to {escape(high)}</span>')


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    text_columns: Sequence[int] = (0,),
) -> Html:
    """A table. The first cell of a row is its header; `text_columns` are left-aligned.

    Cells: text is escaped, numbers are written by `format_number`, None is a dash.
    """
    head = "".join(
        f'<th scope="col"{_kind(i, text_columns)}>{escape(c)}</th>' for i, c in enumerate(columns)
    )
    lines = []
    for row in rows:
        cells = "".join(
            f"<td{_kind(i, text_columns)}>{_cell(c)}</td>"
            if i
            else f'<th scope="row"{_kind(0, text_columns)}>{_cell(c)}</th>'
            for i, c in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _kind(index: int, text_columns: Sequence[int]) -> str:
    return ' class="text"' if index in text_columns else ""


def _cell(value: object) -> str:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return escape(format_number(value))
    return escape(value)


@dataclass(frozen=True)
class Bar:
    """One row of `bars`: its length is `value` on the common scale, `shown` is what is written."""

    label: str
    value: float | None
    shown: str
    kind: str = "main"
    low: float | None = None
    high: float | None = None


def bars(title: str, rows: Sequence[Bar], end: float, *, note: object = "") -> Html:
    """Horizontal bars from 0 to `end`, as a table: name, bar, number."""
    lines = "".join(
        f'<tr><th scope="row">{escape(row.label)}</th><td class="track">{_track(row, end)}</td>'
        f'<td class="shown">{escape(row.shown)}</td></tr>'
        for row in rows
    )
    foot = f'<p class="note">{escape(note)}</p>' if note else ""
    return Html(f'<table class="bars"><caption>{escape(title)}</caption>{lines}</table>{foot}')


def _track(row: Bar, end: float) -> str:
    def place(x: float) -> float:
        return 100 * max(0.0, min(1.0, x / end if end else 0.0))

    if row.value is None:
        return ""
    drawn = f'<i class="bar {escape(row.kind)}" style="width:{place(row.value):.2f}%"></i>'
    if row.low is not None and row.high is not None:
        left, right = place(row.low), place(row.high)
        drawn += f'<i class="whisker" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
    return f'<span class="bar-box">{drawn}</span>'
