"""`lenvm demo`: sample, train, predict, guide and report, in one go."""

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def demo(
        output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
        generator: Annotated[str, typer.Option(help="Folder, hub id, GGUF.")] = "smollm2",
    ) -> None:
        """The whole path on real prompts with a real model: two to six minutes on two cores.

        Killed half-way, it continues when run again; complete, it says so at once.
        """
        from lenvm.cli._console import console, stages
        from lenvm.files import manifest_path

        if (output / "summary.json").exists():
            console().print(
                f"{output} is complete; to run it again, delete it and {manifest_path(output)}"
            )
        else:
            console().print("Loading the model")
        from lenvm.demo import DemoConfig, run_demo
        from lenvm.reports.demo import build_demo_report, shortfalls

        with stages() as progress:
            summary = run_demo(output, DemoConfig(generator=generator), progress)
        report = build_demo_report(output)
        _print_summary(summary, shortfalls(summary))
        print(f"\nReport: {report}")


def _print_summary(s: dict[str, Any], missed: list[str]) -> None:
    from lenvm.cli._console import print_table

    p, e = s["prediction"], s["equal_to"]
    rows: list[list[object]] = [
        [
            "prediction error at the prompt",
            f"{p['mre_constant']:.0%} (constant)",
            f"{p['mre']:.0%}",
        ],
        [
            f"length score, equal to {' / '.join(map(str, e['targets']))}",
            f"{e['unguided']['length_score']:.1f}",
            f"{e['guided']['length_score']:.1f}",
        ],
        [
            "deviation from the target",
            f"{e['unguided']['deviation']:.0%}",
            f"{e['guided']['deviation']:.0%}",
        ],
        [
            "log-probability per token",
            f"{e['unguided']['log_prob']:.2f}",
            f"{e['guided']['log_prob']:.2f}",
        ],
    ]
    rows += [
        [f"mean length, tilt {t['scale']:g}", "", f"{t['mean_length']:.0f}"] for t in s["tilt"]
    ]
    print_table("What came out", ["held-out prompts", "without LenVM", "with LenVM"], rows)
    for line in missed:
        print(f"Not reached: {line}")
