"""Cells and tables of the results page: numbers with intervals as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Numbers = Mapping[str, Any]
MISSING = "not measured yet"
NAMES = {
    "coder05": "Qwen2.5-Coder-0.5B",
    "coder15": "Qwen2.5-Coder-1.5B",
    "smollm2": "SmolLM2-135M",
}


def look_up(values: Any, *keys: str) -> Any:
    """values[k1][k2]..., None where one is missing."""
    for key in keys:
        values = (values or {}).get(key)
    return values


def title(name: str) -> str:
    """A step's or model's name with the generator written out."""
    first, _, rest = name.partition("-")
    return f"{NAMES.get(first, first)} {rest}".strip()


def point_of(domain: Numbers) -> Numbers:
    """Errors of a head's best point prediction: the geometric mean, where it knows one."""
    return domain.get("geometric") or domain


def value_of(estimate: Numbers | None) -> float | None:
    return None if estimate is None else float(estimate["value"])


def vary_alone(run: Numbers) -> Iterator[tuple[str, list[Numbers]]]:
    """(axis, cells) of a grid's axes with more than one value: the cells that differ from the first
    one in this axis alone, in its order."""
    base = run["cells"][0]["axes"] if run["cells"] else {}
    for axis in (a for a in base if a != "seed"):
        cells = [
            c
            for c in run["cells"]
            if all(c["axes"][k] == v for k, v in base.items() if k not in (axis, "seed"))
        ]
        if len(cells) > 1:
            numbers = not isinstance(cells[0]["axes"][axis], str)
            yield axis, sorted(cells, key=lambda c: c["axes"][axis]) if numbers else cells


def number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def interval(estimate: Numbers | None, digits: int) -> str:
    """`62.1 [60.0, 64.2]`."""
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.{digits}f}"
    value, low, high = (f"{estimate[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def percent(estimate: Numbers | None, *, short: bool = False) -> str:
    """`62.1% [60.0, 64.2]`; short: without the bounds."""
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return f"{100 * estimate['value']:.1f}%"
    value, low, high = (f"{100 * estimate[k]:.1f}" for k in ("value", "low", "high"))
    return f"{value}%" if short else f"{value}% [{low}, {high}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def image(images: Path, name: str, text: str) -> str:
    """A picture, where it has been drawn."""
    return f"![{text}](images/{name})" if (images / name).exists() else ""


def about(found: Numbers | None) -> str:
    """Who measured, and what it took."""
    if not found:
        return ""
    steps = [
        f"{name} "
        + (f"{s['gpu_seconds']:.0f} s" if s["gpu_seconds"] else "(time not recorded)")
        + (f", {s['tokens_per_s']:,.0f} tokens/s" if s.get("tokens_per_s") else "")
        + (
            ""
            if s.get("hardware", found["hardware"]) == found["hardware"]
            else f" on {s['hardware']}"
        )
        + ("" if s["finished"] else " (not finished)")
        for name, s in found["steps"].items()
    ]
    return f"*{found['hardware']}, commit {found['commit'] or 'unknown'}; {'; '.join(steps)}.*"


def join(*parts: str) -> str:
    return "\n\n".join(p for p in parts if p)


def pick_length_tokens(run: Numbers, side: str) -> list[Numbers]:
    """The tokens of a side by number of events whose mean gain is of that side, too: those that
    are merely frequent have as many events of the other."""
    sign = 1 if side == "longer" else -1
    return [r for r in run[f"{side}_by_event"] if sign * r["mean_gain"] > 0.002]


def is_plain(token: str) -> bool:
    """Not a part of a character, nor what a table cannot show."""
    return "`" not in token and token.replace("␣", "").isascii()
