"""Quality of a text beside its length: repetition, diversity, how it ends; and the time it took.

Units of n-grams are lower-cased words; a Chinese or Japanese character is a word of its own. The
measures of a text need no model, so that every server's answers are measured alike.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.evals.bootstrap import Estimate, Resampler

ANSWER_QUALITY = ("log_prob", "rep_4", "distinct_1", "distinct_2", "judge")
"""Means over answers."""
SHARES = ("ended_by_eos", "sentence_end", "natural_end")
"""Shares of all requests; a failed one counts as no."""

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


def measure_record(record: Mapping[str, Any], text: str, *, answered: bool) -> dict[str, Any]:
    """Quality and speed of one record of an answer, for its grade.

    text: the answer as it counts (a countdown taken out, say). `answered`: False where the request
    failed or the answer holds no word; nothing is then known of its text.
    """
    quality = measure_text(text, record["finish_reason"])
    if not answered:
        quality = {name: None if name in ANSWER_QUALITY else False for name in quality}
    failed, tokens = record["error"] is not None, record["num_tokens"]
    return {
        "log_prob": None if failed else record["mean_log_prob"],
        **quality,
        "ms_per_token": None if failed or not tokens else 1000 * record["latency_s"] / tokens,
    }


def summarise_quality(
    grades: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], r: Resampler
) -> dict[str, Any]:
    """Means of the measures that stand in grades, clustered by item.

    reference: grades of the unguided arm, for `log_prob_loss` (positive = less likely text).
    """

    def mean(name: str, source: Sequence[Mapping[str, Any]]) -> Estimate:
        kept = [g for g in source if g.get(name) is not None]
        return r.mean([float(g[name]) for g in kept], [g["item"] for g in kept])

    numbers = {name: mean(name, grades).to_json() for name in (*ANSWER_QUALITY, *SHARES)}
    loss = (mean("log_prob", reference) - mean("log_prob", grades)) if reference else None
    timed = [g for g in grades if g.get("ms_per_token") is not None]
    pace = r.quantile([g["ms_per_token"] for g in timed], [g["item"] for g in timed])
    return {
        **numbers,
        "log_prob_loss": loss.to_json() if loss else None,
        "ms_per_token": pace.to_json(),
    }


def _count_different(words: Sequence[str], n: int) -> int:
    return len(set(zip(*(words[i:] for i in range(n)), strict=False)))
