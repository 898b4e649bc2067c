"""Draw the result files of `recipes/results` (and the first SmolLM2 frontier) as PNG.

    python benchmarks/plot_results.py                    # benchmarks/results -> docs/images
    python benchmarks/plot_results.py RESULTS IMAGES

A file that is not there is passed over and named. Nothing is measured here.
"""

import base64
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lenvm.reports.clouds import draw_cloud
from results_cells import NAMES, is_plain, pick_length_tokens, point_of, vary_alone

Numbers = Mapping[str, Any]
COLOURS = {
    "prompt": "#888888",
    "none": "#888888",
    "hard": "#c0392b",
    "soft": "#e39b2d",
    "conditional": "#2a6fbb",
    "shortest": "#123f73",
    "price": "#2a6fbb",
    "tilt": "#5bb0c9",
    "at_most": "#2a6fbb",
    "budget": "#555555",
    "budget_answer": "#e39b2d",
    "concise": "#3a9d5d",
    "eos_bias": "#8465d6",
    "truncate": "#bbbbbb",
}
PAPER_MRE = {"1.5B": (17.0, 29.0, 33.0), "7B": (11.0, 19.5, 23.0), "32B": (9.8, 14.9, 17.1)}
"""Paper: prompt-boundary MRE in percent, math / code / instructions."""
DOMAINS = ("math", "code", "instructions")


def main(results: Path, images: Path) -> list[Path]:
    """Draw what there is; the images made."""
    made = []
    parts: dict[str, Callable[[Numbers, Path], Iterator[Path]]] = {
        "frontier_smollm2_h200.json": first_frontier,
        "frontier_h200.json": frontiers,
        "prediction_h200.json": prediction,
        "tradeoff_h200.json": tradeoffs,
        "scaling_h200.json": grids,
        "ablations_h200.json": grids,
        "length_tokens.json": clouds,
    }
    for name, draw in parts.items():
        path = results / name
        if not path.exists():
            print(f"{name} is not there")
            continue
        made += list(draw(json.loads(path.read_text(encoding="utf-8")), images))
    return made


# -- frontier -------------------------------------------------------------------------------------


def first_frontier(found: Numbers, images: Path) -> Iterator[Path]:
    """The points of the first SmolLM2 measurement, a mean over its targets each."""
    arms: dict[str, list[Numbers]] = defaultdict(list)
    for key, point in found["control"].items():
        arms[key.split(" | ")[1]].append(point)
    means = {
        arm: {k: sum(p[k] for p in points) / len(points) for k in points[0]}
        for arm, points in arms.items()
    }
    best = means["none"]["log_prob"]
    points = {
        arm: (best - m["log_prob"], m["score"], m["natural_end"], None, None)
        for arm, m in means.items()
    }
    title = "SmolLM2-135M on LIFEBench, targets 64-512; size: share of natural endings"
    yield _frontier(points, title, images / "frontier_smollm2.png")


def frontiers(found: Numbers, images: Path) -> Iterator[Path]:
    """One picture per run: length score against the loss in quality, with 95% intervals."""
    for name, run in found["runs"].items():
        points = {}
        for arm in run["arms"]:
            row = arm["equal_to"]
            if row is None or row["quality"]["log_prob_loss"] is None:
                continue
            loss, score, natural = (
                row["quality"]["log_prob_loss"],
                row["score"],
                row["quality"]["natural_end"],
            )
            points[arm["arm"]] = (loss["value"], score["value"], natural["value"], loss, score)
        targets, model = run["targets"], NAMES.get(run["model"], run["model"])
        title = (
            f"{model} on LIFEBench, {run['num_items']} items, targets {min(targets)}-"
            f"{max(targets)}; size: share of natural endings"
        )
        if points:
            yield _frontier(points, title, images / f"{name.replace('-', '_')}.png")


def _frontier(points: Mapping[str, tuple[Any, ...]], title: str, target: Path) -> Path:
    figure, axis = plt.subplots(figsize=(8.6, 4.4), dpi=150)
    ranked = sorted(points.items(), key=lambda entry: entry[1][0])
    for number, (arm, (x, y, natural, loss, score)) in enumerate(ranked, 1):
        kind = arm.split()[0].split(":")[0]
        colour = COLOURS.get(kind, "#000000")
        if loss is not None:
            axis.errorbar(
                x,
                y,
                xerr=_errors([loss]),
                yerr=_errors([score]),
                color=colour,
                lw=0.8,
                zorder=1,
            )
        label = f"{number}  {_short(arm)}"
        size = 30 + 190 * natural
        axis.scatter(x, y, s=size, color=colour, alpha=0.75, lw=0, label=label)
        # numbers stand beside their points, in turn on four sides: near ones stay readable
        offset = ((9, 5), (9, -10), (-13, 6), (-13, -12))[number % 4]
        axis.annotate(str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=8)
    axis.set_xscale("function", functions=(_root, _square))
    ticks = [0, 0.1, 0.25, 0.5, 1, 2, 3]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xlabel("cost in quality: log-probability lost per token (nats, under the generator)")
    axis.set_ylabel("Equal-To length score")
    axis.set_ylim(0, 108)
    axis.set_xlim(-0.01, max(p[0] for p in points.values()) + 0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return _save(figure, axis, title, target)


def _short(arm: str) -> str:
    """An arm's name as people say it."""
    words = {"conditional:": "conditional ", "soft:": "soft ", "tolerance=": "tol. "}
    words |= {"focus=": "focus ", "prompt": "no control", "none": "no control"}
    for name, word in words.items():
        arm = arm.replace(name, word)
    return arm


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


# -- prediction, trade-off, grids -----------------------------------------------------------------


PREDICTORS = ("coder05-lora", "coder05-constrained", "coder05-constrained-prompt", "coder15-lora05")
"""Of all that were trained: each a step of what the results page tells."""


def prediction(found: Numbers, images: Path) -> Iterator[Path]:
    """Relative error before the first token by domain: ours (distribution heads, at their own
    gamma), a constant, the paper's."""
    models = {
        n: m for n, m in found["models"].items() if "@" not in n and m["head"] == "distribution"
    }
    if not models:
        return
    models = {n: m for n, m in models.items() if n in PREDICTORS} or models
    figure, axis = plt.subplots(figsize=(7.2, 3.8), dpi=150)
    first = next(iter(models.values()))
    series: dict[str, list[Any]] = {
        "constant length": [
            _mre(first["domains"].get(d, {}).get("baselines", {}).get("constant")) for d in DOMAINS
        ],
        **{
            n: [_mre(point_of(m["domains"].get(d, {}))) for d in DOMAINS] for n, m in models.items()
        },
        **{f"paper, {n}": [(v, v, v) for v in row] for n, row in PAPER_MRE.items()},
    }
    width = 0.84 / len(series)
    colours = plt.get_cmap("Blues")
    for number, (name, rows) in enumerate(series.items()):
        is_paper, is_constant = name.startswith("paper"), name.startswith("constant")
        colour = (
            "#c9a0a0" if is_paper else "#bbbbbb" if is_constant else colours(0.3 + 0.15 * number)
        )
        for place, row in enumerate(rows):
            if row is None:
                continue
            value, low, high = row
            x = place - 0.42 + (number + 0.5) * width
            axis.bar(x, value, width * 0.9, color=colour, label=name if place == 0 else None)
            if high > low:
                axis.errorbar(x, value, yerr=[[value - low], [high - value]], color="black", lw=0.7)
    axis.set_xticks(range(len(DOMAINS)), DOMAINS)
    axis.set_yscale("log")
    axis.set_ylabel("mean relative error, % (log)")
    axis.legend(fontsize=7, ncols=3, frameon=False)
    yield _save(figure, axis, "Length known before the first token", images / "prediction.png")


def _mre(table: Numbers | None) -> tuple[float, float, float] | None:
    interval = (table or {}).get("mre")
    if not interval:
        return None
    value, ((below,), (above,)) = 100 * interval["value"], _errors([interval], 100)
    return value, value - below, value + above


def _errors(intervals: Sequence[Numbers], scale: float = 1.0) -> list[list[float]]:
    """[distances below, distances above] of error bars; 0 where there are too few clusters."""
    return [
        [0.0 if i[end] is None else scale * sign * (i[end] - i["value"]) for i in intervals]
        for end, sign in (("low", -1), ("high", 1))
    ]


def tradeoffs(found: Numbers, images: Path) -> Iterator[Path]:
    """One picture per run: pass@1 against mean length, a line per family."""
    for name, run in found["runs"].items():
        figure, axis = plt.subplots(figsize=(7.2, 4.2), dpi=150)
        points = {a["arm"]: a for a in run["arms"] if a["pass_at_1"] and a["mean_length"]}
        if "prompt" not in points:
            continue
        for family, curve in run["curves"].items():
            rows = [points[arm] for arm in curve["arms"]]
            colour = COLOURS.get(family, "#000000")
            x = [a["mean_length"]["value"] for a in rows]
            y = [100 * a["pass_at_1"]["value"] for a in rows]
            error = _errors([a["pass_at_1"] for a in rows], 100)
            label = family.replace("_", " ")
            axis.errorbar(x, y, yerr=error, color=colour, marker="o", ms=4, lw=1.4, label=label)
        plain = points["prompt"]
        axis.axvline(plain["mean_length"]["value"] * 2 / 3, color="#bbbbbb", lw=0.8, ls=":")
        axis.set_xlabel("mean tokens of an answer (dotted: two thirds of the unguided)")
        axis.set_ylabel("pass@1, %")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
        title = (
            f"{run['model']}, {run['benchmark']}: {run['num_items']} questions, "
            f"{max(a['num_requests'] for a in run['arms']):,} answers an arm"
        )
        yield _save(figure, axis, title, images / f"tradeoff_{name.replace('-', '_')}.png")


def grids(found: Numbers, images: Path) -> Iterator[Path]:
    """Each axis of a grid: error at the prompt."""
    for name, run in found["runs"].items():
        panels = list(vary_alone(run))
        if not panels:
            continue
        figure, plots = plt.subplots(
            1, len(panels), figsize=(2.6 * len(panels) + 0.8, 3.2), dpi=150, squeeze=False
        )
        for (axis, cells), plot in zip(panels, plots[0], strict=True):
            labels = [str(c["axes"][axis]).replace("_", "\n") for c in cells]
            style = "o" if isinstance(cells[0]["axes"][axis], str | bool) else "o-"
            plot.plot(labels, [100 * c["metrics"]["mre"] for c in cells], style, color="#2a6fbb")
            plot.set_title(axis.replace("_", " "), fontsize=9)
            plot.set_ylim(bottom=0)
            plot.margins(x=0.2)
            plot.tick_params(axis="x", labelsize=7)
            plot.spines[["top", "right"]].set_visible(False)
        plots[0][0].set_ylabel("mean relative error at the prompt, %", fontsize=8)
        figure.tight_layout()
        target = images / f"{name.replace('-', '_')}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target)
        plt.close(figure)
        yield target


def clouds(found: Numbers, images: Path) -> Iterator[Path]:
    """Word clouds of the tokens that make answers longer and shorter."""
    for run in found["runs"].values():
        for side in ("longer", "shorter"):
            picked = [r for r in pick_length_tokens(run, side) if is_plain(r["token"])]
            weights = {r["token"]: float(r["num_events"]) for r in picked}
            cloud = draw_cloud(weights, side) if weights else "nothing to draw"
            if isinstance(cloud, str):
                print(cloud)
                continue
            target = images / f"length_tokens_{side}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(base64.b64decode(cloud.base64))
            yield target


def _save(figure: Any, axis: Any, title: str, target: Path) -> Path:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=9, loc="left")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    plt.close(figure)
    return target


if __name__ == "__main__":
    places = [Path(p) for p in sys.argv[1:]] or [Path("benchmarks/results"), Path("docs/images")]
    for image in main(*places):
        print(image)
