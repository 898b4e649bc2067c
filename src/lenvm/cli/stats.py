"""`lenvm stats`: how long the completions of trajectory files are; smaller files of larger ones."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def stats(
        files: Annotated[list[Path], typer.Argument(help="Trajectory files.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
        downsample: Annotated[
            Path | None, typer.Option(help="Write a random part of the files here.")
        ] = None,
        prompts: Annotated[
            int | None, typer.Option(min=1, help="With --downsample: so many prompts.")
        ] = None,
        per_prompt: Annotated[
            int | None, typer.Option(min=1, help="With --downsample: completions of each.")
        ] = None,
        seed: Annotated[int, typer.Option(help="With --downsample: which ones.")] = 0,
        plot: Annotated[
            Path | None, typer.Option(help="Draw the lengths of each domain here (PNG).")
        ] = None,
    ) -> None:
        """Counts, truncation, length percentiles and a gamma for training."""
        from lenvm.data.stats import compute_stats
        from lenvm.data.stats import downsample as write_part
        from lenvm.data.trajectory import IdCheck, read_trajectories
        from lenvm.errors import InputError

        if downsample:
            counts = write_part(
                files, downsample, prompts=prompts, per_prompt=per_prompt, seed=seed
            )
            typer.echo(
                f"{downsample}: {counts['prompts']} of {counts['prompts_before']} prompts, "
                f"{counts['completions']} of {counts['completions_before']} completions",
                err=True,
            )
            files = [downsample]
        elif prompts or per_prompt:
            raise InputError("--prompts and --per-prompt need --downsample FILE")
        checks = [IdCheck(path) for path in files]
        found = compute_stats(t for c in checks for t in c.watch(read_trajectories(c.path)))
        if plot:
            from lenvm.reports.lengths import draw_lengths

            draw_lengths(found, plot)
        warnings = _find_faults(found, checks)
        if as_json:
            typer.echo(json.dumps({**found.to_json(), "warnings": warnings}, indent=2))
            return
        _print(found)
        for message in warnings:
            typer.echo(f"lenvm: warning: {message}", err=True)


def _find_faults(found: Any, checks: list[Any]) -> list[str]:
    """What training on the files would suffer from."""
    from lenvm.data.stats import describe_truncated

    whole = found.groups[-1]
    where = ", ".join(str(check.path) for check in checks)
    told = describe_truncated(where, whole.num_truncated, whole.num_completions)
    return [message for message in (told, *(check.warning for check in checks)) if message]


def _print(found: Any) -> None:
    from lenvm.cli._console import print_table
    from lenvm.data.stats import PERCENTILES

    names = [g.domain if g.domain == g.split else f"{g.domain}/{g.split}" for g in found.groups]
    groups = list(zip(names, found.groups, strict=True))
    print_table(
        "Completions",
        ["domain/split", "prompts", "completions", "truncated", "tokens"],
        [
            (
                name,
                g.num_prompts,
                g.num_completions,
                f"{100 * g.truncated_share:.1f}%",
                g.num_tokens,
            )
            for name, g in groups
        ],
    )
    print_table(
        "Tokens of a completion, by percentile",
        ["domain/split", "mean", *(f"{p}%" for p in PERCENTILES), "max"],
        [
            (name, f"{g.mean:.0f}", *(g.percentiles[p] for p in PERCENTILES), g.max)
            for name, g in groups
        ],
    )
    least, mean, most = found.completions_per_prompt
    typer.echo(f"completions per prompt: {least} to {most}, {mean:.2f} on average")
    typer.echo(f"models: {', '.join(f'{m} ({n})' for m, n in found.models.items())}")
    reasons = ", ".join(f"{r} {n}" for r, n in found.finish_reasons.items())
    typer.echo(f"finish reasons: {reasons}")
    if found.controlled:
        typer.echo(f"sampled under length control: {found.controlled}")
    if found.gamma is None:
        typer.echo("gamma: none, since every completion is truncated; sample with more max_tokens")
    else:
        typer.echo(f"gamma for training: {found.gamma:.6f}")
