"""Draw docs/images/scorer_h200.png from benchmarks/results/scorer_h200.json.

python benchmarks/plot_scorer.py [RESULT.json] [IMAGE.png]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]


def main() -> None:
    paths = [
        ROOT / "benchmarks" / "results" / "scorer_h200.json",
        ROOT / "docs" / "images" / "scorer_h200.png",
    ]
    for i, argument in enumerate(sys.argv[1:3]):
        paths[i] = Path(argument)
    result = json.loads(paths[0].read_text())
    points = [p for p in result["points"] if p["candidates"] == 8]
    models = sorted({p["model"] for p in points})
    figure, axes = plt.subplots(1, len(models), figsize=(5.2 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for color, prefix in enumerate(sorted({p["prefix"] for p in points})):
            line = sorted(
                (p["batch"], p["step_ms"], p["floor_ms"], p.get("two_forward_ms"))
                for p in points
                if p["model"] == model and p["prefix"] == prefix
            )
            batches = [b for b, *_ in line]
            style = {"color": f"C{color}"}
            axis.plot(batches, [s for _, s, *_ in line], "o-", label=f"prefix {prefix}", **style)
            axis.plot(batches, [f for _, _, f, _ in line], "--", lw=1, **style)
            two = [(b, t) for b, _, _, t in line if t is not None]
            axis.plot(*zip(*two, strict=True), ":", lw=1.5, **style)
        axis.set(xscale="log", yscale="log", xlabel="requests", ylabel="ms a step")
        axis.set_xticks(batches, batches)
        axis.set_title(f"{Path(model).name} value model, 8 candidates a request")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(title="solid: step, dashed: floor,\ndotted: two forwards", fontsize=8)
    cards = sorted({p.get("device", result["device"]) for p in points})
    commits = sorted({(p.get("commit", result["commit"]) or "unknown")[:8] for p in points})
    figure.suptitle(f"{', '.join(cards)}; commits {', '.join(commits)}", fontsize=9)
    figure.tight_layout()
    paths[1].parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(paths[1], dpi=130)


if __name__ == "__main__":
    main()
