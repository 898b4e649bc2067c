"""Prompts: one record, one normalisation, one split, whatever file or hub they come from.

Duplicates go by normalised text, and a prompt's split is a function of its hash alone, so that no
prompt is ever on two sides. Readers of the file formats are in `prompt_sources`, the published data
sets with their prompt forms in `prompt_sets`.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from lenvm.data.prompt_sets import PROMPT_SETS, find_prompt_set
from lenvm.data.prompt_sources import read_rows, resolve_image
from lenvm.errors import DataError, InputError

Split = Literal["train", "validation", "test"]
TEXT_FIELDS = ("messages", "prompt", "question", "problem", "instruction", "text", "input")
FIELDS = ("prompt", "domain", "split", "images")
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})
BUNDLED = Path(__file__).parent / "bundled_prompts" / "demo.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt: chat messages, or plain text that is fed as it is."""

    messages: list[dict[str, Any]] | None = None
    prompt_text: str | None = None
    domain: str = "unknown"
    split: Split = "train"
    images: tuple[str, ...] = ()
    """Image files (absolute paths where they come from a file), or http(s) addresses."""
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

    @cached_property
    def prompt_hash(self) -> str:
        """16 hex digits of the normalised text (case and white space folded) and the image names
        (file and folder: the same wherever the data set lies)."""
        names = ["/".join(Path(image).parts[-2:]) for image in self.images]
        normal = " ".join(self.text.casefold().split()) + "\0".join(("", *names))
        return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_bundled_prompts() -> list[Prompt]:
    """The prompts in the package: math, code and instructions (see bundled_prompts/SOURCES.md)."""
    return load_prompts(str(BUNDLED))


def load_prompts(
    source: str,
    *,
    field_name: str | None = None,
    fields: Mapping[str, str] | None = None,
    domain: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    keep: Callable[[Prompt], bool] = lambda _: True,
    validation: float = 0.1,
    test: float = 0.1,
    hub_split: str = "train",
    plain: bool = False,
    image_dir: Path | None = None,
    counts: Counter[str] | None = None,
) -> list[Prompt]:
    """Prompts of a source, in order, without duplicates.

    source: a file (.json, .jsonl, .csv, .parquet; .txt has one prompt a line), a folder of text
    files (one prompt each), `bundled`, a hub data set `OWNER/NAME`, or one of the published sets by
    name (`prompt_sets.PROMPT_SETS`), `NAME:FILE` for a local copy of its rows.

    fields: which field of the rows is the `prompt`, `domain`, `split` or `images`; `field_name` is
    short for the first (default: the first there of `messages`, `prompt`, `question`, `problem`,
    `instruction`, `text`, `input`). A row's own split is kept; others are split by hash. plain:
    texts are fed as they are, not as a user's message. image_dir: where embedded images are saved.
    seed shuffles before `limit`. counts: gets rows, duplicates, filtered and unusable.

    Raises DataError with file and line, InputError for options that cannot be.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError(
            f"validation {validation} and test {test} are shares of the prompts: each from 0, "
            "together below 1"
        )
    names = {**dict(fields or {}), **({"prompt": field_name} if field_name else {})}
    if unknown := [name for name in names if name not in FIELDS]:
        raise InputError(f"no prompt has a {unknown[0]!r}; fields are mapped for {FIELDS}")
    counts = Counter() if counts is None else counts
    found: dict[str, Prompt] = {}
    for prompt, pinned in _iterate(source, names, domain, hub_split, plain, image_dir, counts):
        if not pinned:
            prompt = replace(prompt, split=split_of(prompt.prompt_hash, validation, test))
        if not keep(prompt):
            counts["filtered"] += 1
        elif found.setdefault(prompt.prompt_hash, prompt) is not prompt:
            counts["duplicates"] += 1
        elif seed is None and len(found) == limit:
            break
    if not found:
        why = ", ".join(f"{n} {what}" for what, n in counts.items())
        raise DataError(f"{source} holds no prompts" + (f" ({why})" if why else ""))
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


def shard_of(prompts: list[Prompt], index: int, count: int) -> list[Prompt]:
    """The `index`-th (from 0) of `count` disjoint parts, for several processes or machines."""
    if not 0 <= index < count:
        raise InputError(f"shard {index}/{count}: the first number is from 0, below the second")
    return [p for p in prompts if int(p.prompt_hash, 16) % count == index]


def _iterate(
    source: str,
    names: Mapping[str, str],
    domain: str | None,
    hub_split: str,
    plain: bool,
    image_dir: Path | None,
    counts: Counter[str],
) -> Iterator[tuple[Prompt, bool]]:
    """(prompt, whether its row pins its split) for every row."""
    source = str(BUNDLED) if source == "bundled" else source
    published = find_prompt_set(source)
    if published is None and "/" not in source and not Path(source).exists() and "." not in source:
        raise DataError(
            f"{source}: no such file, and not one of the known sets: {', '.join(PROMPT_SETS)}"
        )
    form, schema = None, ""
    rows = read_rows(source, hub_split)
    if published is not None:
        form, domain = published, domain or published.domain
        rows = published.read_rows(source)
    base = Path(source).parent
    for where, row in rows:
        counts["rows"] += 1
        if form is not None:
            filled = form.fill(row, where)
            if filled is None:
                counts["unusable"] += 1
                continue
            row = filled
        name = _prompt_field(row, where, names.get("prompt"), schema)
        schema = name
        yield (
            _to_prompt(row, where, name, names, domain, plain, base, image_dir),
            names.get("split", "split") in row,
        )


def _prompt_field(row: dict[str, Any], where: str, name: str | None, schema: str) -> str:
    """The field that holds the prompt: the one of the rows before, where there were any."""
    there = [n for n in ((name,) if name else TEXT_FIELDS) if n in row]
    if schema and schema not in row:
        raise DataError(
            f"{where}: mixed schema: the rows before have the prompt in {schema!r}; the fields "
            f"here are {', '.join(map(str, row)) or '(none)'}"
        )
    if not there:
        raise DataError(
            f"{where}: no prompt: looked for {name or ', '.join(TEXT_FIELDS)}; the fields are "
            f"{', '.join(map(str, row)) or '(none)'}"
        )
    return schema or there[0]


def _to_prompt(
    row: dict[str, Any],
    where: str,
    name: str,
    names: Mapping[str, str],
    domain: str | None,
    plain: bool,
    base: Path,
    image_dir: Path | None,
) -> Prompt:
    value = row[name]
    split = row.get(names.get("split", "split"), "train")
    if split not in get_args(Split):
        raise DataError(f"{where}: split is {split!r}; allowed: train, validation, test")
    image_field = names.get("images") or ("images" if "images" in row else "image")
    images = row.get(image_field) or []
    used = {name, names.get("split", "split"), names.get("domain", "domain"), image_field}
    common: dict[str, Any] = {
        "domain": domain or str(row.get(names.get("domain", "domain"), "unknown")),
        "split": split,
        "images": tuple(
            resolve_image(image, base, image_dir, where)
            for image in (images if isinstance(images, list) else [images])
        ),
        "metadata": _to_json({k: v for k, v in row.items() if k not in used}),
    }
    if name == "messages" and isinstance(value, str):  # a CSV cell
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list):
        return Prompt(messages=_check_messages(value, where), **common)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name} must be text or messages; got {value!r:.80}")
    if name == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        value = f"{value}\n\n{row['input']}"
    if plain:
        return Prompt(prompt_text=value, **common)
    return Prompt.from_text(value, **common)


def _check_messages(messages: list[Any], where: str) -> list[dict[str, Any]]:
    """Chat messages as they are. DataError for what is none."""
    if not messages:
        raise DataError(f"{where}: messages are empty")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: a message needs role and content; got {message!r:.80}")
        if unknown := message.keys() - MESSAGE_KEYS:
            raise DataError(
                f"{where}: a message has the unknown key {sorted(unknown)[0]!r}; allowed: "
                f"{', '.join(sorted(MESSAGE_KEYS))}"
            )
        if message["role"] not in ROLES:
            raise DataError(f"{where}: role is {message['role']!r}; allowed: {', '.join(ROLES)}")
    if not any(_content_text(m["content"]).strip() for m in messages):
        raise DataError(f"{where}: the messages hold no text")
    return messages


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))


def _to_json(row: dict[str, Any]) -> dict[str, Any]:
    """Metadata that a JSON line can hold (dates of a Parquet file become text)."""
    return json.loads(json.dumps(row, default=str))  # type: ignore[no-any-return]
