"""The trajectory: one completion of one prompt, as it is stored, one JSON line each.

Token ids are what the model saw and wrote; nothing is re-tokenised later. `finish_reason` decides
whether the length is known ("stop": the completion ended by itself, its last token is the ending
token) or only a lower bound (anything else: censored).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
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
        empty, number = True, 0
        for number, line in read_lines(path):
            try:
                trajectory = Trajectory.model_validate_json(line)
            except ValidationError as error:
                if not line.endswith(b"\n") and error.errors()[0]["type"] == "json_invalid":
                    break
                raise DataError(f"{path}:{number}: {_describe(error, line)}") from None
            if "schema_" not in trajectory.model_fields_set:
                raise DataError(f"{path}:{number}: schema is None, expected {SCHEMA!r}")
            empty = False
            yield trajectory
        if empty and number:
            raise DataError(
                f"{path} holds no trajectories, only an unfinished line: its writer was stopped in "
                "the first one, or it is no file of JSON lines; run `lenvm sample` again or name "
                "another file"
            )
        if empty:
            raise DataError(f"{path} holds no trajectories")


class IdCheck:
    """Looks for completions of a file whose id another one before has: an id is unique in a file.
    Two files may share ids, as two runs over the same prompts do."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_repeated, self.first = path, 0, ""
        self._seen: set[int] = set()

    def watch(self, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """The same trajectories."""
        for t in trajectories:
            key = hash_text(t.id)
            if key in self._seen:
                self.num_repeated += 1
                self.first = self.first or t.id
            self._seen.add(key)
            yield t

    @property
    def warning(self) -> str:
        """What to tell; empty where all is well."""
        return describe_repeated(self.path, self.num_repeated, self.first)


def describe_repeated(path: Path, num_repeated: int, first: str) -> str:
    """A warning of repeated ids; empty for none."""
    if not num_repeated:
        return ""
    return (
        f"{path}: {num_repeated} completions have an id that an earlier line has (the first is "
        f"{first}); each counts and trains as often as it stands there. Remove the repeated lines; "
        "keep the completions of another run in a file of its own"
    )


def hash_text(text: str) -> int:
    """A text as a signed 64-bit number."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


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
