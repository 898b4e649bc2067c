"""PNG figures for the README and the docs, drawn from result files by matplotlib."""

from pathlib import Path
from typing import Any

from lenvm.files import read_json, read_jsonl

BLUE, ORANGE, GREY = "#0a6ebd", "#c2571a", "#8b949e"


def draw_demo(folder: Path, path: Path) -> None:
    """A held-out answer's predicted and true remaining tokens, and the length score of control.

    folder: a finished demo. Writes a PNG to `path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = read_json(folder / "summary.json")
    traces = [row for _, row in read_jsonl(folder / "traces.jsonl")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[1.7, 1])
    _draw_curve(left, max(traces, key=lambda t: len(t["tokens"])))  # the longest one
    equal = summary["equal_to"]
    arms = {"without control": equal["unguided"], "with control": equal["guided"]}
    right.bar(list(arms), [a["length_score"] for a in arms.values()], color=[GREY, BLUE], width=0.6)
    for i, arm in enumerate(arms.values()):
        right.text(i, arm["length_score"] + 1.5, f"{arm['length_score']:.0f}", ha="center")
    right.set_ylim(0, 105)
    right.set_title(f"Length score at {' and '.join(map(str, equal['targets']))} tokens")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_curve(axis: Any, trace: dict[str, Any]) -> None:
    states = trace["states"]
    steps = [s["step"] for s in states]
    if "p10" in states[0]:
        low, high = [s["p10"] for s in states], [s["p90"] for s in states]
        axis.fill_between(
            steps, low, high, color=BLUE, alpha=0.14, linewidth=0, label="80% interval"
        )
    axis.plot(steps, [s["length"] for s in states], color=BLUE, label="predicted")
    if states[0]["remaining_true"] is not None:
        truth = [s["remaining_true"] for s in states]
        axis.plot(steps, truth, color=ORANGE, linestyle="--", label="true")
    axis.set_ylim(0, 2.2 * max(s["remaining_true"] or s["length"] for s in states))
    axis.set_xlabel("tokens written")
    axis.set_ylabel("tokens to come")
    axis.set_title("A held-out answer, token by token")
    axis.legend(frameon=False)
