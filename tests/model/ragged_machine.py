"""Random histories of a RaggedDecoder, each result held against plain forwards of the same model.

Plain functions, so that hypothesis drives them on the CPU and a seeded loop on a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lenvm.errors import CapacityError
from lenvm.model.ragged import RaggedDecoder
from model.families import last_hidden


class History:
    """A decoder, and what its requests should hold.

    `tolerance` is relative: of the largest difference in fp32, of the norm of differences in the
    16-bit types, where single entries of a random model scatter."""

    def __init__(self, model: Any, tolerance: float | None = None, **options: Any) -> None:
        self.model = model
        self.tolerance = tolerance or (1e-4 if model.dtype == torch.float32 else 4e-2)
        self.worst = 0.0
        self.decoder = RaggedDecoder(model, **options)
        self.tokens: dict[str, list[int]] = {}
        self.preempted: dict[str, list[int]] = {}
        self.peeked: dict[str, list[int]] = {}
        self.num_compared = 0
        self._names = 0

    def new_name(self) -> str:
        self._names += 1
        return f"r{self._names}"

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        requests = {self.new_name(): list(p) for p in prompts}
        try:
            outs = self.decoder.add(requests)
        except CapacityError:
            assert all(r not in self.decoder for r in requests)
            return
        self.tokens |= requests
        for tokens, out in zip(requests.values(), outs, strict=True):
            self.compare(tokens, out)

    def fork(self, parent: str) -> None:
        child = self.new_name()
        try:
            self.decoder.fork(parent, child)
        except CapacityError:
            return
        self.tokens[child] = list(self.tokens[parent])

    def peek(self, candidates: dict[str, list[int]]) -> None:
        """candidates: -1 marks padding."""
        width = max(len(row) for row in candidates.values())
        rows = [[*row, *[-1] * (width - len(row))] for row in candidates.values()]
        try:
            outs = self.decoder.peek(list(candidates), self.to_input(rows))
        except CapacityError:
            return
        for (name, row), out in zip(candidates.items(), outs, strict=True):
            for column, token in enumerate(row):
                if token < 0:
                    assert not out[column].any()
                else:
                    self.compare([*self.tokens[name], token], out[column])
        self.peeked = candidates

    def to_input(self, rows: list[list[int]]) -> Any:
        return torch.tensor(rows)

    def commit(self, chosen: dict[str, int]) -> None:
        try:
            self.decoder.commit(list(chosen), list(chosen.values()))
        except CapacityError:
            return
        for name, token in chosen.items():
            self.tokens[name].append(token)

    def step(self, chosen: dict[str, int]) -> None:
        try:
            outs = self.decoder.step(list(chosen), list(chosen.values()))
        except CapacityError:
            return
        for (name, token), out in zip(chosen.items(), outs, strict=True):
            self.tokens[name].append(token)
            self.compare(self.tokens[name], out)

    def extend(self, more: dict[str, list[int]]) -> None:
        try:
            outs = self.decoder.extend(more)
        except CapacityError:
            return
        for (name, tokens), out in zip(more.items(), outs, strict=True):
            self.tokens[name] += tokens
            self.compare(self.tokens[name], out)

    def preempt(self, name: str) -> None:
        self.decoder.remove([name])
        self.preempted[name] = self.tokens.pop(name)

    def resume(self, name: str) -> None:
        try:
            out = self.decoder.add({name: self.preempted[name]})[0]
        except CapacityError:
            return
        self.tokens[name] = self.preempted.pop(name)
        self.compare(self.tokens[name], out)

    def remove(self, names: list[str]) -> None:
        self.decoder.remove(names)
        for name in names:
            del self.tokens[name]

    def compare(self, tokens: Sequence[int], out: torch.Tensor) -> None:
        truth = last_hidden(self.model, tokens).float()
        difference = out.float() - truth
        order = torch.inf if self.model.dtype == torch.float32 else 2
        error = float(difference.norm(order) / truth.norm(order))
        assert error <= self.tolerance, (error, len(tokens))
        self.worst = max(self.worst, error)
        self.num_compared += 1

    def check_lengths(self) -> None:
        for name, tokens in self.tokens.items():
            assert self.decoder.length(name) == len(tokens)
        assert self.decoder.num_tokens <= self.decoder.max_tokens
        if not self.tokens:
            assert self.decoder.num_tokens == 0


def run_random_history(history: History, seed: int, num_calls: int, vocab_size: int) -> None:
    """A seeded history: every kind of call, ragged."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    def tokens(most: int) -> list[int]:
        return [draw(vocab_size) for _ in range(1 + draw(most))]

    def some() -> list[str]:
        return [r for r in history.tokens if draw(3)] or list(history.tokens)[:1]

    def choose() -> dict[str, int]:
        rows = {r: [t for t in row if t >= 0] for r, row in history.peeked.items()}
        known = {r: row for r, row in rows.items() if row and r in history.tokens}
        return {r: row[draw(len(row))] if draw(5) else draw(vocab_size) for r, row in known.items()}

    longest = history.decoder.max_tokens // 8
    width = history.decoder.max_candidates
    calls: list[Callable[[], None]] = [
        lambda: history.peek({r: tokens(width - 1) for r in some()}),
        lambda: history.peek({r: [*tokens(width - 2), -1, draw(vocab_size)] for r in some()}),
        lambda: history.commit(c) if (c := choose()) else None,
        lambda: history.commit(c) if (c := choose()) else None,
        lambda: history.step({r: draw(vocab_size) for r in some()}),
        lambda: history.extend({r: tokens(6) for r in some()}),
        lambda: history.fork(some()[0]),
        lambda: history.preempt(some()[0]),
        lambda: history.remove(some()[:1]),
        lambda: history.add([tokens(longest) for _ in range(1 + draw(2))]),
    ]
    history.add([tokens(longest), tokens(longest)])
    for _ in range(num_calls):
        if not history.tokens:
            history.add([tokens(longest)])
        elif history.preempted and not draw(3):
            history.resume(next(iter(history.preempted)))
        else:
            calls[draw(len(calls))]()
        history.check_lengths()
    assert history.num_compared > num_calls // 2
