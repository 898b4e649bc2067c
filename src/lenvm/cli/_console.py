"""What the commands share: the console, progress bars, tables."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console


def console() -> "Console":
    """Standard error: results go to standard output, everything else here."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


MIN_TEXT = len("(prompt)")
"""Characters of a first column that gives way."""


@contextmanager
def stages() -> "Iterator[Callable[[str, int, int], None]]":
    """Progress by stage: a bar with count, rate and time left; plain lines without a terminal.

    Yields `advance(stage, done, total)`. What a stage's first call counts as done was there before:
    rate and time left are of what came since.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    started: dict[str, tuple[float, int]] = {}
    printed: dict[str, float] = {}
    tasks: dict[str, Any] = {}
    bars = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>9}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        disable=not sys.stderr.isatty(),
    )

    def advance(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun, before = started.setdefault(stage, (now, done))
        speed = (done - before) / (now - begun) if done > before and now > begun else 0.0
        rate = f"{speed:.2f}/s" if speed else ""
        if not bars.disable:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, completed=done, rate="")
            bars.update(tasks[stage], completed=done, total=total, rate=rate)
        elif done == total or now - printed.get(stage, -60.0) >= 15:
            printed[stage] = now
            left = f" {rate}, {(total - done) / speed:.0f} s left" if speed else ""
            print(f"{stage}: {done}/{total}{left}", file=sys.stderr, flush=True)

    with bars:
        yield advance


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of data as a line for the user, not for the programmer."""
    import warnings

    from lenvm.errors import DataWarning

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, DataWarning):
            print(f"lenvm: warning: {message}", file=sys.stderr, flush=True)
        else:
            shown(message, category, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, many: bool = False
) -> None:
    """A table on standard output; the first column is left-aligned, the others right.

    many: columns of short numbers, which stay whole; the first one's long texts give way.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    if many:
        table.box, table.padding = box.SIMPLE_HEAD, 0
    for i, name in enumerate(columns):
        justify: Literal["left", "right"] = "left" if i == 0 else "right"
        least = MIN_TEXT if many and i == 0 else None
        table.add_column(
            name, justify=justify, overflow="fold", no_wrap=many and i > 0, min_width=least
        )
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    screen = Console(highlight=False)
    if many:  # rather broken by the terminal than cut
        wide = screen.options.update(width=1000)
        screen.width = max(screen.width, screen.measure(table, options=wide).minimum)
    screen.print(table)
