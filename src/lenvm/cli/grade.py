"""`lenvm grade`: which completions are right, as the rewards of a trajectory file."""

import os
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def grade(
        file: Annotated[Path, typer.Argument(help="Trajectory file.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
        answers: Annotated[
            str | None,
            typer.Option(
                help="Questions with answers (a file, a benchmark such as gsm8k, or a hub name) "
                "for prompts that were sampled without."
            ),
        ] = None,
        processes: Annotated[
            int | None, typer.Option(min=1, help="Grading processes (default: one a core).")
        ] = None,
    ) -> None:
        """Give completions that can be checked a reward: 1 right, 0 wrong."""
        from lenvm.cli._console import print_table, stages
        from lenvm.evals.tradeoff.rewards import grade_trajectories

        with stages() as progress:
            report = grade_trajectories(
                file,
                output,
                answers=answers,
                num_processes=processes or os.cpu_count() or 1,
                on_progress=lambda done, total: progress("grade", done, total),
            )
        rows = [*sorted(report.domains.items()), ("all", report.total)]
        print_table(
            f"Rewards: {output}",
            ["domain", "completions", "graded", "right", "% right", "without an answer", "failed"],
            [
                (
                    domain,
                    c.num_completions,
                    c.num_graded,
                    c.num_right,
                    f"{100 * c.num_right / c.num_graded:.1f}%" if c.num_graded else "-",
                    c.num_without_gold,
                    c.num_failed,
                )
                for domain, c in rows
            ],
        )
        if report.failure is not None:
            typer.echo(f"failed: {report.failure}", err=True)
