"""`lenvm eval`: the evaluations, one sub-command each. docs/evaluation.md describes their files."""

import importlib

import typer

EVALUATIONS = ("prediction", "lifebench", "tradeoff", "length_tokens", "scaling")


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="eval",
        help="Measure prediction, length control, its cost, and what the model has seen.",
        no_args_is_help=True,
    )
    for name in EVALUATIONS:
        importlib.import_module(f"lenvm.cli._eval_{name}").register(group)
    app.add_typer(group)
