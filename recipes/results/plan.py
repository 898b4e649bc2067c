"""The plan: a TOML file of generators and steps; running the steps of one call.

```toml
[generators]
coder05 = "qwen2.5-coder-0.5b.gguf"

[headline]
prediction = "coder05-lora"     # the model
frontier = "coder05-frontier"   # the step ...
arm = "conditional:2 tolerance=0.05"

[defaults.lifebench]            # options of every step of that kind
[dry.lifebench]                 # options that make it tiny (--dry)

[[step]]
name = "equal"
call = "1b"
kind = "lifebench"              # a function of steps.py; the rest are its options
```
"""

import time
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.results.lab import Lab

from lenvm.errors import InputError
from lenvm.files import read_json, write_json

OWN = ("name", "call", "kind", "result")


@dataclass(frozen=True)
class Step:
    """One entry of the plan. `result`: the file of benchmarks/results that it is part of."""

    name: str
    call: str
    kind: str
    options: Mapping[str, Any]
    result: str = ""


@dataclass(frozen=True)
class Plan:
    generators: Mapping[str, str]
    steps: Sequence[Step]
    headline: Mapping[str, Any]
    """Which step, model and arm the result files' headlines speak of."""

    def of_call(self, call: str) -> list[Step]:
        """The steps of a call, in order, or the one step of that name."""
        found = [s for s in self.steps if call in (s.call, s.name)]
        if not found:
            calls = ", ".join(dict.fromkeys(s.call for s in self.steps))
            raise InputError(f"no call or step {call!r}; the plan's calls are {calls}")
        return found


def load_plan(path: Path, *, dry: bool = False) -> Plan:
    """Read a plan. dry: the options of [dry] over those of the steps."""
    from recipes.results.steps import KINDS

    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    steps = []
    for entry in raw["step"]:
        kind = entry["kind"]
        if kind not in KINDS:
            raise InputError(f"step {entry['name']!r}: kind {kind!r}; allowed: {', '.join(KINDS)}")
        own = {k: v for k, v in entry.items() if k not in OWN}
        options = _merge(raw.get("defaults", {}).get(kind, {}), own)
        if dry:
            options = _merge(options, raw.get("dry", {}).get(kind, {}))
        steps.append(Step(entry["name"], entry["call"], kind, options, entry.get("result", "")))
    names = [s.name for s in steps]
    if twice := {n for n in names if names.count(n) > 1}:
        raise InputError(f"steps named twice: {', '.join(sorted(twice))}")
    generators = raw["generators"]
    if dry:
        generators = dict.fromkeys(generators, raw.get("dry", {}).get("generator", "smollm2"))
    return Plan(generators, steps, raw.get("headline", {}))


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged, a list of tables takes the keys of a table, all else is replaced."""
    found = dict(under)
    for key, value in over.items():
        old = found.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            found[key] = _merge(old, value)
        elif isinstance(value, Mapping) and isinstance(old, list):
            found[key] = [_merge(entry, value) for entry in old]
        else:
            found[key] = value
    return found


def run_steps(steps: Sequence[Step], lab: Lab) -> list[str]:
    """Run what is not finished; a step that fails does not stop the others. Names of the failed."""
    from recipes.results.steps import KINDS

    failed = []
    for step in steps:
        path = lab.folder / "steps" / f"{step.name}.json"
        before = read_json(path) if path.exists() else None
        if before is not None and before["finished"]:
            print(f"{step.name}: done", flush=True)
            continue
        if lab.remaining_s <= 0:
            print(f"{step.name}: no time left", flush=True)
            continue
        print(f"{step.name}: {lab.remaining_s:.0f} s are left", flush=True)
        start = time.monotonic()
        try:
            figures, finished = KINDS[step.kind](lab, step.name, step.options)
        except Exception:
            traceback.print_exc()
            failed.append(step.name)
            lab.release()
            continue
        seconds = time.monotonic() - start
        record = {
            "name": step.name,
            "kind": step.kind,
            "result": step.result,
            "finished": finished,
            "seconds": seconds + (before["seconds"] if before else 0.0),
            "options": dict(step.options),
            "figures": figures,
            **lab.describe_machine(),
        }
        write_json(path, record)
        print(f"{step.name}: {seconds:.0f} s, finished: {finished}, {_short(figures)}", flush=True)
    return failed


def _short(figures: Mapping[str, Any], limit: int = 600) -> str:
    import json

    return json.dumps(figures, default=str)[:limit]
