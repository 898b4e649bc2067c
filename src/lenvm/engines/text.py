"""TextStream: the text of a growing list of tokens, a few tokens decoded at a time.

A character may need several tokens, and a stop text may begin in one and end in another: `settled`
is what no later token can change.
"""

from collections.abc import Callable, Sequence

MAX_TOKENS_OF_A_CHARACTER = 4


class TextStream:
    """Text of tokens, cut before the first stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        """A stop text came; it is not part of `text`."""
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._context, self._read = 0, 0

    def push(self, token_id: int) -> None:
        """Append a token."""
        self._ids.append(token_id)
        self._advance(final=False)

    def finish(self) -> None:
        """No more tokens: an unfinished character is shown as what it is."""
        self._advance(final=True)

    @property
    def settled(self) -> str:
        """The text without an end that may be the beginning of a stop text."""
        if self.stopped or not self._stop:
            return self.text
        longest = max(len(stop) for stop in self._stop)
        for length in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return self.text[:-length]
        return self.text

    def _advance(self, *, final: bool) -> None:
        if self.stopped or self._read == len(self._ids):
            return
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        waiting = len(self._ids) - self._read < MAX_TOKENS_OF_A_CHARACTER
        if after.endswith("\N{REPLACEMENT CHARACTER}") and waiting and not final:
            return
        new = after[len(before) :]
        if new:  # special tokens have no text, so they are no context for the next ones
            self._context = self._read
        self._read = len(self._ids)
        self._append(new)

    def _append(self, new: str) -> None:
        longest = max((len(stop) for stop in self._stop), default=0)
        start = max(0, len(self.text) - longest + 1)
        self.text += new
        ends = [at for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
