"""How long completions are: a PNG of `lenvm stats`, drawn by matplotlib."""

from collections import Counter
from pathlib import Path

from lenvm.data.stats import TrajectoryStats
from lenvm.errors import InputError


def draw_lengths(stats: TrajectoryStats, path: Path) -> None:
    """Share of completions by length, on a logarithmic axis, a line for each domain.

    Raises InputError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install 'lenvm[evals]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    domains: dict[str, Counter[int]] = {}
    for group in stats.groups:
        if (group.domain, group.split) != ("all", "all"):
            domains.setdefault(group.domain, Counter()).update(group.histogram)
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for name, counts in domains.items():
        total, edges = sum(counts.values()), sorted(counts)
        axis.step(edges, [counts[e] / total for e in edges], where="post", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens of a completion")
    axis.set_ylabel("share of completions")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
