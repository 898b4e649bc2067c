"""`lenvm report`: result folders -> pages."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def report(
        folders: Annotated[list[Path], typer.Argument(help="Folders that `lenvm demo` wrote.")],
    ) -> None:
        """Write `report.html` into each result folder; it opens without a network."""
        from lenvm.errors import DataError
        from lenvm.files import read_json
        from lenvm.reports.demo import build_demo_report

        for folder in folders:
            summary = folder / "summary.json"
            found = read_json(summary).get("schema")
            if found != "lenvm.demo/1":
                raise DataError(f"{summary} has schema {found!r}; known: 'lenvm.demo/1'")
            print(build_demo_report(folder))
