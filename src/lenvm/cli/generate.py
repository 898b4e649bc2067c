"""`lenvm generate`: an answer of the length asked for."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def generate(
        prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; - reads stdin.")] = None,
        prompts_file: Annotated[
            Path | None, typer.Option("--prompts", help="A prompt file: JSON, JSONL, CSV, Parquet.")
        ] = None,
        equal_to: Annotated[int | None, typer.Option(help="This many tokens.")] = None,
        at_most: Annotated[int | None, typer.Option(help="No more than this many tokens.")] = None,
        at_least: Annotated[int | None, typer.Option(help="No fewer than this many.")] = None,
        shortest: Annotated[
            float | None,
            typer.Option(help="As the shortest share of the answers would be, such as 0.3."),
        ] = None,
        price: Annotated[
            float | None,
            typer.Option(help="Shorter, smoothly: each token costs so many nats, such as 0.005."),
        ] = None,
        tilt: Annotated[
            float | None, typer.Option(help="Trade length smoothly: > 0 shorter, < 0 longer.")
        ] = None,
        length: Annotated[
            str | None, typer.Option(help='The whole control as JSON: {"equal_to": 128, ...}')
        ] = None,
        tolerance: Annotated[
            float | None, typer.Option(help="--equal-to is met within this share, such as 0.05.")
        ] = None,
        rule: Annotated[
            str | None,
            typer.Option(help="conditional, soft, expected, hard, or one that is installed."),
        ] = None,
        model: Annotated[str, typer.Option(help="Generator: folder, hub id, GGUF.")] = "smollm2",
        lenvm: Annotated[str | None, typer.Option(help="Value model folder.")] = None,
        max_tokens: Annotated[
            int | None,
            typer.Option(help="Hard limit (default: 1024, or twice the length asked for)."),
        ] = None,
        temperature: Annotated[float, typer.Option()] = 1.0,
        top_p: Annotated[float, typer.Option(help="The likeliest tokens of this share.")] = 1.0,
        top_k: Annotated[int, typer.Option(help="The likeliest TOP_K tokens; 0: all.")] = 0,
        min_p: Annotated[
            float, typer.Option(help="Tokens of this share of the likeliest one's probability.")
        ] = 0.0,
        stop: Annotated[
            list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")
        ] = None,
        frequency_penalty: Annotated[
            float, typer.Option(help="Off a token's logit for each time the answer has it.")
        ] = 0.0,
        presence_penalty: Annotated[
            float, typer.Option(help="Off the logits of tokens that the answer has.")
        ] = 0.0,
        repetition_penalty: Annotated[
            float, typer.Option(help="Over 1: less of what prompt and answer have.")
        ] = 1.0,
        seed: Annotated[int | None, typer.Option()] = None,
        n: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 1,
        jsonl: Annotated[bool, typer.Option("--jsonl", help="JSON lines, not text.")] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="First LIMIT prompts only.")] = None,
    ) -> None:
        """Generate answers, with the length you ask for."""
        from lenvm.cli._console import stages
        from lenvm.cli._inputs import load_value_model, read_prompts
        from lenvm.engines.sampling import SamplingParams
        from lenvm.engines.transformers import Request, TransformersEngine
        from lenvm.guidance.request import DEFAULT_MAX_TOKENS, pick_max_tokens
        from lenvm.model.device import pick_device, pick_dtype
        from lenvm.model.tokenization import encode_prompt

        goals: dict[str, Any] = {"equal_to": equal_to, "at_most": at_most, "at_least": at_least}
        goals |= {
            "shortest": shortest,
            "price": price,
            "tilt": tilt,
            "tolerance": tolerance,
            "rule": rule,
        }
        control = parse_control(goals, length)
        sampling = SamplingParams.parse(
            {
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "stop": tuple(stop or ()),
                "frequency_penalty": frequency_penalty,
                "presence_penalty": presence_penalty,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
                "max_tokens": DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            }
        )
        if max_tokens is not None:
            check_limit(control, max_tokens)
        rows = read_prompts(prompts, prompts_file, limit)
        device = pick_device(device)
        value_model = load_value_model(lenvm, device=device) if control or lenvm else None
        engine = TransformersEngine.load(
            model, value_model, device=device, dtype=pick_dtype(device)
        )
        requests = []
        for i, row in enumerate(rows):
            ids = tuple(encode_prompt(engine.tokenizer, row.conversation))
            room = max(1, engine.max_length - len(ids))  # none at all: the engine says so
            most = max_tokens or pick_max_tokens(control, default=DEFAULT_MAX_TOKENS, room=room)
            check_room(control, most)
            own = sampling.model_copy(update={"max_tokens": most})
            requests += [
                Request(f"{i}-{j}", ids, own, control, predict=True, index=j) for j in range(n)
            ]
        if len(requests) == 1 and not jsonl:
            _stream(engine, requests[0])
            return
        done: dict[str, Any] = {}
        with stages() as progress:
            progress("generate", 0, len(requests))
            for completion in engine.generate(requests):
                done[completion.request.id] = completion
                progress("generate", len(done), len(requests))
        for completion in (done[request.id] for request in requests):
            if completion.error is not None:
                raise completion.error
            if jsonl:
                print(json.dumps(to_json(completion), ensure_ascii=False))
            else:
                print(completion.text, end="\n\n" if len(requests) > 1 else "\n")
                typer.echo(f"[{describe(completion)}]", err=True)


def _stream(engine: Any, request: Any) -> None:
    """One answer, printed while it is written."""
    from dataclasses import replace

    completion = engine.submit(replace(request, stream=True))
    shown = 0
    try:
        while completion.finish_reason is None:
            engine.step()
            settled = completion.stream.settled
            print(settled[shown:], end="", flush=True)
            shown = max(shown, len(settled))
        print(completion.stream.text[shown:], end="")
    finally:  # Ctrl-C too: what is said next begins a line
        print(flush=True)
    if completion.error is not None:
        raise completion.error
    typer.echo(f"[{describe(completion)}]", err=True)


def parse_control(fields: dict[str, Any], text: str | None) -> Any:
    """The control of the flags, or of --length; None where neither asks for one."""
    from lenvm.errors import InputError
    from lenvm.guidance.request import LengthControl

    given = {name: value for name, value in fields.items() if value is not None}
    if text is not None:
        if given:
            raise InputError(f"--length holds the whole control; leave out {', '.join(given)}")
        return LengthControl.parse(text)
    return LengthControl.parse(given) if given else None


def check_room(control: Any, room: int) -> None:
    """CapacityError where the length asked for does not fit after the prompt."""
    from lenvm.errors import CapacityError

    if control is not None and (low := control.least) > room:
        raise CapacityError(
            f"a length of {low} tokens does not fit: after this prompt the models have room for "
            f"{room}; ask for less"
        )


def check_limit(control: Any, max_tokens: int) -> None:
    """InputError where the length asked for does not fit into max_tokens."""
    from lenvm.errors import InputError

    if control is not None and (low := control.least) > max_tokens:
        raise InputError(
            f"a length of {low} tokens does not fit into --max-tokens {max_tokens}; raise it to "
            f"at least {low}, or leave it out"
        )


def to_json(completion: Any) -> dict[str, Any]:
    """What `--jsonl` prints of a completion."""
    return {
        "id": completion.request.id,
        "text": completion.text,
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "predicted_length": completion.predicted_length,
        "mean_log_prob": sum(completion.log_probs) / len(completion.log_probs),
        "token_ids": completion.token_ids,
    }


def describe(completion: Any) -> str:
    """One line about a completion's length."""
    parts = [f"{len(completion.token_ids)} tokens", f"finish: {completion.finish_reason}"]
    if completion.predicted_length is not None:
        parts.insert(1, f"predicted {completion.predicted_length:.0f} without control")
    return ", ".join(parts)
