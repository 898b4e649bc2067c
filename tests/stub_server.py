"""A fast OpenAI-compatible server for tests: real HTTP on 127.0.0.1, made-up completions.

Completion i of a prompt has 2 + (length of the prompt + i) % 5 tokens. Options make it fail.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stub:
    token_ids: bool = True
    fail_when: str | None = None
    """Requests whose prompt holds this text get HTTP 500."""
    delay_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(body)
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if self.fail_when and self.fail_when in text:
            return 500, {"error": {"message": "made to fail"}}
        choices = []
        for i in range(body.get("n") or 1):
            size = 2 + (len(text) + i) % 5
            words = " ".join(["w9"] * (size - 1))
            choice: dict[str, Any] = {"index": i, "finish_reason": "stop"}
            if self.token_ids:
                choice["token_ids"] = [9] * (size - 1) + [2]
            if "messages" in body:
                choice["message"] = {"role": "assistant", "content": words}
            else:
                choice["text"] = words
            choices.append(choice)
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": choices,
            "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        }
        if self.token_ids:
            answer["prompt_token_ids"] = [4, 9, 5]
        return 200, answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length")
                    ),
                    0,
                )
                body = json.loads(await reader.readexactly(size))
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                status, answer = self.answer(body)
                data = json.dumps(answer).encode()
                writer.write(
                    b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                    % (status, len(data))
                    + data
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()


@contextmanager
def stub_server(**options: Any) -> Iterator[Stub]:
    """A running Stub with its `url`."""
    stub = Stub(**options)
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    server: list[asyncio.Server] = []

    async def start() -> asyncio.Server:
        server = await asyncio.start_server(stub.serve, "127.0.0.1", 0)
        stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return server

    def run() -> None:
        asyncio.set_event_loop(loop)
        server.append(loop.run_until_complete(start()))
        ready.set()
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield stub
    finally:

        async def stop() -> None:
            server[0].close()
            others = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0.01)  # transports close in the next turns of the loop
            loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), loop)
        thread.join()
        loop.close()


if __name__ == "__main__":
    with stub_server() as running:
        print(running.url, flush=True)
        threading.Event().wait()
