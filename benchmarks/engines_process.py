"""One engine of `engines.py` as a child process, and calls to one that serves."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class Engine:
    """A worker process (engines_worker.py), or whatever prints its lines."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log.open("w")
        self.child = subprocess.Popen(
            argv,
            env={**os.environ, **env},
            text=True,
            errors="replace",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.answers: list[Any] = []
        self.ready = threading.Event()
        self.arrived = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.log.write(line)
            self.log.flush()
            if line.startswith("@@"):
                self._put(json.loads(line[2:]))
            elif line.startswith("ready: http"):
                self._put({"ready": line.strip()})
        self._put({"error": "the process ended; its log says why", "ended": True})

    def _put(self, value: Any) -> None:
        with self.arrived:
            self.answers.append(value)
            self.arrived.notify_all()

    def wait(self, timeout_s: float) -> Any:
        with self.arrived:
            if not self.arrived.wait_for(lambda: self.answers, timeout=max(1.0, timeout_s)):
                return {"error": f"no answer in {timeout_s:.0f} s", "ended": True}
            return self.answers.pop(0)

    def ask(self, command: dict[str, Any], timeout_s: float = 120.0) -> Any:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(command) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process is gone", "ended": True}
        return self.wait(timeout_s)

    def generate(self, requests: list[dict[str, Any]]) -> list[Any]:
        answer = self.ask({"do": "generate", "requests": requests})
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return list(answer)

    def stop(self) -> int | None:
        with contextlib.suppress(BrokenPipeError, OSError):
            if self.child.stdin is not None:
                self.child.stdin.write("\n")
                self.child.stdin.close()
        try:
            return self.child.wait(timeout=15.0)
        except subprocess.TimeoutExpired:
            self.child.send_signal(signal.SIGTERM)
        try:
            return self.child.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self.child.kill()
            return None


def call(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()[:500]


def stream(url: str, body: dict[str, Any], leave_after: int | None = None) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; `leave_after` so many the client goes away."""
    request = urllib.request.Request(
        url, json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
    )
    chunks: list[dict[str, Any]] = []
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                chunks.append(json.loads(line[6:]))
            if len(chunks) == leave_after:
                break
    return chunks
