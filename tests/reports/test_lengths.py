from pathlib import Path

import pytest

from data.test_stats import make
from lenvm.data.stats import compute_histogram, compute_stats
from lenvm.reports.lengths import draw_lengths


def test_histogram_bins_are_quarter_octaves():
    counts = compute_histogram(range(1, 1025))
    assert sum(counts.values()) == 1024
    assert list(counts)[:3] == [1, 2, 3]
    assert counts[512] == 97  # 512 .. 608
    assert counts[1024] == 1


def test_a_plot_holds_every_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import matplotlib.axes

    drawn: list[str] = []
    step = matplotlib.axes.Axes.step

    def record(self, *args, label, **options):  # type: ignore[no-untyped-def]
        drawn.append(label)
        return step(self, *args, label=label, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "step", record)
    rows = [make(f"p{i}", 0, 5 + i, domain=("math", "code")[i % 2]) for i in range(50)]
    draw_lengths(compute_stats(rows), tmp_path / "plot.png")
    assert sorted(drawn) == ["code", "math"]
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
