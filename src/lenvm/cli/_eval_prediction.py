"""`lenvm eval length-prediction`: is the length known before a token is written?"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm.cli import _eval_options as o


def register(group: typer.Typer) -> None:
    @group.command("length-prediction")
    def length_prediction(
        trajectories: Annotated[list[Path], typer.Argument(help="Trajectory files (JSONL).")],
        output: o.Output,
        lenvm: o.ValueModel = None,
        endpoint: Annotated[
            str | None, typer.Option(help="A server with /v1/length/values, instead of --lenvm.")
        ] = None,
        split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
        min_completions: Annotated[
            int, typer.Option(min=1, help="Prompts with fewer complete ones are left out.")
        ] = 2,
        traced: Annotated[
            int, typer.Option(min=0, help="Completions per prompt read for errors while decoding.")
        ] = 4,
        limit: o.Limit = None,
        device: o.Device = None,
        api_key_variable: o.ApiKeyVariable = "LENVM_API_KEY",
        regrade: o.Regrade = False,
    ) -> None:
        """Errors of the predicted length, against baselines, by domain and during decoding."""
        from lenvm.cli._console import stages
        from lenvm.cli._inputs import load_value_model, name_value_model
        from lenvm.errors import InputError
        from lenvm.evals.prediction.predictors import EndpointPredictor, ValueModelPredictor
        from lenvm.evals.prediction.run import (
            PredictionConfig,
            regrade_prediction,
            run_prediction,
        )
        from lenvm.model.device import pick_device

        if regrade:
            _print_summary(regrade_prediction(output, trajectories), output)
            return
        if endpoint and lenvm:
            raise InputError("give --lenvm or --endpoint, not both")
        config = PredictionConfig(
            files=tuple(trajectories),
            split=split,
            min_completions=min_completions,
            limit=limit,
            num_traced=traced,
        )
        predictor: EndpointPredictor | ValueModelPredictor
        if endpoint:
            key = os.environ.get(api_key_variable, "none")
            predictor = EndpointPredictor(endpoint, api_key=key)
        else:
            model = load_value_model(lenvm, device=pick_device(device))
            predictor = ValueModelPredictor(model, name_value_model(lenvm))
            predictor.check_files(config.files)
        with stages() as progress:
            summary = run_prediction(config, predictor, output, progress=progress)
        _print_summary(summary, output)


def _print_summary(summary: dict[str, Any], output: Path) -> None:
    from lenvm.cli._console import print_table

    rows = []
    for domain, table in summary["domains"].items():
        rows.append([f"{domain} ({table['num_prompts']})", "value model", *_cells(table)])
        rows += [["", name, *_cells(row)] for name, row in table["baselines"].items()]
    print_table(
        f"Relative error of the predicted length, {summary['model']}",
        ["domain", "predictor", "mean", "median", "Spearman"],
        rows,
    )
    o.print_notes(summary, output)


def _cells(table: dict[str, Any]) -> list[str]:
    return [
        o.format_interval(table["mre"], ".1%"),
        o.format_interval(table["median_re"], ".1%"),
        o.format_interval(table["spearman"], ".2f"),
    ]
