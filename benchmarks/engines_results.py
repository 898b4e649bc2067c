"""From the points of `engines.py` to ratios, and from several calls' files to one."""

import json
from pathlib import Path
from typing import Any

import engines_setup as setup


def headline(engine: str, points: list[dict[str, Any]]) -> dict[str, float | None]:
    """Ratios at concurrency 64 to the stock engine with its default settings, of trained models
    where there are some."""
    rate = {
        (p["pair"], p["kind"]): p["tokens_per_s"]
        for p in sorted(points, key=lambda p: bool(p.get("trained")))
        if p["concurrency"] == 64
        and "tokens_per_s" in p
        and not p.get("top_k")
        and p.get("engine", engine) == engine
    }

    def ratio(pair: str, kind: str) -> float | None:
        top, bottom = rate.get((pair, kind)), rate.get((pair, "stock"))
        return round(top / bottom, 3) if top and bottom else None

    def half(pair: str) -> float | None:
        """Of the value model of half the layers: guided_half, or guided_NAME-half."""
        return next((ratio(pair, k) for p, k in rate if p == pair and k.endswith("half")), None)

    return {
        f"{engine}_ratio_1p5b_0p5b": ratio("1.5b_0.5b", "guided"),
        f"{engine}_ratio_1p5b_0p5b_half": half("1.5b_0.5b"),
        f"{engine}_ratio_7b_1p5b": ratio("7b_1.5b", "guided"),
        f"{engine}_ratio_7b_1p5b_half": half("7b_1.5b"),
        f"{engine}_ratio_0p5b_0p5b": ratio("0.5b_0.5b", "guided"),
        f"{engine}_unguided_ratio": ratio("1.5b_0.5b", "unguided"),
        f"{engine}_unguided_ratio_to_v1": _over(rate, "unguided", "stock_v1"),
    }


def _over(rate: dict[tuple[str, str], float], top: str, bottom: str) -> float | None:
    pair = "1.5b_0.5b"
    above, below = rate.get((pair, top)), rate.get((pair, bottom))
    return round(above / below, 3) if above and below else None


def merge(paths: list[str], out: str) -> None:
    """One file of several calls' results: each keeps its command and versions under `runs`."""
    merged: dict[str, Any] = {
        "headline": {},
        "runs": [],
        "checks": {},
        "engines": {},
        "points": [],
        "splits": [],
    }
    for path in paths:
        found = json.loads(Path(path).read_text())
        engine = found["engine"]
        facts = ("command", "commit", "engine", "hardware", "versions", "is_dry_run")
        merged["runs"].append({k: found.get(k) for k in facts})
        for part in ("checks", "engines"):
            merged[part].setdefault(engine, {}).update(found[part])
        for part in ("points", "splits"):
            merged[part] += [{"engine": engine, **p} for p in found.get(part, [])]
    for engine in {run["engine"] for run in merged["runs"]}:
        new = headline(engine, merged["points"])
        merged["headline"] |= {k: v for k, v in new.items() if v is not None}
    setup.write_json(Path(out), merged)
    print(json.dumps(merged["headline"], indent=1))
