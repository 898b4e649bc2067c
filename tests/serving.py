"""A real uvicorn on 127.0.0.1 with tiny models, for the time of a test."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from lenvm.engines.transformers import TransformersEngine
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.server.app import build_app
from lenvm.server.config import ServerConfig
from lenvm.server.run import build_server
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer

CHAT = {"messages": [{"role": "user", "content": "w7 w8 w9"}], "max_tokens": 24}


def tiny_engine(head: str | None = "distribution", **options: Any) -> TransformersEngine:
    """Tiny generator and value model; head None has no value model."""
    value_model = None
    if head is not None:
        config = LenVMConfig(gamma=0.98, head=head, eos_token_ids=[EOS])
        value_model = LengthValueModel.build(tiny_backbone(seed=1), config)
    values = {"max_requests": 8, "max_tokens": 8192, "max_candidates": 64, **options}
    return TransformersEngine(
        tiny_generator(), tiny_tokenizer(), value_model, eos_token_ids=[EOS], **values
    )


@contextmanager
def running(app: Any, config: ServerConfig) -> Iterator[httpx.Client]:
    """A client of the app, which listens on a port of its own. `client.server` can be stopped."""
    server = build_server(app, config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.server = server
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving(engine: TransformersEngine | None = None, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server over a tiny engine. `client.state` is the server's."""
    config = ServerConfig(**{"name": "tiny", "port": 0, "drain_s": 5.0, **options})
    app = build_app(engine or tiny_engine(), config)
    with running(app, config) as client:
        client.state = app.state.server
        yield client


def ask(client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    """A chat request with these fields besides the usual ones."""
    return client.post(path, json=CHAT | fields)


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed chat answer; the last event must be [DONE]."""
    body = CHAT | {"stream": True} | fields
    chunks = []
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        chunks.append(json.loads(line.removeprefix("data: ")))
    return chunks


def settle(client: httpx.Client, timeout_s: float = 10.0) -> None:
    """Wait until nothing runs; then no cache may be in use."""
    engine, deadline = client.state.engine, time.monotonic() + timeout_s
    while engine.num_unfinished or client.state.loop.num_open:
        assert time.monotonic() < deadline, "requests are still there"
        time.sleep(0.01)
    assert engine.decoder.num_tokens == 0
    if engine.session is not None:
        assert engine.session.scorer.decoder.num_tokens == 0
