"""`lenvm eval lifebench`: length instructions, followed how well, at what cost in quality."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm.cli import _eval_options as o


def register(group: typer.Typer) -> None:
    @group.command()
    def lifebench(
        file: Annotated[Path, typer.Argument(help="LIFEBench items (JSONL).")],
        output: o.Output,
        arm: Annotated[
            list[str] | None,
            typer.Option(
                help="prompt, countdown, truncate, eos_bias:B, eos_decay:F, hard, expected, "
                "soft:S, conditional:E, a rule of your own; may be repeated. Default: "
                "prompt, truncate, hard, soft:100, conditional:1."
            ),
        ] = None,
        constraint: Annotated[
            list[str] | None, typer.Option(help="equal_to, at_most, at_least; may be repeated.")
        ] = None,
        target: Annotated[
            list[int] | None, typer.Option(min=1, help="16 to 8192; may be repeated.")
        ] = None,
        unit: Annotated[str, typer.Option(help="tokens, words or characters.")] = "tokens",
        tokens_per_unit: Annotated[
            float | None, typer.Option(help="For words and characters: tokens in one of them.")
        ] = None,
        samples: o.Samples = 1,
        limit: o.Limit = None,
        max_tokens: o.MaxTokens = None,
        control: o.Control = None,
        endpoint: o.EndpointUrl = None,
        engine: o.Engine = "auto",
        model: o.Model = None,
        lenvm: o.ValueModel = None,
        device: o.Device = None,
        tokenizer: o.Tokenizer = None,
        api_key_variable: o.ApiKeyVariable = "LENVM_API_KEY",
        concurrency: o.Concurrency = 64,
        timeout_s: o.TimeoutS = 600.0,
        temperature: o.Temperature = 1.0,
        top_p: o.TopP = 0.999,
        top_k: o.TopK = 15,
        min_p: o.MinP = 0.0,
        seed: o.Seed = None,
        frequency_penalty: o.FrequencyPenalty = 0.0,
        presence_penalty: o.PresencePenalty = 0.0,
        repetition_penalty: o.RepetitionPenalty = 1.0,
        judge_endpoint: Annotated[
            str | None, typer.Option(help="Server of a model that rates the answers.")
        ] = None,
        judge_model: Annotated[str | None, typer.Option(help="Model on that server.")] = None,
        judge_key_variable: Annotated[
            str, typer.Option(help="Environment variable with its API key.")
        ] = "LENVM_JUDGE_API_KEY",
        regrade: o.Regrade = False,
    ) -> None:
        """LIFEBench: length score and deviation beside quality, arm by arm."""
        from lenvm.cli._console import stages
        from lenvm.evals.arms import parse_arms
        from lenvm.evals.client import connect
        from lenvm.evals.generator import Sampling
        from lenvm.evals.judge import Judge
        from lenvm.evals.lifebench.arms import KINDS
        from lenvm.evals.lifebench.run import LifebenchConfig, regrade_lifebench, run_lifebench

        if regrade:
            _print_summary(regrade_lifebench(output), output)
            return
        options: dict[str, Any] = {"targets": tuple(target)} if target else {}
        if constraint:
            options["constraints"] = tuple(constraint)
        names = arm or ["prompt", "truncate", "hard", "soft:100", "conditional:1"]
        config = LifebenchConfig(
            file=file,
            arms=tuple(parse_arms(names, KINDS)),
            unit=unit,  # type: ignore[arg-type]
            num_samples=samples,
            limit=limit,
            max_tokens=max_tokens,
            sampling=Sampling(
                temperature,
                top_p,
                top_k,
                min_p,
                seed,
                frequency_penalty,
                presence_penalty,
                repetition_penalty,
            ),
            tokens_per_unit=tokens_per_unit,
            control=o.parse_control_settings(control),
            **options,
        )
        access = o.Access(
            endpoint,
            engine,
            model,
            lenvm,
            device,
            tokenizer,
            api_key_variable,
            concurrency,
            timeout_s,
        )
        generator = access.connect()
        judge = None
        if judge_endpoint:
            key = os.environ.get(judge_key_variable, "none")
            judge = Judge(connect(judge_endpoint, model=judge_model, api_key=key))
        with stages() as progress:
            summary = run_lifebench(config, generator, output, judge=judge, progress=progress)
        _print_summary(summary, output)


def _print_summary(summary: dict[str, Any], output: Path) -> None:
    from lenvm.cli._console import print_table

    for constraint in ("equal_to", "at_most", "at_least"):
        rows = [
            [
                arm["label"],
                o.format_interval(arm[constraint]["score"]),
                o.format_interval(arm[constraint]["deviation"], ".0%"),
                o.format_interval(arm[constraint]["quality"]["log_prob"], ".2f"),
                o.format_interval(arm[constraint]["quality"]["natural_end"], ".0%"),
                arm[constraint]["num_failed"],
            ]
            for arm in summary["arms"]
            if arm[constraint] is not None
        ]
        if rows:
            columns = ["arm", "score", "deviation", "log-prob", "natural ends", "failed"]
            title = f"LIFEBench {constraint.replace('_', ' ')}, {summary['model']}"
            print_table(title, columns, rows)
    o.print_notes(summary, output)
