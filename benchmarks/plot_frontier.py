"""Draw the control frontier: length score against what the control costs in text quality.

    python benchmarks/plot_frontier.py benchmarks/results/frontier_smollm2_h200.json \
        docs/images/frontier_smollm2.png
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"none": "#888888", "hard": "#c0392b", "soft": "#e39b2d", "conditional": "#2a6fbb"}


def draw(results: dict[str, Any], target: Path) -> None:
    arms: dict[str, list[dict[str, float]]] = defaultdict(list)
    for key, point in results["control"].items():
        arms[key.split(" | ")[1]].append(point)
    means = {
        arm: {k: sum(p[k] for p in points) / len(points) for k in points[0]}
        for arm, points in arms.items()
    }
    best = means["none"]["log_prob"]
    figure, axis = plt.subplots(figsize=(7.2, 4.2), dpi=150)
    for number, (arm, mean) in enumerate(means.items()):
        x, y = best - mean["log_prob"], mean["score"]
        axis.scatter(
            x, y, s=30 + 170 * mean["natural_end"], color=COLOURS[arm.split()[0]], alpha=0.75, lw=0
        )
        axis.annotate(
            arm.replace("conditional", "cond."),
            (x, y),
            xytext=(10, 5 if number % 2 == 0 else -8),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_xlabel("cost in quality: log-probability lost per token (nats, under the generator)")
    axis.set_ylabel("Equal-To length score")
    axis.set_ylim(0, 108)
    axis.set_xlim(-0.15, max(best - m["log_prob"] for m in means.values()) + 0.45)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        "SmolLM2-135M on LIFEBench, targets 64-512; size: share of natural endings",
        fontsize=9,
        loc="left",
    )
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
