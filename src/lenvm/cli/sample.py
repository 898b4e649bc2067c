"""`lenvm sample`: n completions of every prompt, from servers or from the model in this process."""

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def sample(
        prompts: Annotated[
            str, typer.Argument(help="Prompt file, data set name (`lenvm prompts`), or `bundled`.")
        ],
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Trajectory file to write or continue.")
        ],
        endpoint: Annotated[
            list[str] | None,
            typer.Option(help="Server, http://HOST:PORT/v1; repeat for several."),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(help="Model on the server (default: the one served), or locally."),
        ] = None,
        tokenizer: Annotated[
            str | None, typer.Option(help="For servers that return no token ids.")
        ] = None,
        n: Annotated[int, typer.Option("--n", "-n", min=1, help="Completions per prompt.")] = 1,
        temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
        top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
        top_k: Annotated[int, typer.Option(help="0 = all tokens.")] = 0,
        min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
        max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024,
        seed: Annotated[
            int | None, typer.Option(help="Reproducible completions (slower on vLLM).")
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="At most LIMIT prompts.")] = None,
        shuffle: Annotated[
            int | None, typer.Option(help="Shuffle the prompts with this seed before --limit.")
        ] = None,
        where: Annotated[
            list[str] | None,
            typer.Option(help="Keep prompts with FIELD=VALUE, such as split=train; repeatable."),
        ] = None,
        field: Annotated[
            list[str] | None,
            typer.Option(
                help="Field of the prompt, or NAME=FIELD (prompt, domain, split, images)."
            ),
        ] = None,
        domain: Annotated[str | None, typer.Option(help="Domain of every prompt.")] = None,
        shard: Annotated[
            str | None, typer.Option(help="I/K: the I-th (from 0) of K parts of the prompts.")
        ] = None,
        length: Annotated[
            list[str] | None,
            typer.Option(help="Length controls (JSON, or `none`) to cycle over; repeatable."),
        ] = None,
        server: Annotated[
            str | None, typer.Option(help="vllm, sglang, lenvm or openai (default: ask it).")
        ] = None,
        extra: Annotated[
            str | None, typer.Option(help="More request fields, as a JSON object.")
        ] = None,
        concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
        per_request: Annotated[
            int, typer.Option(min=1, help="Most completions asked for in one request.")
        ] = 16,
        retries: Annotated[int, typer.Option(min=0, help="Of a failed request.")] = 4,
        patience: Annotated[
            float, typer.Option(help="Seconds of nothing but failures until a server is given up.")
        ] = 30.0,
        timeout: Annotated[
            float, typer.Option(help="Seconds for one request; as long for a place.")
        ] = 3600.0,
        strict: Annotated[
            bool, typer.Option(help="Stop where token ids disagree with the server's count.")
        ] = False,
    ) -> None:
        """Sample completions. Killed and started again, it continues.

        Exit code 5 when completions failed; run the same command to try those again.
        """
        from lenvm.cli._console import stages
        from lenvm.cli.prompts import read_source
        from lenvm.guidance.request import LengthControl

        rows = read_source(
            prompts,
            field=field,
            domain=domain,
            limit=limit,
            seed=shuffle,
            where=where or [],
            shard=shard,
            image_dir=output.with_name(output.stem + ".images"),
        )
        values: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        controls = [None if text == "none" else LengthControl.parse(text) for text in length or []]
        with stages() as progress:
            if endpoint:
                report = _sample_servers(
                    rows,
                    output,
                    endpoint,
                    controls,
                    {**values, **_parse_extra(extra)},
                    {
                        "model": model,
                        "n": n,
                        "tokenizer": tokenizer,
                        "server": server,
                        "concurrency": concurrency,
                        "per_request": per_request,
                        "retries": retries,
                        "patience_s": patience,
                        "timeout_s": timeout,
                        "strict": strict,
                        "progress": progress,
                    },
                )
            else:
                report = _sample_here(
                    rows, output, model or "smollm2", n, values, controls, progress
                )
        typer.echo(report, err=True)
        if getattr(report, "num_failed", 0):
            from lenvm.errors import EndpointError

            raise typer.Exit(EndpointError.exit_code)


def _parse_extra(text: str | None) -> dict[str, Any]:
    import json

    from lenvm.errors import InputError

    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(
            f"--extra is {text!r}; it must be a JSON object such as '{{\"stop\": []}}'"
        )
    return value


def _sample_servers(
    rows: Any,
    output: Path,
    endpoints: list[str],
    controls: list[Any],
    sampling: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    import os

    from lenvm.data.completers import SERVER_KINDS
    from lenvm.data.sampler import sample_from_endpoints
    from lenvm.errors import InputError

    if options["server"] not in (None, *SERVER_KINDS):
        raise InputError(f"--server is {options['server']!r}; allowed: {', '.join(SERVER_KINDS)}")
    tokenizer = options.pop("tokenizer")
    return sample_from_endpoints(
        rows,
        output,
        endpoints=endpoints,
        sampling=sampling,
        controls=[c and c.model_dump(exclude_defaults=True) for c in controls],
        encoder=Retokenizer(tokenizer) if tokenizer else None,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        **options,
    )


class Retokenizer:
    """A generator's tokenizer (and image processor), for servers that return text alone."""

    def __init__(self, name: str) -> None:
        from lenvm.model.bundled import resolve_model
        from lenvm.model.tokenization import load_tokenizer

        self._path = name if Path(name).is_dir() else resolve_model(name)
        self._tokenizer = load_tokenizer(self._path)
        self._images: Any = None
        self.eos_token_id: int = self._tokenizer.eos_token_id

    def encode_prompt(self, prompt: Any) -> list[int]:
        from lenvm.data.images import place_images
        from lenvm.model.tokenization import encode_prompt

        if not prompt.images:
            return encode_prompt(self._tokenizer, prompt.conversation)
        if self._images is None:
            from lenvm.model.vision import load_image_reader

            self._images = load_image_reader(self._path)
        ids = encode_prompt(self._tokenizer, place_images(prompt))
        return list(self._images.expand(ids, prompt.images))

    def encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


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
    from lenvm.engines.rollout import count_rows, rollout
    from lenvm.engines.sampling import SamplingParams
    from lenvm.engines.transformers import TransformersEngine
    from lenvm.model.device import pick_device, pick_dtype

    sampling = SamplingParams.parse(values)
    device = pick_device()
    value_model = load_value_model(None, device=device) if controls else None
    engine = TransformersEngine.load(model, value_model, dtype=pick_dtype(device), device=device)
    total, count = len(rows) * n, count_rows(output)
    progress("sample completions", count, total)

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
    return f"{output}: {count - before} completions written, {before} were there"
