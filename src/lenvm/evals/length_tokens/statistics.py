"""Token statistics from records: by event, by mean, with contexts. Pure: records in, tables out.

Sign: a gain is minus the TD residual, so **positive = the token made the expected answer longer**.
An event is an occurrence whose gain is beyond the threshold.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lenvm.evals.length_tokens.tokens import make_visible, merge_key

BEFORE_CHARACTERS, AFTER_CHARACTERS = 80, 60
Context = tuple[float, str, int]
"""(|gain|, record id, index of the token)."""


@dataclass
class TokenCount:
    """What is known of one token (or of its merged forms)."""

    num: int = 0
    total_gain: float = 0.0
    num_events: dict[int, int] = field(default_factory=lambda: {1: 0, -1: 0})
    event_gain: dict[int, float] = field(default_factory=lambda: {1: 0.0, -1: 0.0})
    contexts: dict[int, list[Context]] = field(default_factory=lambda: {1: [], -1: []})

    def add(self, gain: float, threshold: float, where: tuple[str, int], num_contexts: int) -> None:
        self.num += 1
        self.total_gain += gain
        if abs(gain) <= threshold:
            return
        sign = 1 if gain > 0 else -1
        self.num_events[sign] += 1
        self.event_gain[sign] += gain
        if num_contexts:
            push = heapq.heappush if len(self.contexts[sign]) < num_contexts else heapq.heappushpop
            push(self.contexts[sign], (abs(gain), *where))

    @property
    def mean_gain(self) -> float:
        return self.total_gain / self.num


def count_tokens(
    records: Iterable[Mapping[str, Any]],
    *,
    threshold: float,
    merge: bool,
    special_ids: frozenset[int],
    num_contexts: int,
) -> dict[str, TokenCount]:
    """Counts by token. Special tokens are left out."""
    counts: dict[str, TokenCount] = {}
    for record in records:
        rows = zip(record["token_ids"], record["tokens"], record["gains"], strict=True)
        for index, (token_id, text, gain) in enumerate(rows):
            if gain is None or token_id in special_ids:
                continue
            key = merge_key(text) if merge else text
            count = counts.setdefault(key, TokenCount())
            count.add(gain, threshold, (record["id"], index), num_contexts)
    return counts


def build_tables(
    counts: Mapping[str, TokenCount],
    records: Mapping[str, Mapping[str, Any]],
    *,
    min_count: int,
    top: int,
) -> dict[str, list[dict[str, Any]]]:
    """The four lists: longer and shorter, by number of events and by mean gain of all occurrences.

    `min_count`: rarer tokens have no meaningful mean, they stand in no list by mean.
    """
    tables = {}
    for name, sign in (("longer", 1), ("shorter", -1)):
        eventful = [(k, c) for k, c in counts.items() if c.num_events[sign]]
        eventful.sort(key=lambda row: (-row[1].num_events[sign], -sign * row[1].event_gain[sign]))
        means = [(k, c) for k, c in counts.items() if c.num >= min_count and sign * c.mean_gain > 0]
        means.sort(key=lambda row: -sign * row[1].mean_gain)
        for kind, rows in (("by_event", eventful), ("by_mean", means)):
            tables[f"{name}_{kind}"] = [_to_row(k, c, sign, records) for k, c in rows[:top]]
    return tables


def _to_row(
    key: str, count: TokenCount, sign: int, records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    events = count.num_events[sign]
    return {
        "token": make_visible(key),
        "num": count.num,
        "num_events": events,
        "event_share": events / count.num,
        "mean_gain": count.mean_gain,
        "mean_event_gain": count.event_gain[sign] / events if events else None,
        "contexts": [
            _to_context(records[name], index)
            for _, name, index in sorted(count.contexts[sign], reverse=True)
        ],
    }


def _to_context(record: Mapping[str, Any], index: int) -> dict[str, Any]:
    """An occurrence with the text around it."""
    before = "".join(record["tokens"][max(0, index - BEFORE_CHARACTERS) : index])
    after = "".join(record["tokens"][index + 1 : index + 1 + AFTER_CHARACTERS])
    return {
        "id": record["id"],
        "step": index + 1,
        "token": record["tokens"][index],
        "gain": record["gains"][index],
        "before": before[-BEFORE_CHARACTERS:],
        "after": after[:AFTER_CHARACTERS],
    }
