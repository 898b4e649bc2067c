"""Child processes that end with their parent and pass on its signals.

A child leads a process group of its own, so that a terminal's Ctrl-C reaches the pipeline alone,
which passes it on once. Where the pipeline itself is killed, the kernel ends the child (Linux).
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 60.0
"""How long a process may take to end after it was asked to."""
_SET_PARENT_DEATH_SIGNAL = 1


class Interrupted(KeyboardInterrupt):
    """The pipeline was asked to end by `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def raising_signals() -> Iterator[None]:
    """Signals that ask to end become `Interrupted` in the main thread, the first one only: those
    that follow do not disturb the ending."""
    ending = False

    def handle(signum: int, _: Any) -> None:
        nonlocal ending
        if not ending:
            ending = True
            raise Interrupted(signum)

    before = {s: signal.signal(s, handle) for s in FORWARDED}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def start(
    argv: Sequence[str], environment: Mapping[str, str], log: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a process; its output goes to `log` (appended), else where the pipeline's goes."""
    env = {**os.environ, **environment}
    if log is None:
        return _open(argv, env, None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return _open(argv, env, file)


def _open(argv: Sequence[str], env: Mapping[str, str], output: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        list(argv),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


_LIBC: Any = ctypes.CDLL(None)


def wait(process: "subprocess.Popen[bytes]") -> int:
    """Exit code of a process; `Interrupted` is passed on to it first, and it is waited for."""
    try:
        return process.wait()
    except Interrupted as interrupted:
        end([process], interrupted.signum)
        raise


def end(
    processes: Sequence["subprocess.Popen[bytes]"],
    signum: int = signal.SIGTERM,
    grace_s: float = GRACE_S,
) -> None:
    """Ask process groups to end, wait, and kill what is left of them."""
    for process in processes:
        _signal_group(process, signum)
    deadline = time.monotonic() + grace_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: "subprocess.Popen[bytes]", signum: int) -> None:
    """Send to the group, whose number is its leader's: also to workers that outlived it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)
