"""`lenvm download`: published data sets and checkpoints from the hub."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def download(
        name: Annotated[
            str | None, typer.Argument(help="A published name, or OWNER/NAME on the hub.")
        ] = None,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="Folder (default: downloads/...).")
        ] = None,
        kind: Annotated[
            str | None, typer.Option(help="model or dataset, for OWNER/NAME (default: model).")
        ] = None,
        revision: Annotated[
            str | None,
            typer.Option(help="Branch, tag or commit (default: the one of an earlier call, main)."),
        ] = None,
        file: Annotated[
            list[str] | None, typer.Option(help="Only files that match, such as '*.json'.")
        ] = None,
        gamma: Annotated[
            float | None,
            typer.Option(help="Of a published value model that is not listed (it stores none)."),
        ] = None,
    ) -> None:
        """Download published data or a checkpoint; without NAME, list them.

        Interrupted, it goes on; the commit is noted, so that a second call gets the same files.
        HF_ENDPOINT names another hub.
        """
        from lenvm.data import hub
        from lenvm.errors import InputError

        if name is None:
            from lenvm.cli._console import print_table

            rows = [(n, k, repo) for n, (repo, k) in hub.PUBLISHED.items()]
            print_table("Published", ["name", "kind", "hub"], rows)
            return
        if kind not in (None, "model", "dataset"):
            raise InputError(f"--kind is {kind!r}; allowed: model, dataset")
        report = hub.download(
            name,
            output,
            kind=kind,  # type: ignore[arg-type]
            revision=revision,
            patterns=file or (),
        )
        typer.echo(report, err=True)
        if (report.folder / "value_head.safetensors").exists():
            from lenvm.model.published import describe_published, is_published

            if is_published(report.folder):
                found = describe_published(report.folder, report.repo, gamma)
                typer.echo(f"lenvm.json added: gamma {found.gamma}", err=True)
        elif gamma is not None:
            raise InputError(f"--gamma is for a value model; {report.repo} is none")
        typer.echo(report.folder)
