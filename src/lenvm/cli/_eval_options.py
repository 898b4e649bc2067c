"""Options that the `lenvm eval` commands share, and what they build."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenvm.errors import InputError

if TYPE_CHECKING:
    from lenvm.evals.generator import Generator

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")]
EndpointUrl = Annotated[
    str | None, typer.Option("--endpoint", help="Server, http://HOST:PORT/v1; none = in-process.")
]
Engine = Annotated[
    str, typer.Option(help="Wire form: auto, lenvm, vllm, sglang or openai (no control).")
]
Model = Annotated[
    str | None, typer.Option(help="Model on the server; without one a folder, hub id or GGUF.")
]
ValueModel = Annotated[str | None, typer.Option("--lenvm", help="Value model folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="The server model's tokenizer, for arms that need its EOS or count text."),
]
ApiKeyVariable = Annotated[
    str, typer.Option(help="Environment variable that holds the server's API key.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight.")]
TimeoutS = Annotated[float, typer.Option(min=1, help="Seconds that one answer may take.")]
Temperature = Annotated[float, typer.Option(min=0)]
TopP = Annotated[float, typer.Option(min=1e-9, max=1)]
TopK = Annotated[int, typer.Option(min=0, help="0 = no limit.")]
MinP = Annotated[float, typer.Option(min=0, max=1)]
Seed = Annotated[int | None, typer.Option(help="None: the server's choice.")]
FrequencyPenalty = Annotated[float, typer.Option(min=-2, max=2, help="0 = none.")]
PresencePenalty = Annotated[float, typer.Option(min=-2, max=2, help="0 = none.")]
RepetitionPenalty = Annotated[float, typer.Option(min=1e-9, max=10, help="1 = none.")]
Samples = Annotated[int, typer.Option(min=1, help="Answers per item and arm.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only this many items.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="The same for every arm.")]
Control = Annotated[
    str | None,
    typer.Option(
        help='Settings of all LenVM arms as JSON: {"tolerance": 0.05, "min_entropy": 0.1}'
    ),
]
Regrade = Annotated[bool, typer.Option("--regrade", help="Grade the records again; ask nobody.")]


@dataclass(frozen=True)
class Access:
    """How answers are got: the options above in one place."""

    endpoint: str | None
    engine: str
    model: str | None
    lenvm: str | None
    device: str | None
    tokenizer: str | None
    api_key_variable: str
    concurrency: int
    timeout_s: float

    def connect(self) -> "Generator":
        """The generator of these options: a server, or the engine in this process."""
        return self._connect_server() if self.endpoint else self._load_engine()

    def _connect_server(self) -> "Generator":
        from lenvm.cli._console import console
        from lenvm.evals.client import connect
        from lenvm.evals.probe import describe

        assert self.endpoint is not None
        if self.lenvm:
            raise InputError("--lenvm is for the in-process engine; a server has its own")
        counter: Callable[[str], int] | None = None
        eos: tuple[int, ...] = ()
        if self.tokenizer:
            from lenvm.model.bundled import resolve_model
            from lenvm.model.tokenization import find_eos_token_ids, load_tokenizer

            path = resolve_model(self.tokenizer)
            tokenizer = load_tokenizer(path)
            eos = tuple(find_eos_token_ids(path, tokenizer))

            def count(text: str) -> int:
                return len(tokenizer(text, add_special_tokens=False).input_ids)

            counter = count
        generator = connect(
            self.endpoint,
            model=self.model,
            engine=self.engine,
            api_key=os.environ.get(self.api_key_variable, "none"),
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            eos_token_ids=eos,
            token_counter=counter,
        )
        console().print(describe(generator.endpoint), markup=False)
        return generator

    def _load_engine(self) -> "Generator":
        from lenvm.cli._engine_generator import EngineGenerator
        from lenvm.cli._inputs import load_value_model
        from lenvm.engines.transformers import TransformersEngine
        from lenvm.guidance.request import MAX_CANDIDATES
        from lenvm.model.device import pick_device, pick_dtype

        device, name = pick_device(self.device), self.model or "smollm2"
        engine = TransformersEngine.load(
            name,
            load_value_model(self.lenvm, device=device) if self.lenvm else None,
            device=device,
            dtype=pick_dtype(device),
            max_requests=self.concurrency,
            max_candidates=MAX_CANDIDATES,
        )
        return EngineGenerator(engine, Path(name).name)


def parse_control_settings(text: str | None) -> dict[str, Any]:
    """`--control`: fields of LengthControl that are no goal. InputError names what is wrong."""
    import json

    from lenvm.evals.arms import TARGETS
    from lenvm.guidance.request import LengthControl

    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InputError(f"--control is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"--control is {text}; expected an object such as {{'top_k': 15}}")
    goals = (TARGETS | {"rule"}) & fields.keys()
    if "rule" in goals:
        raise InputError(
            f"--control sets rule {fields['rule']!r}; an arm names its rule: --arm "
            f"{fields['rule']} in lifebench, --arm 'at_most:200 rule={fields['rule']}' in tradeoff"
        )
    if goals:
        raise InputError(f"--control sets {', '.join(sorted(goals))}; the arms set these")
    LengthControl.parse({**fields, "equal_to": 1})
    return fields


def format_interval(interval: dict[str, Any] | None, style: str = ".1f") -> str:
    """`62.6% [61.0, 64.1]`: the estimate and its bounds, where there are enough clusters for
    bounds; - where there is none."""
    if interval is None:
        return "-"
    if interval["low"] is None:
        return format(interval["value"], style)
    value, low, high = (format(interval[k], style) for k in ("value", "low", "high"))
    return f"{value} [{low.rstrip('%')}, {high.rstrip('%')}]"


def print_notes(summary: dict[str, Any], output: Path) -> None:
    """The summary's sentences, its failures, and where the results are; on standard error."""
    from lenvm.cli._console import console

    for note in summary["notes"]:
        console().print(f"note: {note}", markup=False)
    if summary["num_failed"]:
        console().print(
            f"{summary['num_failed']} of {summary['num_records']} requests failed and score "
            "as failures; run the same command again to retry them"
        )
    console().print(f"results in {output}", markup=False)
