"""Result folders and trace files as a report finds them. Reads files, never runs a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.errors import DataError
from lenvm.files import read_json, read_jsonl

SUMMARY_SCHEMA = "lenvm.eval.summary/1"
DEMO_SCHEMA = "lenvm.demo/1"
EVALUATIONS = ("length-prediction", "lifebench", "tradeoff", "length-tokens", "scaling")
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """One result. `kind`: an evaluation, `demo`, or `traces` (`path` is then the file)."""

    path: Path
    kind: str
    summary: Numbers

    @property
    def model(self) -> str:
        """What the result is of, for its title."""
        return str(self.summary.get("model") or self.path.name)

    def grades(self) -> Iterator[Numbers]:
        """Rows of grades.jsonl; none where the file is not there."""
        path = self.path / "grades.jsonl"
        if path.exists():
            for _, row in read_jsonl(path):
                yield row


def find_results(paths: Sequence[Path]) -> list[Result]:
    """Results of folders and trace files, in the order given.

    A folder without a summary of its own stands for the result folders and `*traces.jsonl` files
    right inside it. Raises DataError for what holds no result.
    """
    found: list[Result] = []
    for path in paths:
        if path.is_file() or (path / "summary.json").is_file():
            found.append(_load(path))
            continue
        inside = sorted(p.parent for p in path.glob("*/summary.json"))
        inside += sorted(path.glob("*traces.jsonl"))
        if not inside:
            why = "does not exist" if not path.exists() else "holds no summary.json and no traces"
            raise DataError(
                f"{path} {why}; `lenvm eval`, `lenvm demo` and `lenvm values --jsonl` write results"
            )
        found += map(_load, inside)
    return found


def _load(path: Path) -> Result:
    if path.is_file():
        return Result(path, "traces", {})
    file = path / "summary.json"
    summary = read_json(file)
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if schema == DEMO_SCHEMA:
        return Result(path, "demo", summary)
    if schema != SUMMARY_SCHEMA:
        raise DataError(f"{file} has schema {schema!r}; known: {SUMMARY_SCHEMA!r}, {DEMO_SCHEMA!r}")
    if summary.get("evaluation") not in EVALUATIONS:
        raise DataError(
            f"{file} is of evaluation {summary.get('evaluation')!r}; known: "
            + ", ".join(EVALUATIONS)
        )
    return Result(path, summary["evaluation"], summary)
