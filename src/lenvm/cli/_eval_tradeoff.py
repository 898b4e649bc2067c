"""`lenvm eval tradeoff`: what a shorter answer costs in accuracy."""

from typing import Annotated, Any

import typer

from lenvm.cli import _eval_options as o

DEFAULT_ARMS = (
    *("prompt", "concise"),
    *(f"tilt:{scale}" for scale in (5, 10, 20, 40)),
    *(f"budget:{tokens}" for tokens in (100, 200, 300)),
    *(f"budget_answer:{tokens}" for tokens in (100, 200, 300)),
)


def register(group: typer.Typer) -> None:
    @group.command()
    def tradeoff(
        source: Annotated[
            str,
            typer.Argument(
                help="A file, a hub name, or gsm8k, math500, aime24, aime25, amc23, mathvista, "
                "mathvision."
            ),
        ],
        output: o.Output,
        arm: Annotated[
            list[str] | None,
            typer.Option(
                help="prompt, concise, tilt:S, at_most:N, 'at_most:N rule=NAME', budget:N, "
                "budget_answer:N, eos_bias:B; may be repeated. Default: a sweep."
            ),
        ] = None,
        samples: o.Samples = 4,
        limit: o.Limit = None,
        max_tokens: Annotated[int, typer.Option(min=1, help="The same for every arm.")] = 1024,
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
        top_p: o.TopP = 1.0,
        top_k: o.TopK = 0,
        min_p: o.MinP = 0.01,
        seed: o.Seed = None,
        frequency_penalty: o.FrequencyPenalty = 0.0,
        presence_penalty: o.PresencePenalty = 0.0,
        repetition_penalty: o.RepetitionPenalty = 1.0,
        regrade: o.Regrade = False,
    ) -> None:
        """Accuracy against mean length, arm by arm, with the area between the curves."""
        from lenvm.cli._console import stages
        from lenvm.evals.arms import parse_arms
        from lenvm.evals.generator import Sampling
        from lenvm.evals.tradeoff.arms import KINDS
        from lenvm.evals.tradeoff.run import TradeoffConfig, regrade_tradeoff, run_tradeoff

        with stages() as progress:
            if regrade:
                summary = regrade_tradeoff(output, progress=progress)
            else:
                config = TradeoffConfig(
                    source=source,
                    arms=tuple(parse_arms(arm or DEFAULT_ARMS, KINDS)),
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
                    control=o.parse_control_settings(control),
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
                summary = run_tradeoff(config, access.connect(), output, progress=progress)
        _print_summary(summary)
        o.print_notes(summary, output)


def _print_summary(summary: dict[str, Any]) -> None:
    from lenvm.cli._console import print_table

    rows = [
        [
            arm["label"],
            o.format_interval(arm["pass_at_1"], ".1%"),
            o.format_interval(arm["mean_length"], ".0f"),
            o.format_interval(arm["relative_length"], ".0%"),
            "*" if arm["arm"] in summary["pareto"] else "",
            arm["num_failed"],
        ]
        for arm in summary["arms"]
        if arm["skipped"] is None
    ]
    title = f"{summary['benchmark']}, {summary['num_items']} items, {summary['model']}"
    columns = ["arm", "pass@1", "mean length", "of unguided", "Pareto", "failed"]
    print_table(title, columns, rows)
    if summary["area_between"]:
        print_table(
            "Mean accuracy gap over common lengths",
            ["curve", "against", "lengths", "gap"],
            [
                [
                    area["family"],
                    area["against"],
                    f"{area['from']:.0f}-{area['to']:.0f}",
                    o.format_interval(area["area"], "+.1%"),
                ]
                for area in summary["area_between"]
            ],
        )
