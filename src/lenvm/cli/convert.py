"""`lenvm convert`: the published system's files into trajectories, and back."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def convert(
        files: Annotated[list[Path], typer.Argument(help="Published files, or trajectory files.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
        to: Annotated[str, typer.Option(help="trajectories or published.")] = "trajectories",
        tokenizer: Annotated[
            str | None, typer.Option(help="The generator's (published files hold text alone).")
        ] = None,
        split: Annotated[
            str | None, typer.Option(help="Split of every row (default: by prompt hash).")
        ] = None,
        grouped: Annotated[
            bool, typer.Option(help="The completions of a prompt side by side.")
        ] = True,
        shuffle: Annotated[
            int | None, typer.Option(help="Shuffle the groups with this seed.")
        ] = None,
    ) -> None:
        """Convert published JSON lines (raw or grouped) into trajectories, or the other way."""
        from lenvm.cli.sample import Retokenizer
        from lenvm.data.published import export_published, import_published
        from lenvm.errors import InputError

        if to == "published":
            count = export_published(files, output, grouped=grouped, seed=shuffle)
            typer.echo(f"{output}: {count} rows", err=True)
            return
        if to != "trajectories":
            raise InputError(f"--to is {to!r}; allowed: trajectories, published")
        if split not in (None, "train", "validation", "test"):
            raise InputError(f"--split is {split!r}; allowed: train, validation, test")
        if tokenizer is None:
            raise InputError(
                "published files hold text alone: name the generator's --tokenizer (see the "
                "rows' meta_info.model_name)"
            )
        report = import_published(files, output, Retokenizer(tokenizer), split=split)  # type: ignore[arg-type]
        typer.echo(report, err=True)
