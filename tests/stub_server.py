"""A stub of an OpenAI-compatible server: real HTTP, invented completions, chosen faults.

Speaks `/v1/models`, `/v1/chat/completions` and `/v1/completions` (no streaming). A completion is
words `w<id>` separated by blanks, one word a token, then the ending token `EOS`; its length and its
words follow from the request's prompt and seed, or from chance. In tests:

    with stub_server(owned_by="vllm") as stub:
        ... stub.url, stub.requests, stub.num_completions

In another process (benchmarks): `python tests/stub_server.py --port 0`, which prints its URL.
"""

import argparse
import asyncio
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

EOS = 2
VOCAB_SIZE = 1000
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many", 500: "Server Error"}


@dataclass
class Stub:
    """What the stub answers. Fields may be changed while it runs."""

    model: str = "stub"
    owned_by: str = "vllm"
    """vllm: token ids by `return_token_ids`; sglang: by `return_meta_info`; else none at all."""
    lists_models: bool = True
    """False: `/v1/models` is not there."""
    token_ids: bool = True
    """False: keep the token ids back, whatever is asked for."""
    min_length: int = 1
    max_length: int = 40
    """Lengths are drawn from [min_length, max_length], the ending token counted."""
    delay_s: float = 0.0
    fail_first: int = 0
    """Answer the first so many completion requests with `fail_status`."""
    fail_share: float = 0.0
    """Answer this share of completion requests with `fail_status`."""
    fail_status: int = 500
    retry_after: str | None = None
    """The header of answers with `fail_status`."""
    fail_when: str | None = None
    """Answer requests whose body holds this text with `fail_status`."""
    reject_fields: tuple[str, ...] = ()
    """Answer 400 to requests with one of these fields, as strict servers do."""
    usage_error: int = 0
    """Add this to usage.completion_tokens: a server that counts otherwise."""
    truncate_after: int | None = None
    """Close the connection in the middle of every response after so many completion requests."""
    keep_requests: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_requests: int = 0
    num_completions: int = 0
    port: int = 0
    host: str = "127.0.0.1"
    connections: set[asyncio.Transport] = field(default_factory=set)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """(status, JSON body) of a request."""
        if method == "GET" and path == "/v1/models" and self.lists_models:
            card = {"id": self.model, "object": "model", "created": 0, "owned_by": self.owned_by}
            return 200, json.dumps({"object": "list", "data": [card]}).encode()
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return 404, b'{"error": {"message": "no such path"}}'
        request = json.loads(body)
        self.num_requests += 1
        if self.keep_requests:
            self.requests.append(request)
        fails = self.num_requests <= self.fail_first or self._random.random() < self.fail_share
        if fails or (self.fail_when and self.fail_when in body.decode()):
            return self.fail_status, b'{"error": {"message": "made to fail"}}'
        if extra := [name for name in self.reject_fields if name in request]:
            message = f"Unrecognized request argument supplied: {', '.join(extra)}"
            return 400, json.dumps({"error": {"message": message}}).encode()
        return 200, self._complete(request, chat=path.endswith("chat/completions"))

    def _complete(self, request: dict[str, Any], *, chat: bool) -> bytes:
        prompt = str(request["messages"] if chat else request["prompt"])
        seed = request.get("seed")
        source = random.Random(f"{prompt}/{seed}") if seed is not None else self._random
        limit = request.get("max_tokens") or request.get("max_completion_tokens") or 1 << 30
        prompt_ids = [3 + ord(c) % (VOCAB_SIZE - 3) for c in prompt]
        choices, total = [], 0
        for index in range(request.get("n") or 1):
            length = source.randint(self.min_length, self.max_length)
            ids = [source.randrange(3, VOCAB_SIZE) for _ in range(min(length - 1, limit))]
            reason = "length" if length > limit else "stop"
            text = " ".join(f"w{i}" for i in ids)
            ids = ids if reason == "length" else [*ids, EOS]
            total += len(ids)
            choices.append(self._choice(request, index, text, ids, prompt_ids, reason, chat=chat))
        self.num_completions += len(choices)
        answer: dict[str, Any] = {
            "id": "stub",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": self.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": len(prompt_ids),
                "completion_tokens": total + self.usage_error,
                "total_tokens": len(prompt_ids) + total + self.usage_error,
            },
        }
        asked = self.token_ids and request.get("return_token_ids")
        if self.owned_by == "vllm" and chat and asked:
            answer["prompt_token_ids"] = prompt_ids
        return json.dumps(answer).encode()

    def _choice(
        self,
        request: dict[str, Any],
        index: int,
        text: str,
        ids: list[int],
        prompt_ids: list[int],
        reason: str,
        *,
        chat: bool,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if not self.token_ids:
            return choice
        if self.owned_by == "vllm" and request.get("return_token_ids"):
            choice["token_ids"] = ids
            if not chat:
                choice["prompt_token_ids"] = prompt_ids
        if self.owned_by == "sglang" and request.get("return_meta_info"):
            choice["meta_info"] = {"output_token_logprobs": [[-0.5, i, None] for i in ids]}
        if self.owned_by == "sglang" and request.get("return_prompt_token_ids"):
            choice["prompt_token_ids"] = prompt_ids
        return choice

    async def start(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(self), self.host, self.port)
        self.port = server.sockets[0].getsockname()[1]
        return server


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive: as little of it as a client of completions uses."""

    def __init__(self, stub: Stub) -> None:
        self.stub, self.buffer = stub, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.stub.connections.add(transport)

    def connection_lost(self, _: Exception | None) -> None:
        self.stub.connections.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
            size = end + 4 + int(headers.get("content-length", "0"))
            if len(self.buffer) < size:
                return
            body, self.buffer = self.buffer[end + 4 : size], self.buffer[size:]
            method, path, _ = head[0].split(" ")
            status, answer = self.stub.answer(method, path, body)
            if self.stub.delay_s and method == "POST":
                loop = asyncio.get_running_loop()
                loop.call_later(self.stub.delay_s, self._send, status, answer)
            else:
                self._send(status, answer)

    def _send(self, status: int, body: bytes) -> None:
        if self.transport.is_closing():
            return
        head = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        if status == self.stub.fail_status and self.stub.retry_after is not None:
            head += f"retry-after: {self.stub.retry_after}\r\n"
        head += "\r\n"
        limit = self.stub.truncate_after
        if limit is not None and self.stub.num_requests > limit:
            self.transport.write(head.encode() + body[: len(body) // 2])
            self.transport.close()
            return
        self.transport.write(head.encode() + body)


@contextmanager
def stub_server(**options: Any) -> Iterator[Stub]:
    """A Stub that serves from a thread of this process."""
    stub = Stub(**options)
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = await stub.start()
        ready.set()
        await stop.wait()
        server.close()
        for connection in list(stub.connections):
            connection.abort()
        await asyncio.sleep(0.01)  # transports close in the next turns of the loop

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve invented completions on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--owned-by", default="vllm")
    parser.add_argument("--min-length", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=40)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--fail-when", help="answer 400 to requests that hold this text")
    args = parser.parse_args()
    stub = Stub(
        fail_when=args.fail_when,
        fail_status=400 if args.fail_when else 500,
        port=args.port,
        owned_by=args.owned_by,
        min_length=args.min_length,
        max_length=args.max_length,
        delay_s=args.delay,
        keep_requests=False,
    )

    async def serve() -> None:
        server = await stub.start()
        print(stub.url, flush=True)
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
