"""`lenvm values`: what the model expects at every token of a completion."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

HEADINGS = {"geometric_mean": "geo.mean", "p_within_budget": "P(fits)"}
"""What the table calls a number whose name is too long for a column."""


def register(app: typer.Typer) -> None:
    @app.command()
    def values(
        prompt: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
        completion: Annotated[str | None, typer.Argument(help="The answer.")] = None,
        trajectories: Annotated[
            Path | None, typer.Option(help="A trajectory file instead of texts.")
        ] = None,
        lenvm: Annotated[str | None, typer.Option(help="Value model folder.")] = None,
        image: Annotated[
            list[str] | None, typer.Option(help="Image file of the prompt; repeatable.")
        ] = None,
        cut: Annotated[bool, typer.Option("--cut", help="The answer was cut off.")] = False,
        budget: Annotated[
            int | None,
            typer.Option(min=1, help="Also P(whole answer <= BUDGET) at every token."),
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1)] = None,
        jsonl: Annotated[
            bool,
            typer.Option("--jsonl", help="lenvm.trace/1 lines, for `lenvm report`; not a table."),
        ] = False,
        markdown: Annotated[
            bool, typer.Option("--markdown", help="A Markdown table for each answer.")
        ] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    ) -> None:
        """Predicted tokens to come at every token of an answer.

        `lenvm values ... --jsonl > a.jsonl` and `lenvm report a.jsonl b.jsonl` draw them.
        """
        from lenvm.cli._inputs import check_text, load_value_model, name_value_model
        from lenvm.errors import InputError
        from lenvm.evals.length_tokens.tokens import split_text
        from lenvm.model.device import pick_device
        from lenvm.model.prediction import trace_values
        from lenvm.reports.traces import TokenTrace, markdown_table

        if (prompt is None) == (trajectories is None) or (prompt is None) != (completion is None):
            raise InputError("give a PROMPT and a COMPLETION, or --trajectories FILE")
        if image and trajectories:
            raise InputError("--image goes with a PROMPT; trajectories name their own images")
        if jsonl and markdown:
            raise InputError("give --jsonl or --markdown, not both")
        if budget is not None and (jsonl or markdown):
            raise InputError("--budget goes with the table, not with --jsonl or --markdown")
        check_text("the prompt", prompt or "")
        check_text("the completion", completion or "")
        model = load_value_model(lenvm, device=pick_device(device))
        for prompt_ids, ids, complete, about in _read(
            model.tokenizer, prompt, completion, trajectories, limit, image or [], not cut
        ):
            pictures = about.get("images", ())
            states = trace_values(
                model, prompt_ids, ids, images=pictures, complete=complete, budget=budget
            )
            tokens = split_text(model.tokenizer, ids)
            if not (jsonl or markdown):
                _print_states(about["id"], tokens, states)
                continue
            name = name_value_model(lenvm)
            trace = TokenTrace.from_states(
                about.pop("prompt"), tokens, ids, states, model.config.gamma, model=name, **about
            )
            if jsonl:
                print(json.dumps(trace.to_json(), ensure_ascii=False))
            else:
                print(markdown_table(trace))


def _print_states(name: str, tokens: list[str], states: list[dict[str, Any]]) -> None:
    from lenvm.cli._console import print_table

    columns = [k for k in states[0] if k not in ("step", "remaining_true")]
    print_table(
        name,
        ["token", "step", *(HEADINGS.get(c, c) for c in columns), "true"],
        (
            [
                repr(token)[1:-1],
                state["step"],
                *(_shorten(state[c]) for c in columns),
                "-" if state["remaining_true"] is None else state["remaining_true"],
            ]
            for token, state in zip(["(prompt)", *tokens], states, strict=True)
        ),
        many=True,
    )


def _shorten(number: float) -> str:
    """Three digits, but whole tokens where there are more of them: 12740, not 1.27e+04."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _read(
    tokenizer: Any,
    prompt: str | None,
    completion: str | None,
    trajectories: Path | None,
    limit: int | None,
    images: list[str],
    complete: bool,
) -> Iterator[tuple[list[int], list[int], bool, dict[str, Any]]]:
    """(prompt ids, completion ids, complete, fields of a trace) of what was asked for."""
    from itertools import islice

    from lenvm.data.images import place_images, read_with_images, resolve_images
    from lenvm.data.prompts import Prompt
    from lenvm.errors import InputError
    from lenvm.model.tokenization import encode_prompt

    if trajectories is not None:
        for t in islice(read_with_images(trajectories), limit):
            about = {
                "id": t.id,
                "prompt": Prompt(messages=t.messages, prompt_text=t.prompt_text).text,
                "generator": t.model,
                "control": t.length_control,
                "finish_reason": t.finish_reason,
                "domain": t.domain,
                "images": t.images,
            }
            yield t.prompt_token_ids, t.completion_token_ids, t.is_complete, about
        return
    ids = list(tokenizer(completion, add_special_tokens=False).input_ids)
    if not ids:
        raise InputError("the completion is empty")
    if complete:
        ids.append(tokenizer.eos_token_id)
    images = resolve_images(images, Path())
    messages = place_images(Prompt.from_text(prompt or "", images=tuple(images)))
    about = {
        "id": "completion",
        "prompt": prompt,
        "finish_reason": "stop" if complete else "length",
        "images": images,
    }
    yield encode_prompt(tokenizer, messages), ids, complete, about
