"""The servers that stages ask: their commands, starting, waiting until they answer, stopping."""

import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lenvm.errors import EndpointError, InputError
from lenvm.pipeline import processes
from lenvm.pipeline.config import ServerConfig

Say = Callable[[str], None]
HOST = "127.0.0.1"


def server_argv(config: ServerConfig, model: str, port: int) -> list[str]:
    """What starts one replica."""
    model = config.model or model
    where = ["--host", HOST, "--port", str(port)]
    python = [sys.executable, "-m"]
    if config.engine == "command":
        return [p.replace("{port}", str(port)).replace("{model}", model) for p in config.command]
    if config.engine == "lenvm" or config.lenvm:
        engine = [] if config.engine == "lenvm" else ["--engine", config.engine]
        guide = ["--lenvm", config.lenvm] if config.lenvm else []
        argv = [*python, "lenvm", "serve", *engine, "--model", model, *guide, *where]
    elif config.engine == "vllm":
        gpus = ["--tensor-parallel-size", str(config.gpus)] if config.gpus > 1 else []
        argv = ["vllm", "serve", model, *where, *gpus]
    elif config.engine == "sglang":
        gpus = ["--tp-size", str(config.gpus)] if config.gpus > 1 else []
        argv = [*python, "sglang.launch_server", "--model-path", model, *where, *gpus]
    else:
        raise InputError(f"engine {config.engine!r} is not started by the pipeline")
    return [*argv, *config.arguments]


def server_environment(config: ServerConfig, replica: int) -> dict[str, str]:
    """What is set for one replica besides the pipeline's own environment."""
    return {**_devices(config.gpus, replica), **config.environment}


def check_installed(name: str, config: ServerConfig) -> None:
    """InputError where the engine is not there."""
    there = {
        "vllm": shutil.which("vllm") is not None,
        "sglang": find_spec("sglang") is not None,
        "command": not config.command or shutil.which(config.command[0]) is not None,
    }
    if not there.get(config.engine, True):
        what = config.command[0] if config.engine == "command" else config.engine
        raise InputError(
            f"server {name} needs {what}, which is not installed here; install it (for vllm and "
            f"sglang: pip install 'lenvm[{what}]'), or set servers.{name}.engine to another"
        )


@dataclass
class RunningServers:
    """The replicas of one server, started; `stop` ends them."""

    name: str
    config: ServerConfig
    model: str
    logs: Path
    endpoints: list[str] = field(default_factory=list)
    children: list[Any] = field(default_factory=list)

    def start(self, say: Say) -> None:
        """Start all replicas and wait until each answers. Raises EndpointError where one does not,
        with the end of its log; nothing keeps running then."""
        if self.config.engine == "running":
            self.endpoints = list(self.config.endpoints)
            self._wait(say)
            return
        try:
            for replica in range(self.config.replicas):
                port = free_port() if self.config.port is None else self.config.port + replica
                argv = server_argv(self.config, self.model, port)
                log = self._log(replica)
                say(f"server {self.name}-{replica}: {shlex.join(argv)} (log: {log})")
                environment = server_environment(self.config, replica)
                self.children.append(processes.start(argv, environment, log))
                self.endpoints.append(f"http://{HOST}:{port}/v1")
            self._wait(say)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        processes.end(self.children)
        self.children, self.endpoints = [], []

    def describe_dead(self) -> str:
        """What has become of replicas that ended by themselves; empty where all run."""
        return "".join(
            f"\nserver {self.name}-{i} ended with exit code {child.returncode}, see {self._log(i)}"
            for i, child in enumerate(self.children)
            if child.poll() is not None
        )

    def _log(self, replica: int) -> Path:
        return self.logs / f"{self.name}-{replica}.log"

    def _wait(self, say: Say) -> None:
        begun = time.monotonic()
        waiting = list(enumerate(self.endpoints))
        while waiting:
            waiting = [(i, url) for i, url in waiting if not is_ready(url)]
            for replica, url in waiting:
                self._check(replica, url, time.monotonic() - begun)
            if waiting:
                time.sleep(0.25)
        say(f"server {self.name}: ready after {time.monotonic() - begun:.0f} s")

    def _check(self, replica: int, url: str, waited_s: float) -> None:
        child = self.children[replica] if self.children else None
        code = None if child is None else child.poll()
        if code is None and waited_s < self.config.ready_timeout_s:
            return
        why = f"did not answer within {waited_s:.0f} s"
        if code is not None:
            why = f"ended with exit code {code} before it answered"
        end = f":\n{read_end(self._log(replica))}" if child is not None else ""
        raise EndpointError(f"server {self.name}-{replica} at {url} {why}{end}")


def is_ready(url: str) -> bool:
    """True when a server lists its models."""
    import httpx

    try:
        return httpx.get(f"{url.rstrip('/')}/models", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def read_end(path: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (an empty log)"


def _devices(gpus: int, replica: int) -> dict[str, str]:
    """Each replica has GPUs of its own, out of those that the run may see."""
    if gpus == 0:
        return {}
    wanted = range(replica * gpus, (replica + 1) * gpus)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, wanted))}
    names = [name for name in seen.split(",") if name]
    if len(names) <= wanted[-1]:
        raise InputError(
            f"replica {replica} needs GPUs {wanted[0]} to {wanted[-1]}, but CUDA_VISIBLE_DEVICES "
            f"is {seen!r}; lower replicas or gpus (0 leaves the devices as they are)"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[i] for i in wanted)}
