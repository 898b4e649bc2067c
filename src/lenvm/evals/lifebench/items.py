"""The LIFEBench file format: items, and the task text for a constraint, a target and a unit.

One JSON line per item: id, category, type, lang ("en", "cn"), task, raw_data. The task holds the
placeholders `{word_count_type}` (equal to, at most, at least) and `{word_count}`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lenvm.errors import DataError
from lenvm.evals.quality import split_words
from lenvm.files import read_jsonl

Constraint = Literal["equal_to", "at_most", "at_least"]
Unit = Literal["tokens", "words", "characters"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)
UNITS: tuple[Unit, ...] = get_args(Unit)
TARGETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

FIELDS = ("id", "category", "type", "lang", "task", "raw_data")
LANGUAGES = {"en": "en", "cn": "zh", "zh": "zh"}
PHRASES: dict[str, dict[Constraint, str]] = {
    "en": {"equal_to": "equal to", "at_most": "at most", "at_least": "at least"},
    "zh": {"equal_to": "等于", "at_most": "至多有", "at_least": "至少有"},
}
UNIT_NAMES: dict[str, dict[Unit, str]] = {
    "en": {"tokens": "tokens", "words": "words", "characters": "characters"},
    "zh": {"tokens": "个token", "words": "个字", "characters": "个字符"},
}
UNIT_HINTS = {"en": "(Count {}.)", "zh": "（以{}计数。）"}  # noqa: RUF001
WORDS_IN_TASK = {"en": re.compile(r"\s*words?\b"), "zh": re.compile(r"\s*(?:个)?(?:字|词|单词)")}


@dataclass(frozen=True)
class LifebenchItem:
    """One task, without its length."""

    id: str
    category: str
    type: str
    language: str
    """"en" or "zh"."""
    task: str
    raw_data: str

    def prompt(self, constraint: Constraint, target: int, unit: Unit) -> str:
        """The task with its length instruction. The benchmark's word "words" becomes the unit."""
        count = str(target)
        before, after = self.task.split("{word_count}", 1)
        if unit != "words":
            after, replaced = WORDS_IN_TASK[self.language].subn(
                (" " if self.language == "en" else "") + UNIT_NAMES[self.language][unit],
                after,
                count=1,
            )
            if not replaced:
                hint = UNIT_HINTS[self.language].format(UNIT_NAMES[self.language][unit])
                after = f"{after}\n{hint}"
        text = f"{before}{count}{after}"
        return text.replace("{word_count_type}", PHRASES[self.language][constraint], 1)


def load_lifebench(path: Path, *, limit: int | None = None) -> list[LifebenchItem]:
    """Items of a LIFEBench file, in order. DataError names line and field of what is not one.

    `limit` takes that many items spread evenly over the file, so that all categories stay in.
    """
    items = [_read_item(path, number, row) for number, row in read_jsonl(path)]
    if not items:
        raise DataError(f"{path} holds no LIFEBench items")
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"{path}: id {twice!r} occurs twice; ids must be unique")
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _read_item(path: Path, number: int, row: dict[str, object]) -> LifebenchItem:
    where = f"{path}:{number}"
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise DataError(
            f"{where}: field {', '.join(map(repr, missing))} missing; "
            f"a LIFEBench item has {', '.join(FIELDS)}"
        )
    language = LANGUAGES.get(str(row["lang"]))
    if language is None:
        raise DataError(f"{where}: lang is {row['lang']!r}; allowed: 'en', 'cn', 'zh'")
    task = row["task"]
    if not isinstance(task, str):
        raise DataError(f"{where}: task is {type(task).__name__}, expected text")
    for placeholder in ("{word_count_type}", "{word_count}"):
        if task.count(placeholder) != 1:
            raise DataError(
                f"{where}: task must hold {placeholder} once; it is there "
                f"{task.count(placeholder)} times"
            )
    return LifebenchItem(
        id=str(row["id"]),
        category=str(row["category"]),
        type=str(row["type"]),
        language=language,
        task=task,
        raw_data=str(row["raw_data"]),
    )


def measure_length(text: str, num_tokens: int, unit: Unit) -> int:
    """Length of an answer in the unit asked for. Characters: without white space."""
    if unit == "tokens":
        return num_tokens
    if unit == "words":
        return len(split_words(text))
    return sum(not character.isspace() for character in text)
