"""The results page: length before the first token, and while decoding."""

from pathlib import Path

from results_cells import (
    MISSING,
    Numbers,
    about,
    image,
    join,
    look_up,
    percent,
    table,
    title,
)

PAPER_MRE = {"1.5B": (17.0, 29.0, 33.0), "7B": (11.0, 19.5, 23.0), "32B": (9.8, 14.9, 17.1)}


DOMAINS = ("math", "code", "instructions")


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
        _loops(found),
        _by_source(models),
        "What the value at gamma says, and the baselines:",
        table([*columns, "in 50%", "in 80%", "in 95%"], rows),
        _against_scalar(found),
        image(images, "prediction.png", "Mean relative error by domain"),
        about(found),
    )


def _loops(found: Numbers | None) -> str:
    """Why no point prediction is near for SmolLM2."""
    sample = look_up(found, "sampling", "smollm2-heldout")
    if sample is None or "smollm2-clean-half" not in (found or {}).get("models", {}):
        return ""
    cut = sample["num_truncated"] / sample["num_completions"]
    return (
        f"SmolLM2, drawn from without truncation, loops: {cut:.0%} of its held-out answers were "
        "cut off at 2,048 tokens. Those do not count in the true lengths, and `clean-half` was "
        "taught that they never end, so that every point between an answer and a loop is far off; "
        "its intervals, in which they count, hold."
    )


def _by_source(models: Numbers) -> str:
    """The held-out instructions, with and without conditions on form."""
    rows = []
    for name, model in models.items():
        sources = model.get("instructions_by_source") or {}
        if "@" not in name and {"ifeval", "wildchat"} <= set(sources):
            mre = [percent(sources[s]["mre"]) for s in ("wildchat", "ifeval")]
            rows.append([f"**{title(name)}**", *mre])
    if not rows:
        return ""
    first = next(m for m in models.values() if m.get("instructions_by_source"))
    counts = {k: v["num_prompts"] for k, v in first["instructions_by_source"].items()}
    return join(
        f"Why instructions were the worst: {counts['ifeval']} of the {sum(counts.values())} are "
        "IFEval's, requests with conditions on form (exactly three bullet points, lowercase only), "
        "and no training file has such. So we made some, shippable instructions with one or two of "
        "26 conditions in our own words behind them (`recipes/results/prompts.py`; IFEval's "
        "prompts were not used), once the error was known to lie there. Relative error of the "
        "geometric mean:",
        table(["value model", "WildChat", "IFEval"], rows),
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
    models = (found or {}).get("models", {})
    rows = [
        [
            title(name),
            domain,
            f"{model['gamma']:.4g}",
            *(percent(p["median_re"], short=True) for p in model["domains"][domain]),
        ]
        for name, model in models.items()
        for domain in ("all", *DOMAINS)
        if domain in model["domains"]
    ]
    num = next((m["domains"]["all"][0]["num"] for m in models.values()), None)
    return join(
        "## While decoding: the heads at three discounts",
        "Median relative error of the remaining length after 0, 25, 50 and 75% of single answers "
        f"({num} answers to held-out prompts, chosen by number). A distribution head's geometric "
        "mean serves every gamma, a scalar head answers for the one it was trained with. The first "
        "measurement took the answers that ended first, the shortest, and so found two to "
        "four times these errors."
        if num
        else "Median relative error of the remaining length after 0, 25, 50 and 75% of an answer.",
        table(
            ["model", "domain", "gamma", "at 0%", "25%", "50%", "75%"],
            rows or [["ours", "-", "-", *[MISSING] * 4]],
        ),
        _nearer(found),
        about(found) if found else "",
    )


def _nearer(found: Numbers | None) -> str:
    """The two heads, answer by answer."""
    if not found or not found.get("nearer_than_scalar"):
        return ""
    rows = [
        [f"{found['models'][name]['gamma']:.4g}", *(percent(p["share"]) for p in row)]
        for name, row in found["nearer_than_scalar"].items()
    ]
    return join(
        "How often the distribution head (`lora`) is nearer than a scalar head trained for that "
        "gamma on the same data (50%: even):",
        table(["gamma", "at 0%", "25%", "50%", "75%"], rows),
    )
