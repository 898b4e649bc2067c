"""A server before another one: answers, errors and streams come through as they are."""

import json
import socket
import threading

import httpx
import pytest

from evals.stub import Stub
from evals.stub import running as running_stub
from lenvm.errors import InputError
from lenvm.server.config import ServerConfig
from lenvm.server.upstream import build_upstream_app
from serving import ask, running, serving, settle, stream


def before(url: str, engine: str = "lenvm", **options):
    config = ServerConfig(name="front", port=0, drain_s=2.0)
    return running(build_upstream_app(url, config, engine=engine, **options), config)


@pytest.fixture(scope="module")
def front(client):
    with before(f"{client.base_url}/v1") as found:
        yield found


def test_answers_and_streams_are_the_same_bytes(client, front):
    assert front.get("/v1/models").json() == client.get("/v1/models").json()
    fields = {"length": {"equal_to": 8}, "seed": 3}
    one, two = (ask(c, **fields).json()["choices"] for c in (client, front))
    assert one == two
    texts = [[c["choices"][0]["delta"] for c in stream(x, **fields)] for x in (client, front)]
    assert texts[0] == texts[1]
    body = {"text": "w7 w8"}
    one, two = (c.post("/v1/length/values", json=body).json() for c in (client, front))
    assert one == two


def test_errors_come_through(client, front):
    for fields in ({"length": {"equal_to": -1}}, {"temperature": -1}, {"model": "other"}):
        one, two = ask(client, **fields), ask(front, **fields)
        assert (one.status_code, one.json()) == (two.status_code, two.json())
    assert front.get("/v1/nothing").status_code == 404


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_control_is_rewritten_for_the_other_servers_plugin(engine):
    with running_stub(Stub(plugin=engine)) as stub, before(stub.url, engine) as front:
        reply = ask(front, length={"equal_to": 5})
        assert reply.json()["usage"]["completion_tokens"] == 5
        sent = stub.bodies[-1]
        assert "length" not in sent
        form = sent["vllm_xargs"] if engine == "vllm" else sent["custom_params"]
        control = form["lenvm"]
        assert (json.loads(control) if engine == "vllm" else control) == {"equal_to": 5}
        assert ask(front, length={"equal_to": -5}).json()["error"]["param"] == "length.equal_to"


def test_a_server_that_is_not_there_is_said():
    with before("http://127.0.0.1:9") as front:
        assert front.get("/health").status_code == 200
        reply = front.get("/ready")
        assert reply.status_code == 503
        assert "does not answer (ConnectError)" in reply.json()["why"]
        reply = ask(front)
        assert reply.status_code == 502
        assert "does not answer" in reply.json()["error"]["message"]


def test_a_key_for_the_other_server_replaces_the_clients():
    with (
        serving(api_keys=("inner",)) as inner,
        before(str(inner.base_url), api_key="inner") as front,
    ):
        assert ask(inner).status_code == 401
        assert ask(front).status_code == 200
    with pytest.raises(InputError, match="http"):
        build_upstream_app("localhost:1", ServerConfig(), engine="vllm")


def test_a_client_that_leaves_is_cancelled_there_too(client, front):
    body = {"messages": [{"role": "user", "content": "w7"}], "max_tokens": 400}
    body |= {"stream": True, "ignore_eos": True}
    with front.stream("POST", "/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())
    settle(client, 5.0)


def test_a_stream_that_breaks_off_there_breaks_off_here():
    def serve_once(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            connection.recv(65_536)
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n9\r\ndata: {}\n\r\n")
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_once, args=(listener,), daemon=True)
        thread.start()
        with before(f"http://127.0.0.1:{listener.getsockname()[1]}") as front:
            for _ in range(2):
                seen: list[bytes] = []
                with (
                    front.stream("POST", "/v1/chat/completions", json={}) as reply,
                    pytest.raises(httpx.RemoteProtocolError),
                ):
                    seen.extend(reply.iter_raw())
                assert seen == [b"data: {}\n"]
            assert front.get("/health").status_code == 200
        thread.join(5)
