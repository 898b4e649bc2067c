"""Figures in the docs are those of the result files."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def load(name: str, monkeypatch) -> Any:
    """A module of benchmarks/ under a name of its own: `training` is a folder of tests, too."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_training_tables_are_drawn_from_the_result_file(monkeypatch):
    table = load("training_table", monkeypatch)
    page = table.PAGE.read_text(encoding="utf-8")
    report = json.loads(table.RESULTS.read_text())
    assert table.replace_tables(page, report) == page, "run python benchmarks/training_table.py"
    measured = [p for run in report["runs"] for p in run["points"].values() if "mfu" in p]
    assert all(p["card"] for p in measured)
    packed = next(p for p in measured if p["shape"] == "0.5b" and p["compiled"])
    assert f"| {packed['tokens_per_s']:,.0f} |" in page


def test_the_speed_up_is_that_of_one_call_on_one_card(monkeypatch):
    """Rows of two cards are never divided by each other."""
    summarise = load("training", monkeypatch).summarise

    def run(card: str, **speeds: float) -> dict[str, object]:
        names = {"packed": "packed_0.5b", "padded": "padded_0.5b", "step": "step_1.5b"}
        return {
            "points": {
                names[k]: {"card": card, "tokens_per_s": v, "mfu": v / 1000, "peak_memory_gb": v}
                for k, v in speeds.items()
            }
        }

    runs = [run("A", packed=400, step=90), run("B", packed=300, padded=100)]
    assert summarise(runs[:1])["speedup_over_padded"] is None
    assert summarise(runs[:1])["mfu_packed_0p5b"] == 0.4
    found = summarise([*runs, run("A", padded=10)])
    assert (found["speedup_over_padded"], found["mfu_packed_0p5b"], found["card"]) == (3, 0.3, "B")
    assert (found["peak_memory_gb_1p5b"], found["card_1p5b"]) == (90, "A")


def test_the_table_of_endings_is_that_of_its_file(monkeypatch):
    ends = load("at_most_ends", monkeypatch)
    rows = json.loads((ROOT / "benchmarks/results/at_most_ends_cpu.json").read_text())["rows"]
    assert ends.table(rows) in (ROOT / "docs/control.md").read_text()


def test_the_results_of_page_and_readme_are_written_from_the_files(monkeypatch, tmp_path: Path):
    page = load("results_page", monkeypatch)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for image in (ROOT / "docs" / "images").iterdir():
        (tmp_path / "docs" / "images" / image.name).touch()
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    page.main(ROOT / "benchmarks" / "results", tmp_path / "docs" / "results.md")
    for name in ("README.md", "docs/results.md"):
        written = (tmp_path / name).read_text(encoding="utf-8")
        assert written == (ROOT / name).read_text(encoding="utf-8"), (
            "run python benchmarks/results_page.py"
        )
