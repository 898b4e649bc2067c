"""`lenvm run`: a pipeline file's stages, from prompts to a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def run(
        pipeline: Annotated[Path, typer.Argument(help="A pipeline (TOML); see recipes/.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(help="key=value, such as train.epochs=1 or sample.math.limit=50."),
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print the commands; run nothing.")
        ] = False,
        until: Annotated[
            str | None, typer.Option(help="Last stage, such as sample or evaluate-lifebench.")
        ] = None,
        machine: Annotated[
            str, typer.Option(help="I/K: this is machine I (from 0) of K that share the folder.")
        ] = "0/1",
        head: Annotated[
            str, typer.Option(help="With several machines: address of machine 0.")
        ] = "127.0.0.1",
        port: Annotated[
            int, typer.Option(min=1, max=65535, help="With several: where training meets on it.")
        ] = 29500,
    ) -> None:
        """Sample, train, evaluate and report as one file says; killed, it continues.

        Starts and stops the servers that it needs. Stages that are done are passed over; a run
        with changed settings is refused and says what changed.
        """
        from lenvm.cli._console import console
        from lenvm.pipeline.config import PipelineConfig
        from lenvm.pipeline.plan import Node
        from lenvm.pipeline.run import check_commands, describe, run_pipeline

        config = PipelineConfig.load(pipeline, overrides or [])
        node = Node(*_parse_machine(machine), head=head, port=port)
        check_commands(config, node, check_arguments)
        if dry_run:
            typer.echo(describe(config, node, until))
            return
        out = console()

        def say(text: str) -> None:
            out.print(text, markup=False, soft_wrap=True)

        results = run_pipeline(config, node=node, until=until, say=say)
        for result in results:
            state = "done before" if result.was_done else f"{result.seconds:.1f} s"
            say(f"{result.name}: {state}")


def check_arguments(arguments: Sequence[str], stage: str) -> None:
    """InputError where the command line would not take a stage's arguments."""
    from lenvm.cli import UsageError, build_app
    from lenvm.errors import InputError

    command: Any = typer.main.get_command(build_app())
    context = command.make_context("lenvm", ["sample"], resilient_parsing=True)
    rest = list(arguments)
    try:
        while hasattr(command, "get_command"):
            name = rest.pop(0)
            command = command.get_command(context, name)
            parent, context = context, None
            if not hasattr(command, "get_command"):
                command.make_context(name, rest, parent=parent)
                return
            context = command.make_context(name, list(rest), parent=parent, resilient_parsing=True)
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        raise InputError(f"{stage}: {message}") from None


def _parse_machine(text: str) -> tuple[int, int]:
    from lenvm.errors import InputError

    rank, slash, count = text.partition("/")
    if not (slash and rank.isdigit() and count.isdigit()):
        raise InputError(f"--machine is {text!r}; expected I/K such as 0/2")
    return int(rank), int(count)
