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
        columns = _columns(found[0], budget)
        print_table(
            "Predicted answer length (tokens)",
            ["prompt", *columns],
            (
                [_shorten(row.text), *_columns(numbers, budget).values()]
                for row, numbers in zip(rows, found, strict=True)
            ),
        )


def _columns(numbers: dict[str, float], budget: int | None) -> dict[str, str]:
    """What the table shows of a prediction, by column."""
    if "p50" not in numbers:
        return {"length": f"{numbers['length']:,.0f}"}
    shown = {
        "median": f"{numbers['p50']:,.0f}",
        "80% interval": f"{numbers['p10']:,.0f} - {numbers['p90']:,.0f}",
        "mean": f"{numbers['mean']:,.0f}",
    }
    if budget is not None:
        shown[f"P(<= {budget})"] = f"{numbers['p_within_budget']:.2f}"
    return shown


def _shorten(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
