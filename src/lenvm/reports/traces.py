"""`lenvm.trace/1`: one completion with what a value model expects at every state of it.

States are s_0 (the end of the prompt) .. s_L (all L tokens written): L + 1 numbers for L tokens.
The format is described in docs/evaluation.md. Pure Python: no model, no torch.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lenvm.errors import DataError
from lenvm.files import read_jsonl

SCHEMA = "lenvm.trace/1"
Finite = Annotated[float, Field(allow_inf_nan=False)]
Tokens = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TokenTrace(BaseModel):
    """One completion of L tokens. Columns over states have L + 1 entries, s_0 first."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["lenvm.trace/1"] = Field(alias="schema")
    prompt: str
    tokens: list[str] = Field(min_length=1)
    """Text of each token, [L]."""
    token_ids: list[int]
    """[L]"""
    gamma: float = Field(gt=0, lt=1)
    values: list[Annotated[float, Field(ge=-1, le=0)]]
    """V(s_0) .. V(s_L): [L + 1]. The terminal value of a complete answer is 0."""
    remaining_predicted: list[Tokens]
    """Predicted tokens to come: [L + 1]."""
    remaining_low: list[Tokens] | None = None
    remaining_high: list[Tokens] | None = None
    """Bounds of the central interval of probability `interval`: [L + 1], or none."""
    interval: float = Field(default=0.8, gt=0, lt=1)
    remaining_true: list[int] | None = None
    """L - t: [L + 1]; None where the answer was cut off, so that nobody knows."""
    model: str = ""
    """The value model, or the run that this is of."""
    generator: str = ""
    control: dict[str, Any] | None = None
    """The length control that the answer was written under."""
    finish_reason: str | None = None
    domain: str = ""
    id: str = ""
    images: list[str] = []
    """Image files of the prompt, relative to the trace file."""

    @model_validator(mode="before")
    @classmethod
    def _from_states(cls, row: Any) -> Any:
        """A row with `states` (one object per state, as `trace_values` returns) as columns."""
        if not isinstance(row, Mapping) or "states" not in row:
            return row
        states = row["states"]
        if not isinstance(states, Sequence) or not all(isinstance(s, Mapping) for s in states):
            raise ValueError("states must be a list of objects")
        about = {key: value for key, value in row.items() if key != "states"}
        return about | states_to_columns(states)

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        states = len(self.tokens) + 1
        if len(self.token_ids) != len(self.tokens):
            raise ValueError(f"{len(self.token_ids)} token_ids for {len(self.tokens)} tokens")
        if (self.remaining_low is None) != (self.remaining_high is None):
            raise ValueError("remaining_low and remaining_high go together")
        names = ("values", "remaining_predicted", "remaining_low", "remaining_high")
        for name in (*names, "remaining_true"):
            column = getattr(self, name)
            if column is not None and len(column) != states:
                raise ValueError(
                    f"{name} has {len(column)} entries; {len(self.tokens)} tokens have {states} "
                    "states, the prompt's end first"
                )
        return self

    @classmethod
    def from_states(
        cls,
        prompt: str,
        tokens: Sequence[str],
        token_ids: Sequence[int],
        states: Sequence[Mapping[str, Any]],
        gamma: float,
        **about: Any,
    ) -> Self:
        """From what `model.prediction.trace_values` returns; `about`: model, control, domain ..."""
        row = {"schema": SCHEMA, "prompt": prompt, "tokens": list(tokens), "gamma": gamma, **about}
        return cls.model_validate(row | {"token_ids": list(token_ids)} | states_to_columns(states))

    def to_json(self) -> dict[str, Any]:
        """The line of a trace file."""
        return self.model_dump(by_alias=True)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def gains(self) -> list[float]:
        """TD residuals with the sign turned, one per token: positive = longer than expected. [L]

        gain_t = (1 - gamma) - gamma V(s_t) + V(s_{t-1}), in units of the discounted return.
        """
        gamma, pairs = self.gamma, pairwise(self.values)
        return [(1 - gamma) - gamma * after + before for before, after in pairs]

    def length_gains(self) -> list[float]:
        """By how many tokens each token changes the predicted total length. [L]"""
        return [after + 1 - before for before, after in pairwise(self.remaining_predicted)]

    def relative_errors(self) -> list[float | None]:
        """(predicted - true) / true at each state; None where the truth is 0 or unknown. [L + 1]"""
        if self.remaining_true is None:
            return [None] * (self.length + 1)
        pairs = zip(self.remaining_predicted, self.remaining_true, strict=True)
        return [(p - t) / t if t else None for p, t in pairs]


def states_to_columns(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of a trace from one object per state: value, length, p10 and p90, remaining_true."""

    def column(name: str) -> list[Any]:
        return [state.get(name) for state in states]

    columns = {"values": column("value"), "remaining_predicted": column("length")}
    if states and "p10" in states[0]:
        columns |= {"remaining_low": column("p10"), "remaining_high": column("p90")}
    truth = column("remaining_true")
    return {**columns, "remaining_true": None if None in truth else truth}


def read_traces(path: Path) -> list[TokenTrace]:
    """All traces of a JSON-lines file. DataError names the line and what is wrong with it."""
    found = []
    for number, row in read_jsonl(path):
        try:
            found.append(TokenTrace.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            message = first["msg"].removeprefix("Value error, ")
            got = json.dumps(first["input"], default=str)[:80] if first["loc"] else ""
            raise DataError(
                f"{path}:{number}: not a {SCHEMA} trace: {where}: {message}"
                + (f"; got {got}" if got else "")
            ) from None
    if not found:
        raise DataError(f"{path} holds no trace; `lenvm values --jsonl` writes them")
    return found


def markdown_table(trace: TokenTrace) -> str:
    """Step, token, value, predicted length, true length, relative error, as Markdown."""
    lines = [
        "| step | token | value | predicted | true | relative error |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    truth: Sequence[int | None] = trace.remaining_true or [None] * (trace.length + 1)
    rows = zip(
        ["(prompt)", *(f"`{_in_cell(t)}`" for t in trace.tokens)],
        trace.values,
        trace.remaining_predicted,
        truth,
        trace.relative_errors(),
        strict=True,
    )
    for step, (token, value, predicted, true, error) in enumerate(rows):
        known = "-" if true is None else str(true)
        share = "-" if error is None else f"{error:+.1%}"
        lines.append(f"| {step} | {token} | {value:.4f} | {predicted:.1f} | {known} | {share} |")
    return "\n".join(lines) + "\n"


def _in_cell(token: str) -> str:
    """A token inside backticks in a table cell, on one line, white space visible."""
    shown = make_visible(token).replace("\n", "").replace(" ", "␣")
    return shown.replace("`", "\u02cb").replace("|", "\\|")


JOINERS = "\u200c\u200d"
INVISIBLE = {0xAD, 0x61C, 0x180E, 0xFEFF, *range(0x200B, 0x2010), *range(0x2028, 0x202F)}
INVISIBLE |= {*range(0x80, 0xA0), *range(0x2060, 0x2070)}
INVISIBLE -= {ord(c) for c in JOINERS}
VISIBLE = {c: chr(0x2400 + c) for c in range(0x20)} | {c: f"⟨{c:04X}⟩" for c in INVISIBLE}
VISIBLE |= {0x0A: "⏎\n", 0x09: "⇥\t", 0x0D: "␍", 0x7F: "␡"}


def make_visible(token: str) -> str:
    """A token as a person should see it: line ends, tabs, control and direction marks shown.

    A line end keeps its break, a space stays a space. Joiners (emoji, Persian) are left alone
    unless the token holds nothing else. A token without text (the first bytes of a character that
    a later token ends) is ⋯.
    """
    if not token.strip(JOINERS):
        return "".join(f"⟨{ord(c):04X}⟩" for c in token) or "⋯"
    return token.translate(VISIBLE)
