"""`lenvm predict`: how long the answer will be, before a token of it is written."""

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def predict(
        prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; - reads stdin.")] = None,
        prompts_file: Annotated[
            Path | None, typer.Option("--prompts", help="A prompt file: JSON, JSONL, CSV, Parquet.")
        ] = None,
        lenvm: Annotated[str | None, typer.Option(help="Value model folder.")] = None,
        budget: Annotated[
            int | None, typer.Option(min=1, help="Also print P(length <= BUDGET).")
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="First LIMIT prompts only.")] = None,
        jsonl: Annotated[bool, typer.Option("--jsonl", help="JSON lines, not a table.")] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    ) -> None:
        """Predict the length of each prompt's answer, in tokens, before it is written."""
        from lenvm.cli._console import print_table
        from lenvm.cli._inputs import load_value_model, read_prompts
        from lenvm.data.images import place_images
        from lenvm.model.device import pick_device
        from lenvm.model.prediction import predict_lengths
        from lenvm.model.tokenization import encode_prompt

        rows = read_prompts(prompts, prompts_file, limit)
        model = load_value_model(lenvm, device=pick_device(device))
        ids = [
            encode_prompt(model.tokenizer, place_images(row) if row.images else row.conversation)
            for row in rows
        ]
        images = [row.images for row in rows] if any(row.images for row in rows) else None
        found = predict_lengths(model, ids, images=images, budget=budget)
        if jsonl:
            for row, numbers in zip(rows, found, strict=True):
                print(json.dumps({"prompt": row.text, **numbers}, ensure_ascii=False))
            return
        columns = [name for name in found[0] if name != "value"]
        print_table(
            "Predicted answer length (tokens)",
            ["prompt", *columns],
            (
                [_shorten(row.text), *(_format(name, numbers[name]) for name in columns)]
                for row, numbers in zip(rows, found, strict=True)
            ),
        )


def _shorten(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _format(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "p_within_budget" else f"{value:,.0f}"
