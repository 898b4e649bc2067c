"""A stub OpenAI-compatible server on 127.0.0.1: real HTTP, answers by rule, features by choice."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


def say(text: str, num_tokens: int, finish: str = "stop", log_prob: float = -1.0) -> Body:
    """A chat completion."""
    content = [{"token": "x", "logprob": log_prob, "bytes": None, "top_logprobs": []}]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
        "logprobs": {"content": content * num_tokens},
    }
    usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "total_tokens": 7 + num_tokens}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


def echo_length(body: Body) -> Body:
    """As many words as the control asks for, else 40; cut at max_tokens."""
    control = find_control(body) or {}
    goal = control.get("equal_to") or control.get("at_most") or control.get("at_least") or 40
    words = min(goal, body["max_tokens"]) - 1
    finish = "stop" if goal <= body["max_tokens"] else "length"
    return say(" ".join(f"word{i}" for i in range(words)) + ".", words + 1, finish)


def find_control(body: Body) -> dict[str, Any] | None:
    """The control in any of the three wire forms."""
    if "length" in body:
        return body["length"]
    if "vllm_xargs" in body:
        return json.loads(body["vllm_xargs"]["lenvm"])
    return body.get("custom_params", {}).get("lenvm")


@dataclass
class Stub:
    """What the server does. `plugin`: the wire form it understands, None = no length control."""

    plugin: str | None = "lenvm"
    distribution: bool = True
    decay: bool = False
    max_length: int | None = 8192
    owner: str = "stub"
    models: tuple[str, ...] = ("stub-model",)
    answer: Callable[[Body], Body] = echo_length
    fail: Callable[[Body], int | None] = lambda body: None
    delay_s: Callable[[Body], float] = lambda body: 0.0
    slots: int = 10_000
    extra: dict[str, Callable[[Body], Body]] = field(default_factory=dict)
    """More POST paths."""
    bodies: list[Body] = field(default_factory=list)
    """Chat requests that were answered, probes (one token) left out."""
    url: str = ""

    def reply(self, path: str, body: Body) -> tuple[int, Body]:
        if path == "/v1/models":
            entry = {"owned_by": self.owner, "max_model_len": self.max_length}
            return 200, {"data": [{"id": name, **entry} for name in self.models]}
        if path in self.extra:
            return 200, self.extra[path](body)
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": f"no {path}"}}
        if (error := self._refusal(body)) is not None:
            return 400, {"error": {"message": error}}
        if (status := self.fail(body)) is not None:
            return status, {"error": {"message": "told to fail"}}
        if body["max_tokens"] == 1:
            return 200, say("x", 1, "length")
        self.bodies.append(body)
        return 200, self.answer(body)

    def _refusal(self, body: Body) -> str | None:
        forms = {"lenvm": "length", "vllm": "vllm_xargs", "sglang": "custom_params"}
        if self.plugin and forms[self.plugin] in body:
            control = find_control(body)
            assert control is not None
            if control.get("equal_to", 1) < 1:
                return "length control: equal_to is -1; allowed: at least 1"
            if control.get("rule") == "conditional" and not self.distribution:
                return "rule 'conditional' needs the distribution head"
        decay = body.get("exponential_decay_length_penalty")
        if self.decay and decay and decay[0] < 0:
            return "exponential_decay_length_penalty: start must be at least 0"
        return None


async def _handle(
    stub: Stub, slots: asyncio.Semaphore, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while line := await reader.readline():
            path, length = line.split()[1].decode(), 0
            while (header := await reader.readline()).strip():
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            body = json.loads(await reader.readexactly(length)) if length else {}
            async with slots:
                if path.endswith("completions") and (delay := stub.delay_s(body)):
                    await asyncio.sleep(delay)
            status, answer = stub.reply(path, body)
            data = json.dumps(answer).encode()
            head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
            writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def serve(stub: Stub, ready: Callable[[], None], stop: asyncio.Event) -> None:
    slots = asyncio.Semaphore(stub.slots)
    server = await asyncio.start_server(lambda r, w: _handle(stub, slots, r, w), "127.0.0.1", 0)
    stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    ready()
    await stop.wait()
    server.close()
    current = asyncio.current_task()
    tasks = [t for t in asyncio.all_tasks() if t is not current]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def running(stub: Stub) -> Iterator[Stub]:
    """The stub on a port of its own, in a thread, for the time of a `with` block."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serve(stub, ready.set, stop)), daemon=True
    )
    thread.start()
    assert ready.wait(10)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
