"""The grid file: a base, axes, and the cells that they span.

```toml
design = "product"                # or "ablation": each axis alone, the others at the base

[base]                            # options of `lenvm train`
data = ["trajectories.jsonl"]

[axes]
num_prompts = [250, 500, 1000]    # the grid's own: a subset of the training prompts
completions = [1, 2, 4, 16]       # the grid's own: completions kept per training prompt
gamma = [0.99, 0.997]             # any option of `lenvm train`
seed = [0, 1]                     # cells that differ in the seed alone are averaged

[[axes.model]]                    # several options under one label
label = "135M"
backbone = "smollm2"
```
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lenvm.errors import DataError, InputError
from lenvm.files import hash_config

DESIGNS = ("product", "ablation")
SUBSET_KEYS = ("num_prompts", "completions")
DEFAULT_HEAD = "distribution"
"""That of `lenvm train`."""
Value = dict[str, Any]
"""One value of an axis: `label` and the settings that it makes."""


@dataclass(frozen=True)
class Cell:
    """One training. `axes`: its place in the grid by label; `settings`: the options it makes."""

    axes: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def id(self) -> str:
        return hash_config({"axes": dict(self.axes), "settings": dict(self.settings)})


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked."""

    base: Mapping[str, Any]
    axes: Mapping[str, list[Value]]
    design: str = "product"

    def cells(self) -> list[Cell]:
        """All cells, in the order of the axes. An ablation has the base, then each axis alone."""
        names = list(self.axes)
        if self.design == "product":
            return [
                _to_cell(self.base, dict(zip(names, row, strict=True)))
                for row in product(*self.axes.values())
            ]
        fixed = {name: values[0] for name, values in self.axes.items()}
        seeds = self.axes.get("seed", [None])
        cells: dict[str, Cell] = {}
        for name in names:
            for value, seed in product(self.axes[name], seeds):
                chosen = fixed | {name: value} | ({"seed": seed} if seed else {})
                cell = _to_cell(self.base, chosen)
                cells.setdefault(cell.id, cell)
        return list(cells.values())

    def labels(self) -> dict[str, list[Any]]:
        """The labels of each axis."""
        return {name: [v["label"] for v in values] for name, values in self.axes.items()}


def load_grid(path: Path) -> Grid:
    """Read a grid file. DataError or InputError says what is wrong where."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no grid file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not TOML: {error}") from None
    unknown = set(raw) - {"design", "base", "axes"}
    if unknown:
        raise InputError(
            f"{path}: {', '.join(sorted(unknown))}: unknown; a grid has design, base and axes"
        )
    design = raw.get("design", "product")
    if design not in DESIGNS:
        raise InputError(f"{path}: design is {design!r}; allowed: {', '.join(DESIGNS)}")
    axes = read_axes(str(path), raw.get("axes", {}))
    grid = Grid(raw.get("base", {}), axes, design)
    if design == "ablation" and set(axes) == {"seed"}:
        raise InputError(f"{path}: an ablation needs another axis than the seed")
    _check_gammas(str(path), grid)
    return grid


def _check_gammas(where: str, grid: Grid) -> None:
    """InputError where cells under a distribution head differ in gamma alone: its loss is the
    likelihood of the length, whatever gamma is, so that they would be one training."""
    seen: dict[str, Any] = {}
    for cell in grid.cells():
        if cell.settings.get("head", DEFAULT_HEAD) != "distribution":
            continue
        rest = hash_config({k: v for k, v in cell.settings.items() if k != "gamma"})
        gamma = cell.settings.get("gamma", "auto")
        if seen.setdefault(rest, gamma) != gamma:
            raise InputError(
                f"{where}: cells differ in gamma alone ({seen[rest]} and {gamma}) under a "
                "distribution head, whose loss does not use gamma: they would be the same "
                'training twice. Set head = "scalar" in [base], or leave the gammas out; a '
                "distribution head is read at any gamma after training"
            )


def read_axes(where: str, axes: Mapping[str, Any]) -> dict[str, list[Value]]:
    """Axes as tables with labels. InputError, which names `where`, for what is none."""
    if not axes:
        raise InputError(f"{where}: no [axes]; give at least one with its values")
    return {name: _read_axis(where, name, values) for name, values in axes.items()}


def _read_axis(path: str, name: str, values: Any) -> list[Value]:
    where = f"{path}: axis {name!r}"
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: expected a list of values; got {values!r}")
    tables = [isinstance(v, dict) for v in values]
    if any(tables) and not all(tables):
        raise InputError(f"{where}: mixes tables and plain values")
    if any(tables) and not all("label" in v for v in values):
        raise InputError(f"{where}: every table needs a label")
    found = [v if isinstance(v, dict) else {"label": v, name: v} for v in values]
    labels = [str(v["label"]) for v in found]
    if len(set(labels)) < len(labels):
        raise InputError(f"{where}: a value occurs twice: {', '.join(labels)}")
    return found


def _to_cell(base: Mapping[str, Any], chosen: Mapping[str, Value]) -> Cell:
    settings = dict(base)
    for value in chosen.values():
        settings |= {k: v for k, v in value.items() if k != "label"}
    return Cell({name: value["label"] for name, value in chosen.items()}, settings)
