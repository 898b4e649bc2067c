"""Prompts from files, hubs and the package: one record, one normalisation, one split.

JSON, JSONL, CSV, Parquet and plain text (a prompt per line); names of `datasets` on a hub; the
published system's data sets by name. Duplicates go by normalised text, and a prompt's split is a
function of its hash alone, so that no prompt is ever on two sides.
"""

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lenvm.errors import DataError, InputError
from lenvm.files import read_json, read_jsonl

Split = Literal["train", "validation", "test"]
TEXT_FIELDS = ("messages", "prompt", "question", "problem", "instruction", "text", "input")
BUNDLED = Path(__file__).parent / "bundled_prompts" / "demo.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt: chat messages, or plain text that is fed as it is."""

    messages: list[dict[str, Any]] | None = None
    prompt_text: str | None = None
    domain: str = "unknown"
    split: Split = "train"
    images: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str, **fields: Any) -> "Prompt":
        """A user's message. InputError for an empty one."""
        if not text.strip():
            raise InputError("the prompt is empty")
        return cls(messages=[{"role": "user", "content": text}], **fields)

    @property
    def conversation(self) -> str | list[dict[str, Any]]:
        """What `encode_prompt` takes."""
        return self.messages if self.messages is not None else (self.prompt_text or "")

    @property
    def text(self) -> str:
        """The words of the prompt, roles and images left out."""
        if self.messages is None:
            return self.prompt_text or ""
        return "\n".join(_content_text(m.get("content")) for m in self.messages)

    @property
    def prompt_hash(self) -> str:
        """16 hex digits of the normalised text (case and white space folded) and the images."""
        normal = " ".join(self.text.casefold().split()) + "\0".join(("", *self.images))
        return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_bundled_prompts() -> list[Prompt]:
    """The prompts in the package: math, code and instructions (see bundled_prompts/SOURCES.md)."""
    return load_prompts(str(BUNDLED))


def load_prompts(
    source: str,
    *,
    field_name: str | None = None,
    domain: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    keep: Callable[[Prompt], bool] = lambda _: True,
    validation: float = 0.1,
    test: float = 0.1,
    hub_split: str = "train",
) -> list[Prompt]:
    """Prompts of a file or a hub data set (`owner/name`), in order, without duplicates.

    field_name: the field that holds the prompt (default: the first there of `messages`, `prompt`,
    `question`, `problem`, `instruction`, `text`, `input`). seed shuffles before `limit`. A row's
    own `split` is kept; others are split by hash. Raises DataError with file and line.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError(
            f"validation {validation} and test {test} are shares of the prompts: each from 0, "
            "together below 1"
        )
    found: dict[str, Prompt] = {}
    for where, row in read_rows(source, hub_split):
        prompt = _to_prompt(row, where, field_name, domain)
        if "split" not in row:
            prompt = replace(prompt, split=split_of(prompt.prompt_hash, validation, test))
        if keep(prompt):
            found.setdefault(prompt.prompt_hash, prompt)
    if not found:
        raise DataError(f"{source} holds no prompts")
    prompts = list(found.values())
    if seed is not None:
        random.Random(seed).shuffle(prompts)
    return prompts[:limit]


def split_of(prompt_hash: str, validation: float, test: float) -> Split:
    """The side of a prompt: a function of its hash alone."""
    at = int(hashlib.sha256(f"split/{prompt_hash}".encode()).hexdigest()[:8], 16) / 2**32
    if at < test:
        return "test"
    return "validation" if at < test + validation else "train"


def _to_prompt(row: dict[str, Any], where: str, name: str | None, domain: str | None) -> Prompt:
    names = [name] if name else [n for n in TEXT_FIELDS if n in row]
    if not names or names[0] not in row:
        raise DataError(
            f"{where}: no prompt: looked for {name or ', '.join(TEXT_FIELDS)}; the fields are "
            f"{', '.join(row) or '(none)'}"
        )
    value = row[names[0]]
    split = row.get("split", "train")
    if split not in ("train", "validation", "test"):
        raise DataError(f"{where}: split is {split!r}; allowed: train, validation, test")
    rest = {k: v for k, v in row.items() if k not in (names[0], "split", "domain", "images")}
    common: dict[str, Any] = {
        "domain": domain or str(row.get("domain", "unknown")),
        "split": split,
        "images": tuple(row.get("images") or ()),
        "metadata": rest,
    }
    if isinstance(value, list):
        for message in value:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise DataError(f"{where}: a message needs role and content; got {message!r}")
        if not value:
            raise DataError(f"{where}: messages are empty")
        return Prompt(messages=value, **common)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {names[0]} must be text or messages; got {value!r}")
    if names[0] == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        value = f"{value}\n\n{row['input']}"
    return Prompt.from_text(value, **common)


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))


def read_rows(source: str, hub_split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for error messages, row) of a source, duplicates and all.

    A hub name is `owner/name`, or `owner/name:config` where a data set has configurations.
    """
    path = Path(source)
    readers: dict[str, Callable[[Path], Iterable[tuple[str, Any]]]] = {
        ".jsonl": lambda p: ((f"{p}:{n}", row) for n, row in read_jsonl(p)),
        ".json": _read_json_rows,
        ".csv": _read_csv_rows,
        ".parquet": _read_parquet_rows,
        ".txt": _read_text_rows,
    }
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"no prompt file {path}")
        rows = readers[path.suffix](path)
    elif path.exists() or source.count("/") != 1:
        raise DataError(
            f"{source}: not a prompt file; known are {', '.join(readers)} and hub names OWNER/NAME"
        )
    else:
        rows = _read_hub_rows(source, hub_split)
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        yield where, row


def _read_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    data = read_json(path)
    if not isinstance(data, list):
        raise DataError(f"{path}: expected a list of objects, got {type(data).__name__}")
    yield from ((f"{path}[{i}]", row) for i, row in enumerate(data))


def _read_csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        try:
            for row in (reader := csv.DictReader(file, strict=True)):
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: not as many columns as the header has")
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not CSV: {error}") from None


def _read_parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not Parquet: {error}") from None


def _read_text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line}


def _read_hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name} is a hub name, and reading it needs the package `datasets`: pip install datasets"
        ) from None
    name, _, config = name.partition(":")
    rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
    yield from (
        (f"{name}[{i}]", json.loads(json.dumps(row, default=str))) for i, row in enumerate(rows)
    )
