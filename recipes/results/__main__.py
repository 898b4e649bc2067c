"""The experiments of the plan, a call at a time; see recipes/results/PLAN.md.

python -m recipes.results run CALL --lab LAB --data DATA --generator coder05=FILE.gguf --budget 560
python -m recipes.results pack LAB OUT          # what this machine made, in parts that travel
python -m recipes.results unpack FOLDER LAB
python -m recipes.results collect LAB benchmarks/results
python -m recipes.results list
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

PLAN = Path(__file__).with_name("plan.toml")
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def run(
    calls: Annotated[list[str], typer.Argument(help="Calls of the plan, or names of steps.")],
    lab: Annotated[Path, typer.Option(help="Folder of all that is made.")] = Path("runs/results"),
    data: Annotated[Path, typer.Option(help="The prompts: shared/data.")] = Path("../shared/data"),
    generator: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of a generator of the plan.")
    ] = None,
    plan: Annotated[Path, typer.Option(help="The steps.")] = PLAN,
    budget: Annotated[float, typer.Option(help="Seconds; nothing new is begun after them.")] = 560,
    dry: Annotated[bool, typer.Option(help="Tiny sizes: the plan's [dry] options.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda")] = None,
    replicas: Annotated[int, typer.Option(help="Engines side by side on the device.")] = 1,
    commit: Annotated[str, typer.Option(help="Named in the result files.")] = "",
) -> None:
    """Run the steps of the calls that are not finished, one after another."""
    started = time.monotonic()
    from recipes.results.lab import Lab
    from recipes.results.plan import load_plan, run_steps

    from lenvm.model.device import pick_device

    found = load_plan(plan, dry=dry)
    paths = dict(found.generators) | dict(g.split("=", 1) for g in generator or [])
    where = Lab(
        folder=lab,
        data=data,
        generators=paths,
        device=pick_device(device),
        replicas=replicas,
        deadline=started + budget,
        about={"command": f"python -m recipes.results run {' '.join(calls)}", "commit": commit},
    )
    failed = run_steps([step for call in calls for step in found.of_call(call)], where)
    where.release()
    if failed:
        print(f"failed: {', '.join(failed)}; the other steps are done, run the call again")
        raise typer.Exit(1)


@app.command(name="list")
def show(plan: Path = PLAN, lab: Path = Path("runs/results")) -> None:
    """The steps of the plan, and which are done."""
    from recipes.results.plan import load_plan

    for step in load_plan(plan).steps:
        path = lab / "steps" / f"{step.name}.json"
        state = "-"
        if path.exists():
            record = json.loads(path.read_text())
            state = f"{'done' if record['finished'] else 'begun'}, {record['seconds']:.0f} s"
        print(f"{step.call:<4} {step.kind:<14} {step.name:<36} {state}")


@app.command()
def pack(lab: Path, out: Path) -> None:
    """Write what changed since the last pack or unpack into OUT, in parts of at most 15.9 MiB."""
    from recipes.results.travel import pack as write

    write(lab, out)


@app.command()
def unpack(folder: Path, lab: Path) -> None:
    """Read the parts of FOLDER into LAB."""
    from recipes.results.travel import unpack as read

    read(folder, lab)


@app.command()
def ship(
    lab: Path,
    name: Annotated[str, typer.Argument(help="A value model of the lab.")],
    base: Annotated[str, typer.Argument(help="Its backbone, as users name it.")],
    target: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
) -> None:
    """Write a checkpoint that ships, at most 20 MB, with its model card."""
    from recipes.results.ship import ship as write

    print(f"{target}: {write(lab, name, base, target) / 1e6:.1f} MB")


@app.command()
def ideal(
    lab: Path,
    data: Path,
    tokenizer: Annotated[str, typer.Option(help="The generators' tokenizer: a folder.")],
    out: Path = Path("benchmarks/results/tradeoff_ideal.json"),
) -> None:
    """What control by length alone could reach at best on GSM8K, from the held-out samples."""
    from recipes.results.ideal import gsm8k_gold
    from recipes.results.ideal import ideal as curves
    from recipes.results.tokens import TokenFolder

    from lenvm.files import write_json
    from lenvm.model.tokenization import load_tokenizer

    loaded, gold = load_tokenizer(tokenizer), gsm8k_gold(data)
    runs = {
        folder.name.removesuffix("-heldout"): curves(TokenFolder(folder), loaded, gold)
        for folder in sorted((lab / "tokens").glob("*-heldout"))
    }
    command = "python -m recipes.results ideal LAB DATA --tokenizer FOLDER"
    write_json(out, {"schema": "lenvm.results/1", "command": command, "runs": runs})
    print(out)


@app.command()
def collect(
    lab: Path,
    out: Path = Path("benchmarks/results"),
    plan: Path = PLAN,
    data: Annotated[Path | None, typer.Option(help="shared/data: instructions by source.")] = None,
) -> None:
    """Grade what is there and write the result files."""
    from recipes.results.collect import collect as write
    from recipes.results.plan import load_plan

    for path in write(load_plan(plan), lab, out, data):
        print(path)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    app()
