"""`lenvm merge`: a LoRA value model as one whole checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def merge(
        lenvm: Annotated[str, typer.Argument(help="Value model: a folder, or FOLDER@BASE.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    ) -> None:
        """Merge a LoRA value model into its base, and its guide: the whole checkpoint, for
        `vllm serve` and others that read no adapters."""
        from lenvm.errors import InputError
        from lenvm.model.value_model import LengthValueModel

        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise InputError(f"{output} is there and no empty folder; name a new one")
        model = LengthValueModel.from_pretrained(lenvm)
        for part in (model, model.guide):
            if part is not None:
                part.config.base_model = None
        model.save_pretrained(output)
        typer.echo(f"{output}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M", err=True)
