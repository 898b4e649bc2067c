"""`lenvm eval scaling`: train and evaluate every cell of a grid, resumable.

Training and evaluation are functions given by the caller, so that this file knows neither.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lenvm.errors import LenVMError
from lenvm.evals.bootstrap import Resampler
from lenvm.evals.runner import (
    Progress,
    Record,
    ignore_progress,
    load_records,
    write_results,
)
from lenvm.evals.scaling.grid import SUBSET_KEYS, Cell, Grid
from lenvm.evals.scaling.subset import write_subset
from lenvm.files import JsonlWriter, claim, hash_config

EVALUATION = "scaling"
RECORD_SCHEMA = "lenvm.eval.cell/1"
Metrics = dict[str, float]
RunCell = Callable[[Mapping[str, Any], Path], Metrics]
"""(training options, folder of the cell) -> metrics by name. It may resume what it finds there."""


def run_grid(
    grid: Grid, folder: Path, run_cell: RunCell, *, progress: Progress = ignore_progress
) -> dict[str, Any]:
    """Run the cells that have no result; returns the summary.

    A cell that fails with a LenVMError is recorded with its sentence and tried again next time; the
    others go on. Raises InputError where the folder holds another grid.
    """
    cells = {cell.id: cell for cell in grid.cells()}
    manifest = {"base": dict(grid.base), "axes": dict(grid.axes), "design": grid.design}
    path = folder / "records.jsonl"
    claim(path, f"eval.{EVALUATION}", manifest)
    records = load_records(folder) if path.exists() else {}
    todo = [c for i, c in cells.items() if records.get(i, {"error": ""})["error"] is not None]
    with JsonlWriter(path) as writer:
        for index, cell in enumerate(todo):
            progress(EVALUATION, len(cells) - len(todo) + index, len(cells))
            record = _run(cell, folder, run_cell)
            writer.write(record)
            records[cell.id] = record
    progress(EVALUATION, len(cells), len(cells))
    return summarise(folder, [records[i] for i in cells], grid, manifest)


def summarise(
    folder: Path, records: list[Record], grid: Grid, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """grades.jsonl and summary.json from records; returns the summary."""
    done = [r for r in records if r["error"] is None]
    names = sorted({name for r in done for name in r["metrics"]})
    groups: dict[str, list[Record]] = {}
    for record in done:
        place = {k: v for k, v in record["axes"].items() if k != "seed"}
        groups.setdefault(hash_config(place), []).append(record)
    failed = [r for r in records if r["error"] is not None]
    return write_results(
        folder,
        EVALUATION,
        model="",
        config=manifest,
        grades=[{"id": r["id"], "axes": r["axes"], **r["metrics"]} for r in done],
        num_failed=len(failed),
        notes=[f"{_describe(r['axes'])} failed: {r['error']}" for r in failed],
        summary={
            "design": grid.design,
            "axes": {name: labels for name, labels in grid.labels().items() if name != "seed"},
            "metrics": names,
            "cells": [_average(group, names) for group in groups.values()],
        },
    )


def _describe(axes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {label}" for name, label in axes.items())


def _run(cell: Cell, folder: Path, run_cell: RunCell) -> Record:
    metrics: Metrics = {}
    error = None
    try:
        metrics = run_cell(_with_subset(cell, folder), folder / "cells" / cell.id)
    except LenVMError as caught:
        error = str(caught)
    return {
        "schema": RECORD_SCHEMA,
        "id": cell.id,
        "axes": dict(cell.axes),
        "settings": dict(cell.settings),
        "metrics": metrics,
        "error": error,
    }


def _with_subset(cell: Cell, folder: Path) -> dict[str, Any]:
    """The cell's training options; where it asks for a subset, `data` is that subset."""
    settings = {k: v for k, v in cell.settings.items() if k not in SUBSET_KEYS}
    subset = {k: cell.settings[k] for k in SUBSET_KEYS if k in cell.settings}
    if subset:
        data = list(settings.get("data", []))
        seed = int(settings.get("seed", 0))
        name = hash_config({"data": data, "seed": seed, **subset})
        target = folder / "data" / f"{name}.jsonl"
        settings["data"] = [str(write_subset([Path(p) for p in data], target, seed=seed, **subset))]
    return settings


def _average(records: list[Record], names: list[str]) -> dict[str, Any]:
    """One place of the grid: metrics averaged over its seeds, intervals from the seeds, and the
    least and the greatest of them: all there is to say of two or three."""
    ids = [r["id"] for r in records]
    resampler = Resampler(ids)
    metrics = {}
    for name in names:
        rows = [(r["metrics"][name], r["id"]) for r in records if name in r["metrics"]]
        values = [v for v, _ in rows]
        found = resampler.mean(values, [i for _, i in rows]).to_json()
        metrics[name] = found and {**found, "least": min(values), "greatest": max(values)}
    axes = {k: v for k, v in records[0]["axes"].items() if k != "seed"}
    return {"axes": axes, "num_seeds": len(records), "metrics": metrics}
