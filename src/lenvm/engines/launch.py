"""`serve`: a stock engine server as a child process, with the flags that length control needs.

The command is printed, so that it can be copied and run without lenvm's launcher. The server's log
streams through, SIGINT and SIGTERM are passed on, and its exit status is ours.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Literal

from lenvm.engines.settings import GuidanceSettings
from lenvm.errors import EndpointError, InputError

Engine = Literal["vllm", "sglang"]
PROCESSOR = "lenvm.engines.vllm.guidance:LengthGuidance"
REGISTER = "lenvm.engines.vllm:register"


def build_command(
    engine: Engine,
    model: str,
    settings: GuidanceSettings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    extra: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """(argv, environment to add) of a server that generates with `model`, guided by the settings'
    value model where there is one. `extra` are the engine's own flags and win over ours.

    InputError for an unknown engine, and for speculative decoding beside a value model.
    """
    head = {
        "vllm": [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model],
        "sglang": [sys.executable, "-m", "sglang.launch_server", "--model-path", model],
    }
    if engine not in head:
        raise InputError(f"engine is {engine!r}; allowed: {', '.join(head)}")
    command = [*head[engine], "--host", host, "--port", str(port)]
    if settings is None:
        return [*command, *extra], {}
    given = {word.split("=")[0] for word in extra}
    if speculative := sorted(word for word in given if word.startswith("--speculative")):
        raise InputError(
            f"{speculative[0]}: speculative decoding skips logits processors, so it does not go "
            "with length control; leave it out, or serve with --lenvm none"
        )
    flags = _vllm_flags(settings) if engine == "vllm" else _sglang_flags(settings)
    for name, value in flags.items():
        if name not in given:
            command += [name] if value is None else [name, value]
    return [*command, *extra], settings.to_env()


def build_values_command(
    engine: Engine,
    checkpoint: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    extra: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """(argv, environment to add) of a server of the value model itself: per-token values.

    docs/engines.md says how each engine is asked. InputError for an unknown engine.
    """
    command, _ = build_command(engine, checkpoint, host=host, port=port)
    override = json.dumps({"architectures": ["LengthValueModel"]})
    if engine == "vllm":
        return [*command, "--runner", "pooling", "--hf-overrides", override, *extra], {}
    command += ["--is-embedding", "--cuda-graph-backend-prefill", "disabled"]
    command += ["--json-model-override-args", override]
    return [*command, *extra], {"SGLANG_EXTERNAL_MODEL_PACKAGE": "lenvm.engines.sglang"}


def serve(
    engine: Engine,
    model: str,
    lenvm: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    extra: Sequence[str] = (),
    max_candidates: int = 16,
    max_requests: int = 256,
    gpu_memory: float = 0.15,
    startup_timeout_s: float = 900.0,
    on_ready: Callable[[str], None] | None = None,
    echo: Callable[[str], None] = print,
) -> int:
    """Run the engine's own server until it ends; its exit status. Blocks.

    lenvm: the value model's folder; None serves without one. on_ready gets the server's base URL
    once it answers. Raises InputError for an engine that is unknown or not installed, EndpointError
    where the server ends or does not answer within `startup_timeout_s`.
    """
    if engine in ("vllm", "sglang") and find_spec(engine) is None:
        raise InputError(f"{engine} is not installed: pip install 'lenvm[{engine}]'")
    settings = None
    if lenvm is not None:
        settings = GuidanceSettings(lenvm, max_candidates, max_requests, gpu_memory)
    argv, env = build_command(engine, model, settings, host=host, port=port, extra=extra)
    return run_server(
        argv,
        env,
        f"http://{host}:{port}",
        startup_timeout_s=startup_timeout_s,
        on_ready=on_ready,
        echo=echo,
    )


def run_server(
    argv: Sequence[str],
    env: dict[str, str],
    url: str,
    *,
    startup_timeout_s: float = 900.0,
    on_ready: Callable[[str], None] | None = None,
    echo: Callable[[str], None] = print,
) -> int:
    """Start a server, print its command, wait until `url`/health answers, pass signals on."""
    echo(format_command(argv, env))
    child = subprocess.Popen(
        argv,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C at the terminal reaches it once, from us
    )
    reader = threading.Thread(target=_stream, args=(child, echo), daemon=True)
    reader.start()
    restore = _forward_signals(child)
    try:
        _wait_until_healthy(child, url, startup_timeout_s)
        echo(f"ready: {url}/v1")
        if on_ready is not None:
            on_ready(url)
        status = child.wait()
    except BaseException:
        _stop(child)
        raise
    finally:
        restore()
        reader.join(timeout=5.0)
        if child.stdout is not None:
            child.stdout.close()
    return 0 if status in (-signal.SIGTERM, -signal.SIGINT) else status


def format_command(argv: Sequence[str], env: dict[str, str]) -> str:
    """One line that a shell runs."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in env.items()), shlex.join(argv)])


# -- inside ---------------------------------------------------------------------------------------


def _vllm_flags(settings: GuidanceSettings) -> dict[str, str | None]:
    flags: dict[str, str | None] = {
        "--max-num-seqs": str(settings.max_requests),
        "--gpu-memory-utilization": f"{0.92 - settings.gpu_memory:.2f}",
    }
    found = entry_points(group="vllm.general_plugins")
    if not any(entry.value == REGISTER for entry in found):  # lenvm runs from its sources
        flags["--logits-processors"] = PROCESSOR
    return flags


def _sglang_flags(settings: GuidanceSettings) -> dict[str, str | None]:
    return {
        "--enable-custom-logit-processor": None,
        "--max-running-requests": str(settings.max_requests),
        "--mem-fraction-static": f"{0.85 - settings.gpu_memory:.2f}",
    }


def _stream(child: "subprocess.Popen[str]", echo: Callable[[str], None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        echo(line.rstrip("\n"))


def _forward_signals(child: "subprocess.Popen[str]") -> Callable[[], None]:
    """SIGINT and SIGTERM go to the server; call what is returned to undo."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def forward(number: int, _frame: object) -> None:
        if child.poll() is None:
            child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


def _wait_until_healthy(child: "subprocess.Popen[str]", url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = child.poll()
        if status in (-signal.SIGTERM, -signal.SIGINT):
            return
        if status is not None:
            raise EndpointError(
                f"the server ended with status {status} before it answered; its log says why"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5.0) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.25)
    raise EndpointError(f"{url}/health did not answer within {timeout_s:g} s; its log says why")


def _stop(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
