"""The trajectory: one completion of one prompt, as it is stored, one JSON line each.

Token ids are what the model saw and wrote; nothing is re-tokenised later. `finish_reason` decides
whether the length is known ("stop": the completion ended by itself, its last token is the ending
token) or only a lower bound (anything else: censored).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lenvm.errors import DataError
from lenvm.files import read_lines

SCHEMA = "lenvm.trajectory/1"


class Trajectory(BaseModel):
    """One completion. `id` is unique in a file: `<prompt_hash>-<sample_index>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["lenvm.trajectory/1"] = Field("lenvm.trajectory/1", alias="schema")
    id: str
    prompt_hash: str
    """Hash of the normalised prompt: what duplicates, splits and clusters go by."""
    sample_index: int = Field(ge=0)
    domain: str = "unknown"
    """What errors are reported by: math, code, instructions, ..."""
    split: Literal["train", "validation", "test"] = "train"
    messages: list[dict[str, Any]] | None = None
    """Chat messages of the prompt (content may hold image parts); None for plain text."""
    prompt_text: str | None = None
    """The prompt where there are no messages."""
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    completion_text: str
    finish_reason: str
    usage: dict[str, int] | None = None
    """prompt_tokens and completion_tokens as the server counted them."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """temperature, top_p, top_k, min_p, seed, max_tokens, n."""
    length_control: dict[str, Any] | None = None
    """The LengthControl that guided this completion, for on-policy refinement; None = unguided."""
    reward: float | None = None
    """How good the answer is, by any measure, such as 1.0 for right and 0.0 for wrong; None: nobody
    said. `lenvm grade` writes it, `lenvm train` reads it with `rewards_below`."""
    model: str
    images: list[str] = Field(default_factory=list)
    """Image files, relative to the JSONL file or absolute."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Fields of the source row (answer, tests, ...)."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.prompt_token_ids:
            raise ValueError("prompt_token_ids is empty; a value needs at least one prompt token")
        if not self.completion_token_ids:
            raise ValueError("completion_token_ids is empty; there is at least an ending token")
        return self

    @property
    def length(self) -> int:
        """Generated tokens, the ending token counted."""
        return len(self.completion_token_ids)

    @property
    def is_complete(self) -> bool:
        """True when the length is the answer's own, False when it was cut off (censored)."""
        return self.finish_reason == "stop"

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)

    def to_json_line(self) -> bytes:
        """The line of a trajectory file, without its newline."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


def read_trajectories(*paths: Path) -> Iterator[Trajectory]:
    """Stream the trajectories of JSONL files in order. DataError names file, line and field.

    An unfinished last line (its writer was killed) is passed over.
    """
    for path in paths:
        empty = True
        for number, line in read_lines(path):
            empty = False
            try:
                trajectory = Trajectory.model_validate_json(line)
            except ValidationError as error:
                if not line.endswith(b"\n") and error.errors()[0]["type"] == "json_invalid":
                    break
                raise DataError(f"{path}:{number}: {_describe(error, line)}") from None
            if "schema_" not in trajectory.model_fields_set:
                raise DataError(f"{path}:{number}: schema is None, expected {SCHEMA!r}")
            yield trajectory
        if empty:
            raise DataError(f"{path} holds no trajectories")


def _describe(error: ValidationError, line: bytes) -> str:
    """The first problem of a row, another schema before all others."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    row = json.loads(line)
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    if row.get("schema") != SCHEMA:
        return f"schema is {row.get('schema')!r}, expected {SCHEMA!r}"
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
