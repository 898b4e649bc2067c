"""`lenvm eval scaling`: a TOML grid of trainings (scaling laws, ablations), each evaluated."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenvm.cli import _eval_options as o

if TYPE_CHECKING:
    from lenvm.evals.prediction.run import PredictionConfig


def register(group: typer.Typer) -> None:
    @group.command()
    def scaling(
        grid: Annotated[Path, typer.Argument(help="A grid (TOML), see docs/evaluation.md.")],
        output: o.Output,
        split: Annotated[
            str, typer.Option(help="Prompts that errors are measured on: validation or test.")
        ] = "test",
        evaluate_on: Annotated[
            list[Path] | None,
            typer.Option(help="Trajectory files to measure on; default: the base's data."),
        ] = None,
        min_completions: Annotated[
            int, typer.Option(min=1, help="Prompts with fewer complete ones are left out.")
        ] = 2,
        device: o.Device = None,
    ) -> None:
        """Train and evaluate every cell of a grid. Killed and started again, it continues."""
        from lenvm.cli._console import stages
        from lenvm.evals.prediction.run import PredictionConfig
        from lenvm.evals.scaling.grid import load_grid
        from lenvm.evals.scaling.run import run_grid
        from lenvm.model.device import pick_device

        cells = load_grid(grid)
        files = evaluate_on or [Path(name) for name in cells.base.get("data", [])]
        where = pick_device(device)

        def run_cell(settings: Mapping[str, Any], folder: Path) -> dict[str, float]:
            config = PredictionConfig(tuple(files), split=split, min_completions=min_completions)
            return train_and_evaluate(settings, folder, config, where)

        with stages() as progress:
            summary = run_grid(cells, output, run_cell, progress=progress)
        _print_summary(summary, output)


def train_and_evaluate(
    settings: Mapping[str, Any], folder: Path, config: "PredictionConfig", device: str
) -> dict[str, float]:
    """Train one cell and measure its predictions: loss, errors by domain and while decoding."""
    from lenvm.cli._inputs import load_value_model
    from lenvm.evals.prediction.predictors import ValueModelPredictor
    from lenvm.evals.prediction.run import run_prediction
    from lenvm.training.config import TrainingConfig
    from lenvm.training.trainer import train

    options = TrainingConfig.parse({**settings, "output": str(folder / "model")})
    result = train(options)
    model = load_value_model(options.output, device=device)
    predictor = ValueModelPredictor(model, folder.name)
    predictor.check_files(config.files)
    summary = run_prediction(config, predictor, folder / "prediction")
    metrics = {
        "val_loss": result.val_loss_last,
        "tokens": float(result.num_tokens),
        "tokens_per_s": result.tokens_per_s,
    }
    for domain, table in summary["domains"].items():
        suffix = "" if domain == "all" else f"_{domain}"
        metrics |= {
            f"{name}{suffix}": table[name]["value"]
            for name in ("mre", "median_re", "mre_mean", "mre_median", "spearman")
            if table[name] is not None  # of one prompt there is no rank correlation
        }
        metrics |= {
            f"mre_at_{row['at']:g}{suffix}": row["mre"]["value"] for row in table["positions"]
        }
    return metrics


def format_seeds(found: dict[str, Any] | None, num_seeds: int) -> str:
    """`0.0213 [0.0208, 0.0220]`; of a few seeds, no interval: `0.0213 (0.0207 to 0.0221)`."""
    text = o.format_interval(found, ".4f")
    if found is None or found["low"] is not None or num_seeds < 2:
        return text
    return f"{text} ({found['least']:.4f} to {found['greatest']:.4f})"


def _print_summary(summary: dict[str, Any], output: Path) -> None:
    from lenvm.cli._console import print_table

    shown = [m for m in ("val_loss", "mre", "mre_median", "median_re") if m in summary["metrics"]]
    print_table(
        "Grid",
        [*summary["axes"], "seeds", *shown],
        [
            [
                *(cell["axes"][name] for name in summary["axes"]),
                cell["num_seeds"],
                *(format_seeds(cell["metrics"][m], cell["num_seeds"]) for m in shown),
            ]
            for cell in summary["cells"]
        ],
    )
    o.print_notes(summary, output)
