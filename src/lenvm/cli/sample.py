"""`lenvm sample`: n completions of every prompt, from servers or from the model in this process."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def sample(
        prompts: Annotated[str, typer.Argument(help="Prompt file, hub name, or `bundled`.")],
        output: Annotated[Path, typer.Option(help="Trajectory file to write or continue.")],
        endpoint: Annotated[
            list[str] | None,
            typer.Option(help="Base URL of a server, http://HOST:PORT/v1; may be repeated."),
        ] = None,
        model: Annotated[
            str, typer.Option(help="Model name on the server, or locally.")
        ] = "smollm2",
        tokenizer: Annotated[
            str | None, typer.Option(help="For servers that return no token ids.")
        ] = None,
        n: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 1,
        temperature: Annotated[float, typer.Option()] = 1.0,
        top_p: Annotated[float, typer.Option()] = 1.0,
        top_k: Annotated[int, typer.Option()] = 0,
        min_p: Annotated[float, typer.Option()] = 0.0,
        max_tokens: Annotated[int, typer.Option()] = 1024,
        seed: Annotated[int | None, typer.Option()] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="First LIMIT prompts.")] = None,
        field: Annotated[str | None, typer.Option(help="Field that holds the prompt.")] = None,
        domain: Annotated[str | None, typer.Option(help="Domain of every prompt.")] = None,
        concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
        length: Annotated[
            list[str] | None, typer.Option(help="Length controls (JSON) to cycle over.")
        ] = None,
    ) -> None:
        """Sample completions. Killed and started again, it continues."""
        from lenvm.cli._console import stages
        from lenvm.data.prompts import load_bundled_prompts, load_prompts
        from lenvm.guidance.request import LengthControl

        if prompts == "bundled":
            rows = load_bundled_prompts()[:limit]
        else:
            rows = load_prompts(prompts, field_name=field, domain=domain, limit=limit)
        values: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        controls = [LengthControl.parse(text) for text in length or []]
        with stages() as progress:
            if endpoint:
                from lenvm.data.sampler import sample_from_endpoints

                report = sample_from_endpoints(
                    rows,
                    output,
                    endpoints=endpoint,
                    model=model,
                    n=n,
                    sampling=values,
                    tokenizer=tokenizer,
                    concurrency=concurrency,
                    controls=[c.model_dump(exclude_defaults=True) for c in controls],
                    api_key=os.environ.get("OPENAI_API_KEY", "none"),
                    progress=progress,
                )
            else:
                report = _sample_here(rows, output, model, n, values, controls, progress)
        typer.echo(report, err=True)


def _sample_here(
    rows: Any,
    output: Path,
    model: str,
    n: int,
    values: dict[str, Any],
    controls: Any,
    progress: Any,
) -> str:
    from lenvm.cli._inputs import load_value_model
    from lenvm.engines.rollout import rollout
    from lenvm.engines.sampling import SamplingParams
    from lenvm.engines.transformers import TransformersEngine
    from lenvm.model.device import pick_device, pick_dtype

    sampling = SamplingParams.parse(values)
    device = pick_device()
    value_model = load_value_model(None, device=device) if controls else None
    engine = TransformersEngine.load(model, value_model, dtype=pick_dtype(device), device=device)
    total, count = len(rows) * n, 0

    def advance(_: object) -> None:
        nonlocal count
        count += 1
        progress("sample completions", count, total)

    before = rollout(
        engine,
        rows,
        output,
        n=n,
        sampling=sampling,
        model=model,
        controls=controls or (None,),
        on_completion=advance,
    )
    return f"{output}: {count} completions added to {before}"
