"""Charts without a library: marks in a stretched SVG, type as HTML beside it.

The SVG's units are thousandths of the plot, stretched to whatever place the page has; strokes do
not scale, and a dot is a line of no length with a round end. So a chart has one size of type and
one weight of line on a telephone and on a wall.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lenvm.reports.page import Html, escape
from lenvm.reports.tables import format_number, format_percent

Point = tuple[float, float]
MAX_LINE_POINTS = 1200
LABEL_HEIGHT, LABEL_REACH = 0.075, 0.45
"""Room that a label takes, in shares of the plot's height and width."""


def pick_kind(index: int) -> str:
    """The css kind of a series: eight colours, then again."""
    return f"s{index % 8}"


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`."""

    low: float
    high: float
    label: str
    log: bool = False
    percent: bool = False
    whole: bool = False
    """Ticks are whole numbers only."""
    marks: tuple[float, ...] | None = None
    """Ticks to use in place of round numbers."""
    names: tuple[str, ...] | None = None
    """What is written at `marks` in place of their numbers."""

    @classmethod
    def fit(
        cls,
        values: Iterable[float],
        label: str,
        *,
        log: bool = False,
        percent: bool = False,
        zero: bool = True,
        pad: float = 0.06,
    ) -> "Axis":
        """An axis on which all `values` have room; `zero`: from 0 on where nothing is below it."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(known), max(known)) if known else (1.0, 10.0)
        if log:
            return cls(low / (1 + 3 * pad), high * (1 + 3 * pad), label, True, percent)
        room = pad * (high - low or abs(high) or 1.0)
        from_zero = zero and low >= 0
        return cls(0.0 if from_zero else low - room, high + room, label, False, percent)

    def named(self, label: str) -> "Axis":
        """The same scale under another name."""
        return replace(self, label=label)

    def place(self, value: float) -> float:
        """Where a value stands, 0 to 1; values outside stand at the edge."""
        low, high, x = self.low, self.high, value
        if self.log:
            low, high, x = math.log(low), math.log(high), math.log(max(value, self.low))
        return max(0.0, min(1.0, (x - low) / (high - low or 1.0)))

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round numbers on the axis."""
        if self.marks is not None:
            return list(self.marks)
        if self.log:
            return _log_ticks(self.low, self.high)
        step = max(float(self.whole), _round_step((self.high - self.low) / count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def write(self, value: float) -> str:
        """A tick's text."""
        if self.names is not None and self.marks is not None and value in self.marks:
            return self.names[self.marks.index(value)]
        if self.percent:
            return format_percent(value)
        return format_number(int(value) if float(value).is_integer() else value)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return power * next(m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) >= 3:
            return found
    return found


class Chart:
    """A plane with two axes; marks are added one after the other, the later ones on top.

    Kinds are css classes: `main` (predicted, LenVM), `truth`, `base` (what it is compared with),
    `s0` .. `s7` (series).
    """

    def __init__(self, x: Axis, y: Axis, *, height: int = 240, square: bool = False) -> None:
        self.x_axis, self.y_axis = x, y
        self.height, self.square = height, square
        self._marks: list[str] = []
        self._labels: list[str] = []

    def line(self, points: Sequence[Point], kind: str) -> None:
        """A line through the points; a very long one keeps every n-th."""
        step = -(-len(points) // MAX_LINE_POINTS) or 1
        kept = [*points[:-1:step], *points[-1:]]
        path = " ".join(self._xy(x, y) for x, y in kept)
        self._marks.append(f'<polyline class="line {escape(kind)}" points="{path}"/>')

    def band(self, points: Sequence[tuple[float, float, float]], kind: str = "main") -> None:
        """A filled strip: (x, low, high)."""
        step = -(-len(points) // MAX_LINE_POINTS) or 1
        kept = [*points[:-1:step], *points[-1:]]
        forth = [self._xy(x, low) for x, low, _ in kept]
        back = [self._xy(x, high) for x, _, high in reversed(kept)]
        self._marks.append(f'<polygon class="band {kind}" points="{" ".join(forth + back)}"/>')

    def dot(self, x: float, y: float, kind: str, tip: str = "") -> None:
        """A dot; `tip` shows when it is pointed at."""
        data = f' data-tip="{escape(tip)}"' if tip else ""
        self._marks.append(f'<path class="dot {escape(kind)}"{data} d="M{self._xy(x, y)}h.01"/>')

    def span(self, start: Point, end: Point, kind: str) -> None:
        """A thin line between two points: an interval."""
        a, b = self._xy(*start), self._xy(*end)
        self._marks.append(f'<path class="span {escape(kind)}" d="M{a}L{b}"/>')

    def column(self, left: float, right: float, top: float, kind: str, tip: str = "") -> None:
        """A bar of a histogram, from the foot of the plot."""
        data = f' data-tip="{escape(tip)}"' if tip else ""
        x, width = 1000 * self.x_axis.place(left), 1000 * self.x_axis.place(right)
        y = 1000 * (1 - self.y_axis.place(top))
        self._marks.append(
            f'<rect class="column {kind}"{data} x="{x:.1f}" y="{y:.1f}" '
            f'width="{width - x:.1f}" height="{1000 - y:.1f}"/>'
        )

    def diagonal(self) -> None:
        """Where x = y."""
        low = max(self.x_axis.low, self.y_axis.low)
        high = min(self.x_axis.high, self.y_axis.high)
        self.line([(low, low), (high, high)], "truth")

    def level(self, y: float, kind: str = "truth") -> None:
        """A horizontal line."""
        self.line([(self.x_axis.low, y), (self.x_axis.high, y)], kind)

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words beside a point."""
        self._label(self.x_axis.place(x), self.y_axis.place(y), words, kind)

    def _label(self, across: float, up: float, words: str, kind: str = "") -> None:
        left, top = 100 * across, 100 * (1 - up)
        side = " left" if left > 62 else ""
        self._labels.append(
            f'<span class="at {kind}{side}" style="left:{left:.2f}%;top:{top:.2f}%">'
            f"{escape(words)}</span>"
        )

    def name_points(self, points: Sequence[tuple[float, float, str]]) -> None:
        """Words beside several points, moved up or down where they would meet. (x, y, words)"""
        ordered = sorted(points, key=lambda p: -p[1])
        across = [self.x_axis.place(x) for x, _, _ in ordered]
        up = [self.y_axis.place(y) for _, y, _ in ordered]
        for down in (True, False):  # down from the highest, then up again from the floor
            order = range(len(ordered)) if down else range(len(ordered) - 1, -1, -1)
            taken: list[int] = []
            for i in order:
                up[i] = up[i] if down else max(up[i], LABEL_HEIGHT / 2)
                for other in taken:
                    near = abs(across[other] - across[i]) < LABEL_REACH
                    if near and abs(up[other] - up[i]) < LABEL_HEIGHT - 1e-9:
                        up[i] = up[other] + (-LABEL_HEIGHT if down else LABEL_HEIGHT)
                taken.append(i)
        for at, level, (_, _, words) in zip(across, up, ordered, strict=True):
            self._label(at, level, words)

    def html(self, label: str, *, extra: str = "") -> Html:
        """The chart; `label` says in words what it shows. `extra`: HTML inside the plot."""
        shape = "plot square" if self.square else "plot"
        style = "" if self.square else f' style="height:{self.height}px"'
        return Html(
            f'<div class="chart"><div class="y-label">{escape(self.y_axis.label)}</div>'
            f'<div class="{shape}"{style}>{self._ticks()}'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(label)}">{"".join(self._marks)}</svg>'
            f"{''.join(self._labels)}{extra}</div>"
            f'<div class="x-label">{escape(self.x_axis.label)}</div></div>'
        )

    def _ticks(self) -> str:
        parts = []
        for y in self.y_axis.ticks(4):
            top = 100 * (1 - self.y_axis.place(y))
            parts.append(f'<i class="grid" style="top:{top:.2f}%"></i>')
            parts.append(
                f'<span class="tick y" aria-hidden="true" style="top:{top:.2f}%">'
                f"{escape(self.y_axis.write(y))}</span>"
            )
        for x in self.x_axis.ticks(6):
            left = 100 * self.x_axis.place(x)
            parts.append(
                f'<span class="tick x" aria-hidden="true" style="left:{left:.2f}%">'
                f"{escape(self.x_axis.write(x))}</span>"
            )
        return "".join(parts)

    def _xy(self, x: float, y: float) -> str:
        return f"{1000 * self.x_axis.place(x):.1f},{1000 * (1 - self.y_axis.place(y)):.1f}"
