"""Grading many answers in processes of their own, each answer within a time limit.

An answer whose grading hangs or crashes is wrong, and says so in `grader_error`. Equal (answer,
gold) pairs are graded once.
"""

import importlib.util
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lenvm.errors import InputError
from lenvm.evals.tradeoff.grader import Kind

TIMEOUT_S = 20.0
COMMAND = ["-m", "lenvm.evals.tradeoff.grading_worker"]
PACKAGE_ROOT = str(Path(__file__).parents[3])


@dataclass(frozen=True)
class Task:
    """An answer to grade; the arguments of `grade_answer`."""

    text: str
    gold: str
    kind: Kind
    options: tuple[str, ...] = ()
    complete: bool = True


Result = dict[str, Any]
"""`correct`, `extracted`, `grader_error`."""


def grade_all(
    tasks: Sequence[Task],
    *,
    num_processes: int = 2,
    timeout_s: float = TIMEOUT_S,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Results in the order of the tasks. Raises InputError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("grading needs math-verify: pip install 'lenvm[evals]'")
    unique = list(dict.fromkeys(tasks))
    workers = [_Worker() for _ in range(min(num_processes, len(unique)))]
    results: dict[Task, Result] = {}
    try:
        waiting = iter(unique)
        busy = {w: t for w in workers if (t := next(waiting, None)) is not None}
        for worker, task in busy.items():
            worker.send(task)
        while busy:
            for worker in _first_ready(list(busy), timeout_s):
                task = busy.pop(worker)
                results[task] = worker.receive(timeout_s)
                on_progress(len(results), len(unique))
                if (following := next(waiting, None)) is not None:
                    worker.send(following)
                    busy[worker] = following
    finally:
        for worker in workers:
            worker.stop()
    return [results[task] for task in tasks]


def _first_ready(workers: list["_Worker"], timeout_s: float) -> list["_Worker"]:
    """Workers with a reply, or all of them when the time is up for everyone."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        ready = [key.data for key, _ in selector.select(timeout_s)]
    return ready or workers


class _Worker:
    """One grading process; started again when it has to be killed."""

    def __init__(self) -> None:
        self._start()

    @property
    def stdout(self) -> Any:
        return self._process.stdout

    def send(self, task: Task) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died: receive finds out
            self._process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout_s: float) -> Result:
        """The reply that is there; a process without one is killed and replaced."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            ready = bool(selector.select(0))
        line = self.stdout.readline() if ready else b""
        if line:
            return dict(json.loads(line))
        what = "crashed" if ready else f"took over {timeout_s:g} s"
        self.stop()
        self._start()
        return {"correct": False, "extracted": None, "grader_error": f"grading {what}"}

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGE_ROOT, *sys.path])},
        )
