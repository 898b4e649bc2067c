"""Keys, limits, time-outs, clients that leave, the drain, metrics, logs."""

import asyncio
import gc
import hmac
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from lenvm.errors import InputError
from lenvm.server.app import build_app
from lenvm.server.config import ServerConfig, load_api_keys
from lenvm.server.disconnect import EventStream
from lenvm.server.logs import JsonFormatter
from lenvm.server.run import DrainingServer, bind, run
from serving import CHAT, ask, serving, settle, stream, tiny_engine

LONG = {"max_tokens": 400, "ignore_eos": True}


def slow(engine, seconds: float = 0.02):
    """Make every step of an engine last at least so long."""
    step = engine.step

    def slowed():
        time.sleep(seconds)
        return step()

    engine.step = slowed
    return engine


def test_a_key_is_asked_for_where_keys_are_set():
    with serving(api_keys=("one", "two")) as client:
        assert ask(client).status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for key, status in (("two", 200), ("three", 401), ("", 401), ("é", 401)):
            headers = {"authorization": f"Bearer {key}".strip().encode()}
            reply = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert reply.status_code == status
        assert reply.json()["error"]["type"] == "authentication_error"


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nabc\n\ndef # of Ann\n")
    assert load_api_keys(file) == ("abc", "def")
    monkeypatch.setenv("LENVM_API_KEYS", "x, y,")
    assert load_api_keys(None) == ("x", "y")
    file.write_text("# none\n")
    with pytest.raises(InputError, match="no API key"):
        load_api_keys(file)
    with pytest.raises(InputError, match="no API key file"):
        load_api_keys(tmp_path / "missing")
    with pytest.raises(InputError, match="timeout_s"):
        ServerConfig(timeout_s=0)


def test_other_host_names_are_refused_on_loopback(client):
    reply = client.get("/v1/models", headers={"host": "evil.example:80"})
    assert reply.status_code == 421
    assert client.get("/health", headers={"host": "localhost:1"}).status_code == 200


def test_a_body_over_the_limit_is_refused_with_and_without_its_length():
    with serving(max_body_bytes=1000) as client:
        assert client.post("/v1/completions", content=b"x" * 1001).status_code == 413
        pieces = (b"x" * 100 for _ in range(20))
        assert client.post("/v1/completions", content=pieces).status_code == 413
        assert ask(client).status_code == 200


def test_more_than_there_is_room_for_is_429_and_comes_through_later():
    with serving(slow(tiny_engine(max_requests=2)), max_waiting=1) as client:
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda i: ask(client, max_tokens=30, seed=i), range(8)))
        statuses = {r.status_code for r in replies}
        assert statuses == {200, 429}
        refused = next(r for r in replies if r.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        settle(client)
        assert ask(client).status_code == 200
        assert ask(client, n=4).json()["error"]["param"] == "n"


def test_value_requests_have_places_too():
    with serving(tiny_engine(max_requests=1), max_waiting=1) as client:
        read = client.state.engine.value_model.read

        def slowed(*arguments, **options):
            time.sleep(0.3)
            return read(*arguments, **options)

        client.state.engine.value_model.read = slowed
        body = {"prompts": ["w7"]}
        with ThreadPoolExecutor(6) as pool:
            replies = list(
                pool.map(lambda _: client.post("/v1/length/predict", json=body), range(6))
            )
        assert {r.status_code for r in replies} == {200, 429}
        assert all("retry-after" in r.headers for r in replies if r.status_code == 429)
        assert client.state.loop.num_calls == 0
        assert client.post("/v1/length/predict", json=body).status_code == 200


def test_a_body_that_comes_too_slowly_is_408():
    with serving(body_timeout_s=0.2) as client, socket.socket() as slow_client:
        slow_client.connect(("127.0.0.1", client.base_url.port))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost:{client.base_url.port}\r\n"
        slow_client.sendall(f"{head}content-length: 50\r\n\r\n{{".encode())
        slow_client.settimeout(10)
        assert b" 408 " in slow_client.recv(4096).split(b"\r\n")[0]
        assert ask(client).status_code == 200


def test_a_key_takes_the_same_comparisons_whichever_it_is(monkeypatch):
    compare, seen = hmac.compare_digest, []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append(1) or compare(a, b))
    config = ServerConfig(api_keys=("one", "two", "three"))
    for key, known in (("one", True), ("three", True), ("four", False)):
        seen.clear()
        assert config.knows(key) is known
        assert len(seen) == 3


async def test_a_stream_that_never_begins_frees_its_place(client):
    ticket = client.state.loop
    ended = []

    async def events():
        yield b"never"

    async def gone():
        return {"type": "http.disconnect"}

    async def stuck(message):
        await asyncio.sleep(60)

    await EventStream(events(), lambda: ended.append(ticket))({}, gone, stuck)
    assert ended == [ticket]


def test_a_request_that_takes_too_long_ends_and_frees_its_place():
    with serving(slow(tiny_engine()), timeout_s=0.3) as client:
        assert ask(client, **LONG).status_code == 504
        body = CHAT | LONG | {"stream": True}
        text = client.post("/v1/chat/completions", json=body).text
        assert "not finished within 0.3 s" in text
        assert "[DONE]" not in text
        settle(client)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_is_cancelled_within_a_step(streamed):
    engine = slow(tiny_engine())
    step, steps, closed_at = engine.step, [], []

    def counted():
        steps.append(1)
        return step()

    engine.step = counted
    with serving(engine) as client:
        close = client.state.loop.close

        def noted(ticket):
            close(ticket)
            closed_at.append(len(steps))

        client.state.loop.close = noted
        body = CHAT | LONG | {"stream": streamed, "n": 3, "length": {"at_least": 300}}
        with httpx.Client(base_url=client.base_url, timeout=10) as leaver:
            if streamed:
                with leaver.stream("POST", "/v1/chat/completions", json=body) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    leaver.post("/v1/chat/completions", json=body, timeout=0.3)
        start = time.monotonic()
        settle(client, 3.0)
        assert time.monotonic() - start < 1.0
        assert len(steps) <= closed_at[0] + 1  # the one that was under way
        assert 'completions_total{finish_reason="cancelled"} 3.0' in client.get("/metrics").text


def test_a_defect_in_the_engine_ends_what_ran_and_nothing_else(caplog):
    engine = tiny_engine()
    with serving(engine) as client:
        step, calls = engine.step, []

        def fail_once():
            calls.append(1)
            if len(calls) == 3:
                raise ZeroDivisionError("a defect")
            return step()

        engine.step = fail_once
        with caplog.at_level(logging.CRITICAL, "lenvm.server"):
            reply = ask(client, max_tokens=50, ignore_eos=True)
        assert reply.status_code == 500
        assert "ZeroDivisionError" in reply.json()["error"]["message"]
        assert ask(client).status_code == 200
        settle(client)


def test_health_models_metrics(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    (model,) = client.get("/v1/models").json()["data"]
    assert model["max_model_len"] == 512
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/other").status_code == 404
    assert ask(client, model="other").json()["error"]["code"] == "model_not_found"
    assert client.get("/nothing").json()["error"]["message"]
    ask(client, track_length=True, exponential_decay_length_penalty=[2, 9.0])
    ask(client, length={"equal_to": 6})
    text = client.get("/metrics").text
    for name in (
        "generated_tokens_total",
        "requests_running",
        "requests_waiting 0.0",
        "calls_open",
        "value_kv_tokens 0.0",
        "step_seconds_total",
        "guidance_seconds_total",
        "prediction_error_ratio_count",
        "target_error_ratio_count",
        "time_to_first_token_seconds_count",
        "kv_tokens",
        'requests_total{path="/v1/chat/completions",status="200"}',
    ):
        assert f"lenvm_{name}" in text, name


def test_the_queue_and_the_kv_in_use_are_seen_while_they_are():
    with serving(slow(tiny_engine(max_requests=2))) as client, ThreadPoolExecutor(5) as pool:
        fields = {"max_tokens": 60, "ignore_eos": True, "track_length": True}
        replies = [pool.submit(ask, client, seed=i, **fields) for i in range(5)]
        seen: dict[str, float] = {}
        while not all(r.done() for r in replies):
            for line in client.get("/metrics").text.splitlines():
                name, _, value = line.rpartition(" ")
                if name.startswith("lenvm_"):
                    seen[name] = max(seen.get(name, 0.0), float(value))
        settle(client)
    assert seen["lenvm_requests_waiting"] >= 2
    assert seen["lenvm_requests_running"] == 2
    assert seen["lenvm_kv_tokens"] > 60
    assert seen["lenvm_value_kv_tokens"] > 60


def test_log_lines_are_json_without_the_prompt(client, caplog):
    with caplog.at_level(logging.INFO, "lenvm.server"):
        ask(client, messages=[{"role": "user", "content": "w33 w34 w35"}], length={"equal_to": 5})
        deadline = time.monotonic() + 10
        while not (lines := [r for r in caplog.records if getattr(r, "event", "") == "request"]):
            assert time.monotonic() < deadline  # the line is written after the answer has gone
            time.sleep(0.01)
    (record,) = lines
    line = json.loads(JsonFormatter().format(record))
    assert line["status"] == 200
    assert line["length"] == {"equal_to": 5}
    assert line["completion_tokens"] == 5
    assert "w34" not in json.dumps(line)


def test_many_mixed_clients_and_random_leavers_hurt_nobody():
    engine = tiny_engine(max_requests=6)
    controls = [None, {"equal_to": 9}, {"at_most": 12}, {"at_least": 15}, {"tilt": 5.0}]

    def one(client: httpx.Client, i: int) -> bool:
        fields = {"length": controls[i % 5], "seed": i, "max_tokens": 40}
        if i % 4 == 3:
            body = CHAT | fields | {"stream": True, "max_tokens": 300, "ignore_eos": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                for _ in zip(range(i % 7), reply.iter_lines(), strict=False):
                    pass
            return True
        if i % 3:
            return len(stream(client, **fields)) > 0
        return ask(client, **fields).status_code == 200

    with serving(engine) as client, ThreadPoolExecutor(12) as pool:
        expected = ask(client, length={"equal_to": 9}, seed=1).json()["choices"][0]["message"]
        assert all(pool.map(lambda i: one(client, i), range(60)))
        settle(client)
        again = ask(client, length={"equal_to": 9}, seed=1).json()["choices"][0]["message"]
        assert again == expected


def test_requests_leave_no_objects_behind():
    with serving(tiny_engine(max_requests=6)) as client, ThreadPoolExecutor(8) as pool:

        def one(i: int) -> None:
            body = CHAT | {"seed": i, "max_tokens": 12, "stream": True, "logprobs": True}
            body["length"] = (None, {"equal_to": 9})[i % 2]
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                for _ in zip(range(5 if i % 3 else 1000), reply.iter_lines(), strict=False):
                    pass

        def count(num_requests: int) -> int:
            list(pool.map(one, range(num_requests)))
            settle(client)
            gc.collect()
            return sys.getallocatedblocks()

        # A cache of a library fills once, on a path that may be taken late; what is lost with
        # each request is lost in every hundred of them.
        counts = [count(100) for _ in range(5)]
        assert min(after - before for before, after in pairwise(counts)) / 100 < 5


def test_what_is_loaded_is_no_work_for_the_collector(monkeypatch):
    frozen = []
    monkeypatch.setattr(DrainingServer, "run", lambda self, _: frozen.append(gc.get_freeze_count()))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        with pytest.raises(SystemExit):  # it never started
            run(build_app(tiny_engine(), ServerConfig(port=0)), ServerConfig(port=0))
    finally:
        gc.unfreeze()
    assert frozen[0] > 100_000


def test_an_address_that_cannot_be_had_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"127\.0\.0\.1 port {port}: .*choose another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(InputError, match=r"cannot listen at 300\.1\.1\.1"):
        bind("300.1.1.1", port)
    with bind("127.0.0.1", port) as taken:
        assert taken.getsockname()[1] == port


def test_a_running_request_is_finished_when_the_server_is_told_to_stop():
    with serving(slow(tiny_engine(), 0.01)) as client:
        done: list[httpx.Response] = []
        body = CHAT | {"max_tokens": 100, "ignore_eos": True}
        worker = threading.Thread(
            target=lambda: done.append(client.post("/v1/chat/completions", json=body))
        )
        worker.start()
        while not client.state.loop.num_open:
            time.sleep(0.005)
        client.server.handle_exit(signal.SIGTERM, None)
        assert client.state.loop.draining
        worker.join(20)
        assert done[0].json()["usage"]["completion_tokens"] == 100
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{client.base_url}/health")


def test_what_runs_longer_than_the_drain_is_given_up():
    with serving(slow(tiny_engine(), 0.05), drain_s=1.0) as client, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(ask, client, **LONG)
        while not client.state.loop.num_open:
            time.sleep(0.005)
        start = time.monotonic()
        client.server.handle_exit(signal.SIGTERM, None)
        assert reply.result(15).status_code == 503
        assert 0.5 < time.monotonic() - start < 10


def test_a_stream_that_runs_longer_than_the_drain_ends_with_an_error(caplog):
    with serving(slow(tiny_engine(), 0.05), drain_s=1.0) as client:
        body = CHAT | LONG | {"stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            client.server.handle_exit(signal.SIGTERM, None)
            last = [line for line in lines if line][-1]
        assert "went down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert not [r for r in caplog.records if r.exc_info], caplog.text


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Tiny generator and value model on disk."""
    folder = tmp_path_factory.mktemp("models")
    engine = tiny_engine()
    engine.generator.save_pretrained(folder / "generator")
    engine.tokenizer.save_pretrained(folder / "generator")
    engine.value_model.save_pretrained(folder / "value")
    return folder / "generator", folder / "value"


def test_the_command_can_be_killed_starts_again_and_ends_well(folders, tmp_path):
    code = "import sys; sys.argv[0] = 'lenvm'; from lenvm.cli import main; main()"
    options = ["serve", "--model", str(folders[0]), "--lenvm", str(folders[1]), "--port"]
    env = {**os.environ, "PYTHONPATH": "src", "LENVM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    port = free_port()
    for sig, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        command = [sys.executable, "-c", code, *options, str(port)]
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
            try:
                _wait_ready(port, process)
                url = f"http://127.0.0.1:{port}/v1/chat/completions"
                reply = httpx.post(url, json=CHAT | {"ignore_eos": True, "seed": 3})
                assert reply.status_code == 200
                assert httpx.post(url, json=CHAT | {"n": 0}).status_code == 422
                body = CHAT | LONG | {"stream": True}
                with httpx.stream("POST", url, json=body, timeout=60) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    process.send_signal(sig)
                    if sig == signal.SIGTERM:  # what runs is finished
                        assert [x for x in lines if x][-1] == "data: [DONE]"
            finally:
                process.send_signal(sig)
                _, errors = process.communicate(timeout=20)
        assert process.returncode == expected
        assert "Traceback" not in errors
        banner, *logged = errors.splitlines()
        assert banner.startswith("lenvm: serving")
        assert any(json.loads(line).get("event") == "request" for line in logged)
        assert "w8" not in errors
        text = reply.json()["choices"][0]["message"]["content"]
        assert text.strip()
        assert text not in errors
    assert list(tmp_path.iterdir()) == []


def _wait_ready(port: int, process: subprocess.Popen, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_servers_start_at_once_on_one_empty_cache(tmp_path):
    code = "import sys; sys.argv[0] = 'lenvm'; from lenvm.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": "src", "LENVM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ports = [free_port(), free_port()]
    servers = [
        subprocess.Popen([sys.executable, "-c", code, "serve", "--port", str(port)], env=env)
        for port in ports
    ]
    try:
        texts = []
        for port, process in zip(ports, servers, strict=True):
            _wait_ready(port, process, 600)
            body = CHAT | {"temperature": 0, "length": {"equal_to": 9}}
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            reply = httpx.post(url, json=body, timeout=120).json()
            assert reply["usage"]["completion_tokens"] == 9
            texts.append(reply["choices"][0]["message"]["content"])
        assert texts[0] == texts[1]
    finally:
        for process in servers:
            process.send_signal(signal.SIGTERM)
        for process in servers:
            assert process.wait(30) == 0
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"smollm2-135m-instruct", ".smollm2-135m-instruct.lock"}
