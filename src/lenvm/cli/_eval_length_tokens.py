"""`lenvm eval length-tokens`: which tokens make an answer longer, which shorter."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm.cli import _eval_options as o


def register(group: typer.Typer) -> None:
    @group.command("length-tokens")
    def length_tokens(
        trajectories: Annotated[list[Path], typer.Argument(help="Trajectory files (JSONL).")],
        output: o.Output,
        lenvm: o.ValueModel = None,
        split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
        limit: Annotated[
            int | None,
            typer.Option(min=1, help="Only this many completions, evenly over the files."),
        ] = None,
        threshold: Annotated[float, typer.Option(min=0, help="|gain| of an event.")] = 0.01,
        merge: Annotated[
            bool, typer.Option("--merge/--no-merge", help="Fold case and leading space.")
        ] = True,
        min_count: Annotated[
            int, typer.Option(min=1, help="Occurrences that a mean needs to be listed.")
        ] = 5,
        top: Annotated[int, typer.Option(min=1, help="Tokens per list.")] = 100,
        contexts: Annotated[int, typer.Option(min=0, help="Contexts per token.")] = 3,
        device: o.Device = None,
        regrade: o.Regrade = False,
    ) -> None:
        """Tokens by their effect on the expected length (minus the TD residual; + is longer)."""
        from lenvm.cli._console import stages
        from lenvm.cli._inputs import load_value_model, name_value_model
        from lenvm.errors import CheckpointError
        from lenvm.evals.length_tokens.run import (
            LengthTokensConfig,
            regrade_length_tokens,
            run_length_tokens,
        )
        from lenvm.evals.prediction.predictors import ValueModelPredictor
        from lenvm.model.device import pick_device

        config = LengthTokensConfig(
            files=tuple(trajectories),
            split=split,
            limit=limit,
            threshold=threshold,
            merge=merge,
            min_count=min_count,
            top=top,
            num_contexts=contexts,
        )
        if regrade:
            _print_summary(regrade_length_tokens(output, config), output)
            return
        model = load_value_model(lenvm, device=pick_device(device))
        if model.tokenizer is None:
            raise CheckpointError("the value model has no tokenizer, so tokens cannot be shown")
        predictor = ValueModelPredictor(model, name_value_model(lenvm), levels=())
        predictor.check_files(config.files)
        with stages() as progress:
            summary = run_length_tokens(
                config, predictor, model.tokenizer, output, progress=progress
            )
        _print_summary(summary, output)


def _print_summary(summary: dict[str, Any], output: Path, rows: int = 15) -> None:
    from rich.markup import escape

    from lenvm.cli._console import print_table

    titles = {
        "longer_by_event": "Tokens that lengthen, by number of events",
        "shorter_by_event": "Tokens that shorten, by number of events",
        "longer_by_mean": "Tokens that lengthen, by mean gain",
        "shorter_by_mean": "Tokens that shorten, by mean gain",
    }
    for name, title in titles.items():
        if summary[name]:
            print_table(
                title,
                ["token", "occurrences", "events", "share", "mean gain"],
                [
                    [
                        escape(row["token"]),
                        row["num"],
                        row["num_events"],
                        f"{row['event_share']:.0%}",
                        f"{row['mean_gain']:+.4f}",
                    ]
                    for row in summary[name][:rows]
                ],
            )
    o.print_notes(summary, output)
