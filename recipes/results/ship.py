"""A value model of the lab as a checkpoint that ships: bf16, without paths of this machine, with a
model card made from the lab's figures. Only models trained on prompts that may ship."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from recipes.results.collect import predictions
from safetensors.torch import load_file, save_file

from lenvm.errors import DataError, InputError
from lenvm.files import read_json, write_json, write_text
from lenvm.model.tokenization import hash_tokenizer, load_tokenizer

FILES = ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "lenvm.json")
MAX_BYTES = 20_000_000
SHIPPABLE = ("shippable", "constrained")
"""Prompt sets of prompts.py whose models may ship."""
CONSTRAINED = "; instructions again with conditions on their form (recipes/results/prompts.py)"
GENERATORS = {
    "coder05": "Qwen2.5-Coder-0.5B-Instruct",
    "coder15": "Qwen2.5-Coder-1.5B-Instruct",
    "smollm2": "smollm2",
}
"""The plan's generators as users know them."""


def ship(lab: Path, name: str, base: str, target: Path) -> int:
    """Copy model `name` to `target`; `base` is the backbone's name as users know it. Its bytes.

    Raises InputError where data of the model may not ship or the checkpoint is over 20 MB.
    """
    step = read_json(lab / "steps" / f"{name}.json")
    sets = {d: _sampling_of(lab, d) for d in step["figures"]["data"]}
    for data, (_, entry) in sets.items():
        if entry["prompts"] not in SHIPPABLE:
            raise InputError(
                f"{name} was trained on {data}, whose prompts are {entry['prompts']!r}; "
                "only models of shippable prompts ship"
            )
    source = lab / "models" / name
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if not (source / file).exists():
            raise DataError(f"{source} has no {file}; adapters ship, full models do not")
        shutil.copyfile(source / file, target / file)
        (target / file).chmod(0o644)
    weights = load_file(target / "adapter_model.safetensors")
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_model.safetensors").chmod(0o644)
    generators = {_generator(sampling) for sampling, _ in sets.values()}
    own = {"base_model": base, "generator": " and ".join(sorted(generators))}
    own["tokenizer_hash"] = hash_tokenizer(load_tokenizer(str(source)))
    write_json(target / "lenvm.json", {**read_json(target / "lenvm.json"), **own})
    adapter = target / "adapter_config.json"
    write_json(adapter, {**read_json(adapter), "base_model_name_or_path": base})
    size = sum((target / file).stat().st_size for file in FILES)
    if size > MAX_BYTES:
        raise InputError(f"{target} is {size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB ship")
    write_text(target / "README.md", _card(lab, name, target, base, step, sets, size))
    return size


def _generator(sampling: Mapping[str, Any]) -> str:
    name = str(sampling["figures"]["generator"])
    return GENERATORS.get(name, name)


def _sampling_of(lab: Path, data: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(step, its entry) that sampled a token folder."""
    for path in sorted((lab / "steps").glob("*.json")):
        step = read_json(path)
        if step["kind"] == "sample":
            for entry in step["options"]["sets"]:
                if entry["name"] == data:
                    return dict(step), dict(entry)
    raise DataError(f"no step in {lab} sampled {data}")


def _card(
    lab: Path,
    name: str,
    target: Path,
    base: str,
    step: Mapping[str, Any],
    sets: Mapping[str, Any],
    size: int,
) -> str:
    figures = step["figures"]
    rows = [
        ("weights", f"LoRA adapter on {base} and a {figures['head']} head, {size / 1e6:.1f} MB"),
        (
            "training",
            f"{figures['epochs']:g} epochs, {figures['training_tokens'] / 1e6:.1f} M tokens, "
            f"{figures['gpu_seconds']:.0f} s on one {step['hardware']}; "
            f"gamma {figures['gamma']:.6g}",
        ),
        ("commit", step.get("commit") or "unknown"),
        (
            "prompts",
            "GSM8K and MATH train (MIT), MBPP 601-974 (CC BY 4.0), Self-Instruct and Arena-Hard "
            "(Apache-2.0), WildChat (ODC-BY); none that is held out"
            + (CONSTRAINED if any(e["prompts"] == "constrained" for _, e in sets.values()) else ""),
        ),
        ("licence", "Apache-2.0, as the generator's"),
    ]
    for data, (sampling, _) in sets.items():
        row, o = sampling["figures"]["sets"][data], sampling["options"]
        rows.append(
            (
                f"data, {data}",
                f"{row['num_completions']:,} completions of {row['num_prompts']:,} prompts "
                f"({row['num_tokens'] / 1e6:.1f} M tokens) from {_generator(sampling)} at T = 1, "
                f"top-p {o.get('top_p', 1.0):g}, top-k {o.get('top_k', 0) or 'off'}, at most "
                f"{o['max_tokens']:,} tokens; {row['num_truncated'] / row['num_completions']:.1%} "
                "cut off, used as lower bounds",
            )
        )
    for folder in (f for f in predictions(lab) if f.name == name):
        summary = read_json(folder / "summary.json")
        for domain, table in summary["domains"].items():
            if table["mre"] is None:
                continue
            constant = table["baselines"]["constant"]["mre"]
            geometric = (table.get("geometric") or {}).get("mre")
            other = f"by the geometric mean {geometric['value']:.1%}; " if geometric else ""
            rows.append(
                (
                    f"error at the prompt, {domain}",
                    f"mean {table['mre']['value']:.1%} ({other}constant {constant['value']:.1%}), "
                    f"median {table['median_re']['value']:.1%}, {table['num_prompts']} held-out "
                    "prompts",
                )
            )
        coverage = summary["domains"]["all"]["coverage"]
        if coverage:
            covered = f"{coverage['80']['value']:.1%} of held-out answers"
            rows.append(("80% interval covers", covered))
    guided = any(
        read_json(path)["options"].get("value_model") == name
        for path in (lab / "steps").glob("*.json")
    )
    control = (
        "What control reaches and costs with it: [docs/results.md](../../docs/results.md)."
        if guided
        else "It was measured for prediction ([docs/results.md](../../docs/results.md)); what "
        "control reaches and costs with it has not been measured."
    )
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows)
    generator = next(iter(_generator(sampling) for sampling, _ in sets.values()))
    if generator.startswith("Qwen"):
        generator = f"Qwen/{generator}"
    return (
        f"# {target.name}\n\nA value model for {generator}: at every token, how many are still to "
        "come.\n\n```bash\n"
        f"lenvm generate --model {generator} --lenvm checkpoints/{target.name} \\\n"
        '    --equal-to 200 --tolerance 0.05 "Explain quicksort."\n'
        f'lenvm predict --lenvm checkpoints/{target.name} "Explain quicksort."\n```\n\n'
        f"The base comes from the hub; `--lenvm checkpoints/{target.name}@FOLDER_OR_GGUF` takes "
        f"another copy of it.\n{control}\n\n"
        f"| | |\n|---|---|\n{lines}\n\nMade by `python -m recipes.results run {name}` "
        "(recipes/results/plan.toml); base and generator were Q4_K_M GGUF files, read as bf16.\n"
        "Limits: English; under other sampling settings and other weights (full precision "
        "included) lengths differ a little.\n"
    )
