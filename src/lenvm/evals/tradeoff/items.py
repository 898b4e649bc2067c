"""Benchmark questions with gold answers, from files of the usual shapes or by name from a hub.

Fields are found by name, whatever their case: the question (`question`, `problem`, `query`,
`prompt`), the answer (`answer`, `final_answer`, `solution`; GSM8K's stands after `####`), `options`
or `choices`, `image`, `id` or `unique_id` or `pid`.
"""

import base64
import hashlib
import io
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lenvm.data.prompt_sources import read_hub_rows, read_rows
from lenvm.errors import DataError, InputError
from lenvm.evals.tradeoff.grader import Kind, gold_letter, guess_kind

QUESTION = ("question", "problem", "query", "prompt")
ANSWER = ("answer", "final_answer", "expected_answer", "gold", "solution")
OPTIONS = ("options", "choices")
NAME = ("id", "unique_id", "pid")
BENCHMARKS: dict[str, tuple[str, str, str | None]] = {
    "gsm8k": ("openai/gsm8k", "test", "main"),
    "math500": ("HuggingFaceH4/MATH-500", "test", None),
    "aime24": ("HuggingFaceH4/aime_2024", "train", None),
    "aime25": ("math-ai/aime25", "test", None),
    "amc23": ("math-ai/amc23", "test", None),
    "mathvista": ("AI4Math/MathVista", "testmini", None),
    "mathvision": ("MathLLMs/MathVision", "testmini", None),
}
"""Names that stand for hub data sets: (data set, split, configuration)."""


class Gold(NamedTuple):
    """A gold answer as the grader takes it."""

    gold: str
    kind: Kind
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One question and its gold answer."""

    id: str
    question: str
    gold: str
    kind: Kind
    options: tuple[str, ...] = ()
    image: str | None = None
    """An image file, or an image as a data URL."""

    def prompt(self, *, concise: bool) -> str:
        """The question, its options, and how the answer is to be given."""
        parts = [self.question.replace("<image1>", "").strip()]
        if self.options and any(len(option) > 1 for option in self.options):
            letters = (chr(ord("A") + i) for i in range(len(self.options)))
            parts.append("\n".join(f"{a}. {o}" for a, o in zip(letters, self.options, strict=True)))
        what = "the letter of the right choice" if self.kind == "choice" else "your final answer"
        how = (
            "Be concise: reason in as few words as you can"
            if concise
            else "Please reason step by step"
        )
        parts.append(f"{how}, and put {what} within \\boxed{{}}.")
        return "\n\n".join(parts)

    def messages(self, *, concise: bool) -> tuple[Mapping[str, Any], ...]:
        """The chat messages; an image travels inside, as a data URL."""
        text = self.prompt(concise=concise)
        if self.image is None:
            return ({"role": "user", "content": text},)
        picture = {"type": "image_url", "image_url": {"url": _image_url(self.image)}}
        return ({"role": "user", "content": [picture, {"type": "text", "text": text}]},)


def load_questions(source: str, *, limit: int | None = None) -> list[Question]:
    """Questions of a file, a name of BENCHMARKS, or a hub data set. DataError names the line."""
    if source.lower() in BENCHMARKS:
        rows = read_hub_rows(*BENCHMARKS[source.lower()])
    else:
        rows = read_rows(source, "test")
    base = Path(source).parent
    found: dict[str, Question] = {}
    for index, (where, row) in enumerate(rows):
        if limit is not None and index >= limit:
            break
        question = _to_question(where, index, row, base)
        if question.id in found:
            raise DataError(f"{where}: id {question.id!r} occurs twice; ids must be unique")
        found[question.id] = question
    if not found:
        raise DataError(f"{source} holds no questions")
    return list(found.values())


def find_gold(row: Mapping[str, Any]) -> Gold | None:
    """The gold answer among a row's fields; None where no field of ANSWER holds one.

    Raises InputError where it is none of the row's options, or these are no list.
    """
    fields = {key.lower(): value for key, value in row.items()}
    found = _first(fields, ANSWER)
    gold = "" if found is None else str(found).rsplit("####", 1)[-1].strip()
    if not gold:
        return None
    listed = _first(fields, OPTIONS) or ()
    if not isinstance(listed, list | tuple):
        raise InputError(f"the options are {listed!r:.80}; they must be a list")
    options = tuple(str(option) for option in listed)
    kind = guess_kind(gold, options)
    return Gold(gold_letter(gold, options) if kind == "choice" else gold, kind, options)


def hash_questions(questions: list[Question]) -> str:
    """16 hex digits over all questions and gold answers."""
    return hashlib.sha256(repr(questions).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _to_question(where: str, index: int, row: dict[str, Any], base: Path) -> Question:
    fields = {key.lower(): value for key, value in row.items()}
    text = _first(fields, QUESTION)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no question; looked for {', '.join(QUESTION)}")
    try:
        gold = find_gold(row)
    except InputError as error:
        raise DataError(f"{where}: {error}") from None
    if gold is None:
        raise DataError(f"{where}: no answer; looked for {', '.join(ANSWER)}")
    name = _first(fields, NAME)
    return Question(
        id=str(name if name is not None else index),
        question=text,
        image=_find_image(where, fields, base),
        **gold._asdict(),
    )


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _find_image(where: str, fields: Mapping[str, Any], base: Path) -> str | None:
    """A file, or what a hub's row holds itself (MathVista's `image` names a file that only its
    archive has; the picture stands beside it)."""
    for value in (fields.get("decoded_image"), fields.get("image")):
        if isinstance(value, Mapping) and value.get("bytes"):
            return _to_data_url(value["bytes"], mimetypes.guess_type(str(value.get("path")))[0])
        if value is not None and hasattr(value, "save"):  # PIL's
            buffer = io.BytesIO()
            value.convert("RGB").save(buffer, "PNG")
            return _to_data_url(buffer.getvalue(), "image/png")
    value = fields.get("image")
    if not value:
        return None
    path = base / str(value)
    if not path.is_file():
        raise DataError(f"{where}: image {value!r} is not at {path}; leave its question out")
    return str(path)


def _image_url(image: str) -> str:
    return image if image.startswith("data:") else _read_image(image)


@cache
def _read_image(path: str) -> str:
    return _to_data_url(Path(path).read_bytes(), mimetypes.guess_type(path)[0])


def _to_data_url(data: bytes, kind: str | None) -> str:
    return f"data:{kind or 'image/jpeg'};base64,{base64.b64encode(data).decode()}"
