"""The training section's tables in docs/performance.md, drawn from benchmarks/results.

    python benchmarks/training_table.py

Replaces what stands between the marks. `tests/test_docs.py` checks that it was run.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/training_h200.json"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- training_table.py -->\n", "<!-- end -->\n"
NAMES = {"0.5b": "0.5B", "1.5b": "1.5B", "smollm2": "SmolLM2-135M"}
WAYS = {
    "packed": "packed",
    "padded": "padded, random batches of 8, logits computed (the published way)",
    "padded_lean": "padded, no logits, no mask",
}


def write_tables(report: dict[str, Any]) -> str:
    """Markdown: the points, what the speed-up is, where the time goes. A point that a later run of
    the same card and data measured again is shown once."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in report["runs"]:
        data = "made up" if run["data"]["source"].startswith("made up") else "sampled"
        for name, point in run["points"].items():
            if "tokens_per_s" in point:
                rows[name, point["card"], data] = point
    lines = ["| what trains | card | sequences | tokens/s | MFU | peak memory |", "|" + "---|" * 6]
    for (_, card, data), p in sorted(rows.items(), key=lambda row: row[0][1:]):
        cells = (
            _describe(p),
            card.removeprefix("NVIDIA ").split(" ")[0],
            data,
            f"{p['tokens_per_s']:,.0f}",
            f"{p['mfu']:.0%}",
            f"{p['peak_memory_gb']:.0f} GB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return (
        "\n".join([*lines, "", _speedup(report["headline"]), "", *_profile(report["runs"])]) + "\n"
    )


def _describe(point: dict[str, Any]) -> str:
    trains = {"full": "all of it", "head": "the head alone", "lora": "LoRA"}[point["trainable"]]
    parts = [f"{NAMES.get(point['shape'], point['shape'])}, {trains}", WAYS[point["way"]]]
    if point["share_prompts"]:
        parts.append("shared prompts")
    if point["compiled"]:
        parts.append("compiled")
    if point["optimizer_steps"] == 1 and point["sequences"] >= 1024:
        parts.append(f"{point['sequences']:,.0f} sequences a step")
    return ", ".join(parts)


def _speedup(headline: dict[str, Any]) -> str:
    factor = headline["speedup_over_padded"]
    if factor is None:
        return "Packed against the published way, in one call on one card: not measured yet."
    return (
        f"Packed and compiled against the published way, in one call on one {headline['card']}: "
        f"{factor:.1f} times as fast, {headline['mfu_packed_0p5b']:.0%} MFU."
    )


def _profile(runs: list[dict[str, Any]]) -> list[str]:
    found = [p for run in runs for p in run["points"].values() if "profile" in p]
    if not found:
        return []
    point = found[-1]
    profile = point["profile"]
    idle = max(0.0, 1 - profile["gpu_busy_ms"] / profile["wall_ms"])
    shares = sorted(profile["kinds"].items(), key=lambda kind: -kind[1]["share"])
    parts = ", ".join(f"{name} {k['share']:.0%}" for name, k in shares if k["share"] >= 0.01)
    return [
        f"Where the GPU's time goes ({_describe(point)}; {point['card']}): {parts}; "
        f"idle {idle:.0%} of the time."
    ]


def replace_tables(page: str, report: dict[str, Any]) -> str:
    """The page with the tables of the report between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{write_tables(report)}{END}{after}"


if __name__ == "__main__":
    text = replace_tables(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text()))
    PAGE.write_text(text, encoding="utf-8")
