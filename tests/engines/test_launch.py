"""`lenvm serve --engine`: a stand-in package plays the engine's server."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lenvm.engines import launch
from lenvm.engines.settings import GuidanceSettings
from lenvm.errors import EndpointError, InputError

STAND_IN = Path(__file__).parent / "stand_in"
SOURCES = Path(__file__).parents[2] / "src"


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "lenvm", "serve", *arguments],
        env={**os.environ, "PYTHONPATH": f"{STAND_IN}:{SOURCES}", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(child: "subprocess.Popen[str]", text: str) -> list[str]:
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {lines}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_stock_server_runs_as_a_child(engine, number, port, tmp_path):
    options = ["--model", "G", "--lenvm", str(tmp_path), "--port", str(port), "--name", "mine"]
    child = start("--engine", engine, *options, "--dtype", "bfloat16")
    lines = read_until(child, "ready: ")
    assert re.match(r"LENVM_MODEL=\S+ .*--port \d+ .*--dtype bfloat16$", lines[0])
    assert f"value model: {tmp_path}" in lines
    assert any(
        line.startswith("arguments: ") and "--served-model-name mine" in line for line in lines
    )
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
    child.send_signal(number)
    rest = child.communicate(timeout=20)[0]
    assert f"ends after signal {int(number)}" in rest
    assert child.returncode == 0


def test_a_server_that_ends_at_its_start_is_an_error_with_its_log(port, tmp_path):
    options = ["--model", "G", "--lenvm", str(tmp_path), "--port", str(port)]
    child = start("--engine", "vllm", *options, "--die", "7")
    text = child.communicate(timeout=30)[0]
    assert "value model:" in text
    assert "ended with status 7 before it answered" in text
    assert child.returncode == 5


def test_a_server_that_does_not_answer_is_stopped(port):
    argv = [sys.executable, str(STAND_IN / "vllm/entrypoints/cli/main.py"), "--port", str(port)]
    lines: list[str] = []
    started = time.monotonic()
    with pytest.raises(EndpointError, match="did not answer within 1 s"):
        launch.run_server(
            [*argv, "--deaf"],
            {},
            f"http://127.0.0.1:{port}",
            startup_timeout_s=1.0,
            echo=lines.append,
        )
    assert time.monotonic() - started < 15
    assert "ends after signal 15" in lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lenvm", "none"], "needs --model"),
        (["--model", "G"], "needs --model"),
        (["--model", "G", "--lenvm", "V", "--drain", "5"], "--drain goes with --engine transf"),
        (["--model", "G", "--lenvm", "V", "--speculative-config", "{}"], "speculative decoding"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, says):
    child = start("--engine", "vllm", *arguments)
    text = re.sub(r"\s+", " ", child.communicate(timeout=30)[0])
    assert says in text
    assert child.returncode == 2


def test_an_engine_that_is_not_installed_is_named():
    with pytest.raises(InputError, match=r"pip install 'lenvm\[sglang\]'"):
        launch.serve("sglang", "G")


def test_the_users_own_flags_win():
    settings = GuidanceSettings("V", max_requests=99)
    argv, env = launch.build_command("vllm", "G", settings, extra=["--max-num-seqs=12"])
    assert argv.count("--max-num-seqs") == 0
    assert env["LENVM_MAX_REQUESTS"] == "99"
    plain, nothing = launch.build_command("vllm", "G")
    assert "--gpu-memory-utilization" not in plain
    assert not nothing


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_flag_stands_in_for_an_entry_point_that_is_not_installed(is_installed, monkeypatch):
    entry = EntryPoint("lenvm", launch.REGISTER, "vllm.general_plugins")
    monkeypatch.setattr(launch, "entry_points", lambda group: [entry] if is_installed else [])
    argv, _ = launch.build_command("vllm", "G", GuidanceSettings("V"))
    assert ("--logits-processors" in argv) == (not is_installed)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_value_models_own_server_is_the_one_that_the_page_shows(engine):
    argv, env = launch.build_values_command(engine, "runs/model", extra=["--port", "1"])
    page = (Path(__file__).parents[2] / "docs/engines.md").read_text()
    flags = [w for w in argv if w.startswith("--") and w not in ("--host", "--port")]
    assert all(flag in page for flag in flags)
    assert all(f"{name}={value}" in page for name, value in env.items())
    assert argv[-2:] == ["--port", "1"]
