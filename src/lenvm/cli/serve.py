"""`lenvm serve`: an OpenAI-compatible server with length control, and a page to watch it."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

UPSTREAM_KEY = "LENVM_UPSTREAM_KEY"


def register(app: typer.Typer) -> None:
    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def serve(
        context: typer.Context,
        engine: Annotated[
            str, typer.Option(help="transformers (in this process), vllm or sglang.")
        ] = "transformers",
        model: Annotated[str, typer.Option(help="Generator: folder, hub id, GGUF.")] = "smollm2",
        lenvm: Annotated[
            str | None, typer.Option(help="Value model folder; 'none' serves without one.")
        ] = None,
        upstream: Annotated[
            str | None, typer.Option(help="URL of a vLLM or SGLang server to put this one before.")
        ] = None,
        upstream_engine: Annotated[
            str, typer.Option(help="What runs there: vllm, sglang or lenvm.")
        ] = "vllm",
        host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65_535)] = 8000,
        name: Annotated[str | None, typer.Option(help="The model's name for clients.")] = None,
        api_key_file: Annotated[
            Path | None, typer.Option(help="API keys, one a line. Else $LENVM_API_KEYS.")
        ] = None,
        max_requests: Annotated[int, typer.Option(min=1, help="Completions at once.")] = 32,
        max_waiting: Annotated[int, typer.Option(min=0, help="More may wait; then 429.")] = 64,
        max_tokens: Annotated[
            int, typer.Option(min=16, help="KV budget: tokens over all requests.")
        ] = 65_536,
        max_candidates: Annotated[
            int, typer.Option(min=1, max=256, help="Largest top_k of a control.")
        ] = 256,
        default_max_tokens: Annotated[
            int, typer.Option(min=1, help="Where a request names none.")
        ] = 1024,
        max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request.")] = 4.0,
        timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 600.0,
        drain: Annotated[
            float, typer.Option(min=0, help="Seconds for running requests after SIGTERM.")
        ] = 30.0,
        track: Annotated[
            bool, typer.Option("--track", help="Values of requests without control, too.")
        ] = False,
        guide: Annotated[
            bool,
            typer.Option(
                "--guide/--no-guide",
                help="Follow answers with the value model's guide, where it has one: about twice "
                "as fast on a CPU, but its live estimates are rougher.",
            ),
        ] = True,
        log_prompts: Annotated[bool, typer.Option("--log-prompts")] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
        gpu_memory: Annotated[
            float, typer.Option(help="vllm, sglang: part of the GPU for the value model.")
        ] = 0.15,
    ) -> None:
        """Serve the OpenAI API with length control, and a live page at /.

        --engine vllm or sglang starts that engine's own server; flags that are not listed here go
        to it as they are.
        """
        if engine != "transformers":
            raise typer.Exit(_launch(engine, context))
        from lenvm.errors import InputError

        if context.args:
            raise InputError(
                f"{context.args[0]} is no option here; more arguments go to --engine vllm or sglang"
            )
        from lenvm.server import logs
        from lenvm.server.config import ServerConfig, load_api_keys
        from lenvm.server.run import bind, run

        config = ServerConfig(
            name=name or Path(model).name,
            host=host,
            port=port,
            api_keys=load_api_keys(api_key_file),
            max_waiting=max_waiting,
            max_body_bytes=int(max_body_mb * 2**20),
            default_max_tokens=default_max_tokens,
            timeout_s=timeout,
            drain_s=drain,
            track=track,
            log_prompts=log_prompts,
        )
        logs.set_up()
        taken = bind(host, port)
        if upstream is not None:
            what = upstream
            application = _build_upstream(upstream, upstream_engine, config)
        else:
            what = config.name
            from lenvm.server.app import build_app

            loaded = _load_engine(
                model,
                lenvm,
                device,
                guide=guide,
                max_requests=max_requests,
                max_tokens=max_tokens,
                max_candidates=max_candidates,
            )
            application = build_app(loaded, config)
        if not config.is_loopback and not config.api_keys:
            typer.echo("lenvm: other machines reach this server without an API key", err=True)
        run(
            application,
            config,
            taken,
            lambda url: typer.echo(f"lenvm: serving {what} at {url}", err=True),
        )


def _load_engine(
    model: str, lenvm: str | None, device: str | None, *, guide: bool, **options: Any
) -> Any:
    from lenvm.cli._inputs import load_value_model
    from lenvm.engines.transformers import TransformersEngine
    from lenvm.model.device import pick_device, pick_dtype

    device = pick_device(device)
    value_model = None if lenvm == "none" else load_value_model(lenvm, device=device)
    if value_model is not None and not guide:
        value_model.set_guide(None)
    return TransformersEngine.load(
        model, value_model, device=device, dtype=pick_dtype(device), **options
    )


def _build_upstream(url: str, engine: str, config: Any) -> Any:
    from lenvm.errors import InputError
    from lenvm.server.upstream import build_upstream_app

    if engine not in ("vllm", "sglang", "lenvm"):
        raise InputError(f"upstream-engine is {engine!r}; allowed: vllm, sglang, lenvm")
    key = os.environ.get(UPSTREAM_KEY)
    return build_upstream_app(url, config, engine=engine, api_key=key)  # type: ignore[arg-type]


FOR_ENGINES = ("engine", "model", "lenvm", "name", "host", "port")
LIMITS = ("max_requests", "max_candidates", "gpu_memory")


def _launch(engine: str, context: typer.Context) -> int:
    """Run the stock server of another engine with the value model in it; its exit status."""
    from lenvm.engines.launch import serve
    from lenvm.errors import InputError

    if engine not in ("vllm", "sglang"):
        raise InputError(f"engine is {engine!r}; allowed: transformers, vllm, sglang")
    given = {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    for name in given:
        if name not in (*FOR_ENGINES, *LIMITS):
            raise InputError(
                f"--{name.replace('_', '-')} goes with --engine transformers only; flags of "
                f"{engine} itself are passed on"
            )
    if "model" not in given or "lenvm" not in given:
        raise InputError(
            f"--engine {engine} needs --model (folder or hub id of the generator) and --lenvm "
            "(folder of the value model, or none)"
        )
    extra = [*(("--served-model-name", given["name"]) if "name" in given else ()), *context.args]
    return serve(
        engine,  # type: ignore[arg-type]  # checked above
        given["model"],
        None if given["lenvm"] == "none" else given["lenvm"],
        host=context.params["host"],
        port=context.params["port"],
        extra=extra,
        echo=typer.echo,
        **{name: given[name] for name in LIMITS if name in given},
    )
