"""`lenvm values`: what the model expects at every token of a completion."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


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
        limit: Annotated[int | None, typer.Option(min=1)] = None,
        jsonl: Annotated[bool, typer.Option("--jsonl", help="JSON lines, not a table.")] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    ) -> None:
        """Predicted tokens to come at every token of an answer."""
        from lenvm.cli._console import print_table
        from lenvm.cli._inputs import load_value_model
        from lenvm.errors import InputError
        from lenvm.model.device import pick_device
        from lenvm.model.prediction import trace_values

        if (prompt is None) == (trajectories is None) or (prompt is None) != (completion is None):
            raise InputError("give a PROMPT and a COMPLETION, or --trajectories FILE")
        if image and trajectories:
            raise InputError("--image goes with a PROMPT; trajectories name their own images")
        model = load_value_model(lenvm, device=pick_device(device))
        for name, prompt_ids, ids, images, complete in _read(
            model.tokenizer, prompt, completion, trajectories, limit, image or [], not cut
        ):
            states = trace_values(model, prompt_ids, ids, images=images, complete=complete)
            tokens = [model.tokenizer.decode([i]) for i in ids]
            if jsonl:
                row = {"id": name, "tokens": tokens, "token_ids": ids, "states": states}
                print(json.dumps(row, ensure_ascii=False))
            else:
                columns = [k for k in states[0] if k not in ("step", "remaining_true")]
                print_table(
                    name,
                    ["token", "step", *columns, "true"],
                    (
                        [
                            repr(token)[1:-1],
                            state["step"],
                            *(f"{state[c]:.4g}" for c in columns),
                            "-" if state["remaining_true"] is None else state["remaining_true"],
                        ]
                        for token, state in zip(["(prompt)", *tokens], states, strict=True)
                    ),
                )


def _read(
    tokenizer: Any,
    prompt: str | None,
    completion: str | None,
    trajectories: Path | None,
    limit: int | None,
    images: list[str],
    complete: bool,
) -> Any:
    """(name, prompt ids, completion ids, image files, complete) of what was asked for."""
    from itertools import islice

    from lenvm.data.images import place_images, read_with_images
    from lenvm.data.prompts import Prompt
    from lenvm.errors import InputError
    from lenvm.model.tokenization import encode_prompt

    if trajectories is not None:
        for t in islice(read_with_images(trajectories), limit):
            yield t.id, t.prompt_token_ids, t.completion_token_ids, t.images, t.is_complete
        return
    ids = list(tokenizer(completion, add_special_tokens=False).input_ids)
    if not ids:
        raise InputError("the completion is empty")
    if complete:
        ids.append(tokenizer.eos_token_id)
    messages = place_images(Prompt.from_text(prompt or "", images=tuple(images)))
    yield "completion", encode_prompt(tokenizer, messages), ids, images, complete
