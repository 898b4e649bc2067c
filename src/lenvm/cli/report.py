"""`lenvm report`: result folders and token traces -> one page."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def report(
        paths: Annotated[
            list[Path],
            typer.Argument(
                help="Folders that `lenvm eval` or `lenvm demo` wrote (or a folder of such), and "
                "trace files of `lenvm values --jsonl`."
            ),
        ],
        output: Annotated[
            Path | None,
            typer.Option(
                "--output",
                "-o",
                help="The page. Default: report.html in the folder, or here for several.",
            ),
        ] = None,
        title: Annotated[str, typer.Option(help="The page's title.")] = "",
    ) -> None:
        """One page of all results; it opens without a network."""
        from lenvm.reports.report import build_report

        print(build_report(paths, output, title=title))
