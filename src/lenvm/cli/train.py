"""`lenvm train`: trajectories -> a value model."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def train(
        data: Annotated[list[Path] | None, typer.Argument(help="Trajectory files (JSONL).")] = None,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="Folder of the checkpoint.")
        ] = None,
        config: Annotated[Path | None, typer.Option(help="A TOML file of options.")] = None,
        override: Annotated[
            list[str] | None, typer.Option("--set", help="key=value, e.g. --set epochs=3")
        ] = None,
    ) -> None:
        """Train a value model; killed and started again, it continues.

        Options, with their defaults, are in docs/training.md.
        """
        import json

        from lenvm.cli._console import plain_warnings, print_table, stages
        from lenvm.errors import DataError
        from lenvm.training.config import TrainingConfig

        overrides = list(override or [])
        for path in data or []:
            if not path.is_file():
                raise DataError(f"no trajectory file {path}")
        if data:
            overrides.append(f"data={json.dumps([str(p) for p in data])}")
        if output:
            overrides.append(f"output={json.dumps(str(output))}")
        settings = TrainingConfig.load(config, overrides)
        from lenvm.training.trainer import leave_group
        from lenvm.training.trainer import train as run

        with stages() as progress, plain_warnings():
            result = run(settings, progress)
        dropped = ", ".join(f"{n} {why}" for why, n in result.num_dropped.items()) or "none"
        print_table(
            f"Value model: {settings.output}",
            ["", ""],
            [
                ["sequences (dropped)", f"{result.num_sequences} ({dropped})"],
                *([["never ending", str(result.num_endless)]] if settings.endless else []),
                ["tokens", f"{result.num_tokens:,}"],
                ["tokens/s", f"{result.tokens_per_s:,.0f}"],
                ["gamma", f"{result.gamma:.6f}"],
                ["validation loss, first", f"{result.val_loss_first:.4f}"],
                ["validation loss, last", f"{result.val_loss_last:.4f}"],
            ],
        )
        leave_group()
