"""The data sets of the published system by name, with the prompt forms that it used.

DeepMath-103K (math), WildChat (instructions), OpenCodeReasoning-2 (code) and R1-Onevision (images).
A value model trained on the published data saw exactly these forms, so they are kept to the letter.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from lenvm.data.prompt_sources import Rows, read_hub_rows, read_rows
from lenvm.errors import DataError

MATH_FORM = "Please reason step by step, and put your final answer within \\boxed{{}}.\n\n{text}"
INSTRUCTION_FORM = "Please follow the instructions below.\n\n{text}"
CODE_FORM = (
    "Please solve the programming task below in {language} step by step and then provide the "
    "complete solution in a single {language} code block.\n\n{text}"
)
OPEN_FORM = "Please reason step by step, and provide your final answer at the end.\n\n{text}"

Fill = Callable[[dict[str, Any], str], dict[str, Any] | None]


@dataclass(frozen=True)
class PromptSet:
    """A published set: where its rows are and how a row becomes a prompt."""

    repo: str
    split: str
    domain: str
    licence: str
    fill: Fill
    """(row, place) -> {"prompt", "images"?, metadata...}, or None for a row that has no prompt."""
    config: str | None = None

    def read_rows(self, source: str) -> Rows:
        """Rows from the hub, or from a local copy where `source` is NAME:FILE."""
        _, _, path = source.partition(":")
        return read_rows(path) if path else read_hub_rows(self.repo, self.split, self.config)


def find_prompt_set(source: str) -> PromptSet | None:
    """The set that `source` (NAME or NAME:FILE) names, in any case; None for another source."""
    return PROMPT_SETS.get(source.partition(":")[0].lower())


def _pick(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


def _need_text(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise DataError(f"{where}: no text in {name!r}; the fields are {', '.join(row)}")
    return str(row[name])


def _fill_deepmath(row: dict[str, Any], where: str) -> dict[str, Any]:
    text = _need_text(row, "question", where)
    kept = _pick(row, "final_answer", "difficulty", "topic")
    return {"prompt": MATH_FORM.format(text=text), **kept}


def _fill_wildchat(language: str | None) -> Fill:
    def fill(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        turns = row.get("conversation")
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
            raise DataError(f"{where}: no turns in 'conversation'; the fields are {', '.join(row)}")
        first = turns[0]
        if language not in (None, row.get("language")):
            return None
        if first.get("role") != "user" or not str(first.get("content") or "").strip():
            return None
        kept = _pick(row, "conversation_id", "conversation_hash", "language", "toxic", "redacted")
        return {"prompt": INSTRUCTION_FORM.format(text=first["content"]), **kept}

    return fill


def _fill_code(language: str) -> Fill:
    def fill(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        text = _need_text(row, "question", where)
        if text.strip() == "-":  # the set points to the question's own data set
            text = _find_question(row, where) or ""
            if not text.strip():
                return None
        names = ("pass_rate", "source", "dataset", "split", "difficulty", "index", "id")
        kept = _pick(row, *names, "question_id")
        kept = {f"source_{k}" if k == "split" else k: v for k, v in kept.items()}
        return {"prompt": CODE_FORM.format(language=language, text=text), **kept}

    return fill


QUESTION_SETS = {
    "taco": ("BAAI/TACO", "refs/convert/parquet"),
    "apps": ("codeparrot/apps", "refs/convert/parquet"),
    "code_contests": ("deepmind/code_contests", None),
    "open-r1/codeforces": ("open-r1/codeforces", None),
}


def _find_question(row: dict[str, Any], where: str) -> str | None:
    """The text of a question by (dataset, split, index) in the set that it comes from."""
    name, split, index = row.get("dataset"), row.get("split"), row.get("index")
    if name not in QUESTION_SETS:
        raise DataError(f"{where}: dataset is {name!r}; known: {', '.join(QUESTION_SETS)}")
    questions = _load_questions(name, str(split))
    if not str(index).isdigit() or int(str(index)) >= len(questions):
        raise DataError(f"{where}: index {index!r} is outside {name} {split}")
    return questions[int(str(index))]


@cache
def _load_questions(name: str, split: str) -> list[str | None]:
    repo, revision = QUESTION_SETS[name]
    rows = read_hub_rows(repo, split, revision=revision)
    return [_question_text(name, row) for _, row in rows]


def _question_text(name: str, row: dict[str, Any]) -> str | None:
    if name in ("taco", "apps"):
        return row.get("question")
    text: str | None = row.get("description")
    if name == "code_contests" or not text:
        return text
    for title, part in (("Input", row.get("input_format")), ("Output", row.get("output_format"))):
        text += f"\n\n{title}\n\n{part}" if part else ""
    if examples := row.get("examples"):
        text += "\n\nExamples"
        for example in examples:
            text += "".join(
                f"\n\n{key.capitalize()}\n\n{example[key]}"
                for key in ("input", "output")
                if key in example
            )
    return text + (f"\n\nNote\n\n{row['note']}" if row.get("note") else "")


# Requests about the form of the answer that R1-Onevision's sources put around a question.
_ANSWER_FORM = re.compile(
    r"^(hint: please answer|first perform reasoning|based on the image, directly select)"
    r"|^answer (the question|with the)\b",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"option|choices|yes or no|single word|short phrase|directly select", re.I)


def _fill_onevision(row: dict[str, Any], where: str) -> dict[str, Any] | None:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or turns[0].get("from") != "human":
        raise DataError(f"{where}: 'conversations' does not begin with a human's turn")
    if row.get("image") is None:
        return None
    lines = str(turns[0].get("value", "")).replace("<image>", "").strip().splitlines()
    about_form = [line for line in lines if _ANSWER_FORM.search(line.strip())]
    text = "\n".join(line for line in lines if line not in about_form).strip()
    choice = any(_CHOICE.search(line) for line in about_form)
    form = MATH_FORM if choice else OPEN_FORM
    return {"prompt": form.format(text=text), "images": [row["image"]], **_pick(row, "id")}


PROMPT_SETS: dict[str, PromptSet] = {
    "deepmath-103k": PromptSet("zwhe99/DeepMath-103K", "train", "math", "MIT", _fill_deepmath),
    "wildchat": PromptSet(
        "allenai/WildChat", "train", "instructions", "ODC-BY", _fill_wildchat(None)
    ),
    "wildchat-en": PromptSet(
        "allenai/WildChat", "train", "instructions", "ODC-BY", _fill_wildchat("English")
    ),
    "wildchat-zh": PromptSet(
        "allenai/WildChat", "train", "instructions", "ODC-BY", _fill_wildchat("Chinese")
    ),
    "opencodereasoning-2-python": PromptSet(
        "nvidia/OpenCodeReasoning-2", "python", "code", "CC BY 4.0", _fill_code("Python"), "train"
    ),
    "opencodereasoning-2-cpp": PromptSet(
        "nvidia/OpenCodeReasoning-2", "cpp", "code", "CC BY 4.0", _fill_code("C++"), "train"
    ),
    "r1-onevision": PromptSet(
        "Fancy-MLLM/R1-Onevision", "train", "vision", "Apache-2.0", _fill_onevision
    ),
}


def iter_prompt_sets() -> Iterator[tuple[str, PromptSet]]:
    """Names and sets, in the order of the documentation."""
    yield from PROMPT_SETS.items()
