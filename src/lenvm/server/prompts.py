"""PromptEncoder: requests' texts and conversations as token ids, off the event loop.

It has a tokenizer and a thread of its own: the engine's tokenizer decodes in another thread.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lenvm.errors import InputError
from lenvm.model.tokenization import encode_prompt
from lenvm.server.protocol import Message

T = TypeVar("T")
MAX_CACHED = 200_000


class PromptEncoder:
    """Encodes prompts, and names tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lenvm-encode")
        self._names: dict[int, str] = {}

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def text(self, text: str) -> list[int]:
        """A text as it is."""
        return await self._run(lambda: encode_prompt(self._tokenizer, text))

    async def chat(
        self, messages: Sequence[Message], *, open_turn: bool = True, go_on: bool = False
    ) -> list[int]:
        """A conversation through the chat template.

        open_turn: the assistant's turn is opened. go_on: the last message is left open, to be
        continued. InputError where the template does not take the messages.
        """
        turns = [m.to_template() for m in messages]
        if open_turn and not go_on:
            return await self._run(lambda: encode_prompt(self._tokenizer, turns))
        return await self._run(lambda: self._template(turns, go_on))

    def name(self, token_id: int) -> str:
        """A token's own text."""
        if token_id not in self._names:
            if len(self._names) >= MAX_CACHED:
                self._names.clear()
            self._names[token_id] = str(self._tokenizer.decode([token_id]))
        return self._names[token_id]

    def _template(self, turns: list[dict[str, str]], go_on: bool) -> list[int]:
        try:
            encoded = self._tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=False,
                continue_final_message=go_on,
                tokenize=True,
                return_dict=True,
            )
        except Exception as error:  # templates raise whatever their author chose
            raise InputError(f"the chat template does not take these messages: {error}") from error
        ids = list(encoded["input_ids"])
        if not ids:
            raise InputError("the prompt is empty: it needs at least one token")
        return ids

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)
