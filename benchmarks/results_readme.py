"""The README's results, from the same files as docs/results.md."""

import json
from collections.abc import Mapping
from pathlib import Path

from results_cells import Numbers, percent, point_of, table, value_of

BEGIN, END = "<!-- made by benchmarks/results_page.py: {} -->\n", "<!-- end -->"
GENERATORS = {"coder05-frontier": "0.5B", "coder15-frontier": "1.5B"}
ARMS = ("prompt", "hard", "conditional:2 tolerance=0.05")
OTHER = "conditional:2 tolerance=0.1 focus=10"
MODEL = "coder05-constrained-prompt"
TRADEOFF = "coder05-more16-gsm8k-9995"
RIGHT = "coder05-right16-gsm8k-evidence"
SHORTER = {
    (TRADEOFF, "prompt"): "alone",
    (TRADEOFF, "concise"): "asked to be concise",
    (TRADEOFF, "budget_answer:225"): "cut off and made to answer",
    (TRADEOFF, "tilt:110 gamma=0.9995"): "LenVM, `tilt` 110, `gamma` 0.9995",
    (TRADEOFF, "tilt:140 gamma=0.9995"): "LenVM, `tilt` 140, `gamma` 0.9995",
    (RIGHT, "price:0.015 evidence=4"): "LenVM taught what is right, `price` 0.015, `evidence` 4",
    (RIGHT, "price:0.02 evidence=5"): "LenVM taught what is right, `price` 0.02, `evidence` 5",
}
"""Arms of these runs; those of the second with a value model of graded answers."""
PENALTY = "coder05-clean-frontier"
"""Measured also with a repetition penalty, as the step of that name with `-repetition`."""


def update(readme: Path, results: Path) -> str:
    """The README with its blocks written anew; as it is where files are missing."""
    text = readme.read_text(encoding="utf-8")
    names = ("frontier", "lifebench", "prediction", "tradeoff")
    files = [results / f"{name}_h200.json" for name in names]
    if not all(f.exists() for f in files):
        return text
    frontier, lifebench, prediction, tradeoff = (
        json.loads(f.read_text(encoding="utf-8")) for f in files
    )
    parts = _equal_to(frontier, lifebench), _prediction(prediction), _shorter(tradeoff)
    blocks = {
        "caption": f"{_caption(frontier)}\n",
        "results": "".join(f"{part}\n\n" for part in parts if part),
    }
    for name, body in blocks.items():
        begin = BEGIN.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(END)
        text = before + begin + body + END + after
    return text


def _caption(found: Numbers) -> str:
    """What the picture above it shows."""
    run = found["runs"]["coder05-frontier"]
    plain, hard, own = (_arm(run, name) for name in ARMS)
    targets = run["targets"]
    return (
        f"*Asked for {min(targets)} to {max(targets):,} tokens, Qwen2.5-Coder-0.5B alone is off by "
        f"{value_of(plain['deviation']):.0%}. The paper's rule (red) comes closer and wrecks the "
        f"text: {_loss(hard)} nats a token. Ours (blue) lands within "
        f"{value_of(own['deviation']):.0%} for {_loss(own)}. "
        "[How it was measured](docs/results.md).*"
    )


def _arm(run: Numbers, name: str) -> Numbers:
    found: Numbers = next(a["equal_to"] for a in run["arms"] if a["arm"] == name)
    return found


def _equal_to(found: Numbers, limits: Numbers) -> str:
    runs = {size: found["runs"][name] for name, size in GENERATORS.items()}
    arms = [_arm(run, name) for run in runs.values() for name in ARMS]
    first = next(iter(runs.values()))

    def row(name: str, cell: list[str]) -> list[str]:
        """LenVM's cells stand out."""
        return [name, *(f"**{c}**" if i % 3 == 2 else c for i, c in enumerate(cell))]

    columns = [f"Qwen2.5-Coder-{size}" if i == 0 else what for size in runs for i, what in
               enumerate(("alone", "the paper's rule", "LenVM"))]  # fmt: skip
    rows = [
        row("length score (paper's best: 67.2)", [f"{value_of(a['score']):.1f}" for a in arms]),
        row("deviation from the target (57%)", [f"{value_of(a['deviation']):.0%}" for a in arms]),
        row("log-probability lost, nats a token", [_loss(a) for a in arms]),
        [
            "ended by itself, at the end of a sentence",
            *(f"{value_of(a['quality']['natural_end']):.0%}" for a in arms),
        ],
    ]
    other = _arm(first, OTHER)
    head = limits["headline"]
    return (
        f"Equal-To on LIFEBench, {first['num_items']} items at six targets from "
        f"{min(first['targets'])} to {max(first['targets']):,} tokens; value models of 0.5B (LoRA, "
        "four minutes on one H100, [in the box](checkpoints)); rule `conditional`, evidence 2, "
        "tolerance 5% ([file](benchmarks/results/frontier_h200.json)):\n\n"
        + table(["", *columns], rows)
        + f"\n\nWith `{OTHER.split(maxsplit=1)[1]}` and evidence 2 on 0.5B: score "
        f"{value_of(other['score']):.1f}, {_loss(other)} nats, "
        f"{value_of(other['quality']['natural_end']):.0%} natural endings. "
        + _half(found)
        + "At-Most "
        f"{head['at_most_score']:.1f}, At-Least {head['at_least_score']:.1f} "
        "([file](benchmarks/results/lifebench_h200.json)). " + _repetition(runs) + _penalty(found)
    )


def _repetition(runs: Mapping[str, Numbers]) -> str:
    """Where the text is worse than the generator's own of that length."""
    parts = []
    for size, run in runs.items():
        for target in _arm(run, ARMS[2])["by_target"][-2:]:
            own, alike = target["quality"]["rep_4"], target["unguided_as_long"]
            if alike is None:
                continue
            parts.append(
                f"{value_of(own):.0%} for {value_of(alike['rep_4']):.0%} at "
                f"{target['target']:,} ({size})"
            )
    if not parts:
        return ""
    return (
        "What is weak: the longest answers repeat themselves more than the generator's own of "
        f"that length (4-grams seen before: {', '.join(parts)})."
    )


def _penalty(found: Numbers) -> str:
    """What a repetition penalty changes at the longest target."""
    plain, penal = (found["runs"].get(n) for n in (PENALTY, f"{PENALTY}-repetition"))
    if plain is None or penal is None:
        return ""
    before, after = (_arm(run, ARMS[2]) for run in (plain, penal))
    rows = [arm["by_target"][-1]["quality"]["rep_4"] for arm in (before, after)]
    return (
        " A repetition penalty of 1.05 takes "
        f"{value_of(rows[0]):.0%} to {value_of(rows[1]):.0%} there (0.5B, loops taught as never "
        f"ending) at little else: score {value_of(after['score']):.1f}, {_loss(after)} "
        f"nats, {value_of(after['quality']['natural_end']):.0%} natural endings."
    )


def _half(found: Numbers) -> str:
    """The value model of half the layers, with the rule of the table."""
    run = found["runs"].get("coder05-half-frontier")
    if run is None:
        return ""
    arm = _arm(run, ARMS[2])
    return (
        "A value model of the backbone's first 12 of 24 layers, half the work of every guided "
        f"token, guides as well: score {value_of(arm['score']):.1f}, {_loss(arm)} nats, "
        f"{value_of(arm['quality']['natural_end']):.0%} natural endings. "
    )


def _loss(arm: Numbers) -> str:
    loss = value_of(arm["quality"]["log_prob_loss"])
    return "-" if loss is None or loss == 0 else f"{loss:.2f}"


def _shorter(found: Numbers) -> str:
    """Accuracy of shorter answers."""
    runs = {name: found["runs"].get(name) for name in (TRADEOFF, RIGHT)}
    run = runs[TRADEOFF]
    if run is None:
        return ""
    arms = {(name, a["arm"]): a for name, r in runs.items() if r for a in r["arms"]}
    plain = value_of(arms[TRADEOFF, "prompt"]["pass_at_1"])
    rows = []
    for key, title in SHORTER.items():
        if key not in arms:
            continue
        arm = arms[key]
        cells = [
            f"{value_of(arm['mean_length']):.0f} ({percent(arm['relative_length'], short=True)})",
            percent(arm["pass_at_1"]),
            f"{value_of(arm['pass_at_1']) / plain:.0%}",
        ]
        rows.append([title, *(f"**{c}**" if title.startswith("LenVM") else c for c in cells)])
    return (
        f"Shorter answers, Qwen2.5-Coder-0.5B on {run['num_items']} questions of GSM8K, "
        f"{run['num_samples']} answers each, value models that have seen more maths than the "
        "one in the box; the last two rows' learned from 20,772 answers to training questions "
        "that `lenvm grade` had marked, wrong ones as answers that never end "
        "([file](benchmarks/results/tradeoff_h200.json)):\n\n"
        + table(["", "mean tokens", "right", "of the accuracy alone"], rows)
    )


def _prediction(found: Numbers) -> str:
    domains = found["models"][MODEL]["domains"]
    names = ("math", "code", "instructions")
    constant = {d: domains[d]["baselines"]["constant_per_domain"] for d in (*names, "all")}
    short = {"short": True}
    rows = [
        [
            "LenVM 0.5B",
            *(f"**{percent(point_of(domains[d])['mre'], **short)}**" for d in names),
            f"**{percent(point_of(domains['all'])['median_re'], **short)}**",
        ],
        [
            "a constant for each domain",
            *(percent(constant[d]["mre"], **short) for d in names),
            percent(constant["all"]["median_re"], **short),
        ],
        ["paper, 1.5B / 32B value models", "17.0 / 9.8%", "29.0 / 14.9%", "33.0 / 17.1%", "-"],
    ]
    return (
        f"Length before the first token, Qwen2.5-Coder-0.5B, {domains['all']['num_prompts']} "
        "held-out prompts with 64 answers each, mean relative error of the distribution's "
        "geometric mean (a few instructions answered "
        "in a handful of tokens make their mean; the median is over all); a value model for "
        "prediction, [in the box](checkpoints/qwen2.5-coder-0.5b-prediction) too "
        "([file](benchmarks/results/prediction_h200.json)):\n\n"
        + table(["", *names, "median"], rows)
    )
