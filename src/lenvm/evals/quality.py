"""Quality of a text beside its length: repetition, diversity, how it ends. Text in, numbers out.

Units of n-grams are lower-cased words; a Chinese or Japanese character is a word of its own. The
measures need no model, so that every server's answers are measured alike.
"""

import re
from collections.abc import Sequence
from typing import Any

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]*[^\W_{CJK}][^\s{CJK}]*")
ASCII_WORD = re.compile("[A-Za-z0-9]")
SENTENCE_ENDS = ".!?…。！？"  # noqa: RUF001
CLOSERS = "\"'”’»)]}）】」』*_"  # noqa: RUF001


def split_words(text: str) -> list[str]:
    """Words: runs without white space that hold a letter or digit; CJK characters one by one."""
    if text.isascii():
        return [word for word in text.split() if ASCII_WORD.search(word)]
    return WORD.findall(text)


def has_words(text: str) -> bool:
    """True where there is at least one."""
    return WORD.search(text) is not None


def repetition(words: Sequence[str], n: int = 4) -> float:
    """rep-n: share of n-grams that occurred before in the same text. 0 for fewer than n words."""
    count = len(words) - n + 1
    return 1 - _count_different(words, n) / count if count > 0 else 0.0


def distinct(words: Sequence[str], n: int) -> float:
    """distinct-n: different n-grams over all n-grams of the text. 0 for fewer than n words."""
    count = len(words) - n + 1
    return _count_different(words, n) / count if count > 0 else 0.0


def ends_at_sentence(text: str) -> bool:
    """True where the text ends with a sentence (mark, closing marks) or a code block."""
    text = text.rstrip()
    if text.endswith("```"):
        return text.count("```") % 2 == 0
    return text.rstrip(CLOSERS).endswith(tuple(SENTENCE_ENDS))


def measure_text(text: str, finish_reason: str) -> dict[str, Any]:
    """All of the above for one answer. N-grams are of lower-cased words."""
    words = split_words(text.lower())
    ended, sentence = finish_reason == "stop", ends_at_sentence(text)
    return {
        "rep_4": repetition(words, 4),
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "ended_by_eos": ended,
        "sentence_end": sentence,
        "natural_end": ended and sentence,
    }


def _count_different(words: Sequence[str], n: int) -> int:
    return len(set(zip(*(words[i:] for i in range(n)), strict=False)))
