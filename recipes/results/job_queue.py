"""A queue of jobs for a machine that is lent in short calls: it works on while nobody is looking.

A call of the GPU tool ends, but what it started in a session of its own goes on until the machine
goes back. So one call starts this queue, the next ones bring models, add jobs and fetch results,
and the GPUs are never idle. Standard library only.

    python3 job_queue.py serve DAY           # the queue, in the background
    python3 job_queue.py watch DAY SECONDS   # until a job ends or the seconds are over

DAY/jobs/NAME.json: {"slot": "0a", "command": "...", "when": "shell condition", "timeout_s": 300}.
Jobs of a slot run one after another, in the order of their names; the slot's first character is
the GPU that they see ("-" for none). A job begins when its condition holds. Output goes to
DAY/logs/NAME.log; $JOB_OUT, DAY/out/NAME, is for results; DAY/done/NAME holds the exit code.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 1.0


def serve(day: Path) -> None:
    """Run jobs as they come, for as long as the machine is there."""
    running: dict[str, tuple[str, subprocess.Popen[bytes], float]] = {}
    for name in ("jobs", "logs", "out", "done"):
        (day / name).mkdir(parents=True, exist_ok=True)
    while True:
        for slot, (name, child, end) in list(running.items()):
            late = time.monotonic() > end
            if late:
                stop(child)
            if child.poll() is not None:
                code = f"{child.returncode} late" if late else str(child.returncode)
                (day / "done" / name).write_text(code)
                del running[slot]
        taken = {name for name, _, _ in running.values()}
        waiting: set[str] = set(running)
        for path in sorted((day / "jobs").glob("*.json")):
            name, job = path.stem, json.loads(path.read_text())
            if (day / "done" / name).exists() or name in taken or job["slot"] in waiting:
                continue
            if job.get("when") and subprocess.run(job["when"], shell=True).returncode != 0:
                if not job.get("yields"):
                    waiting.add(job["slot"])
                continue
            waiting.add(job["slot"])
            running[job["slot"]] = (name, start(day, name, job), end_of(job))
        time.sleep(POLL_S)


def start(day: Path, name: str, job: dict[str, Any]) -> subprocess.Popen[bytes]:
    out = day / "out" / name
    out.mkdir(parents=True, exist_ok=True)
    gpu = job["slot"].split(":")[0].rstrip("abcdefgh")
    env = {**os.environ, "JOB_OUT": str(out), "CUDA_VISIBLE_DEVICES": "" if gpu == "-" else gpu}
    with (day / "logs" / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            ["bash", "-c", job["command"]],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=day,
            start_new_session=True,
        )


def end_of(job: dict[str, Any]) -> float:
    return time.monotonic() + float(job.get("timeout_s", 600))


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a job and all that it started."""
    for number in (15, 9):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue


def watch(day: Path, seconds: float) -> None:
    """Say what ends within `seconds`, with the last lines of its log; return at the first end."""
    seen = day / "seen"
    seen.mkdir(exist_ok=True)
    end = time.monotonic() + seconds
    while True:
        new = [p for p in sorted((day / "done").glob("*")) if not (seen / p.name).exists()]
        if new or time.monotonic() > end:
            break
        time.sleep(POLL_S)
    for path in new:
        (seen / path.name).touch()
        print(f"== {path.name}: exit {path.read_text()}\n{tail(day, path.name, 2500)}")
    for path in sorted((day / "jobs").glob("*.json")):
        name = path.stem
        if not (day / "done" / name).exists():
            log = day / "logs" / f"{name}.log"
            print(f"-- {name}: {'running' if log.exists() else 'waiting'} {tail(day, name, 300)}")


def tail(day: Path, name: str, size: int) -> str:
    log = day / "logs" / f"{name}.log"
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    kept = [x[:400] for x in lines if "it/s" not in x and "Loading weights" not in x]
    return "\n".join(kept)[-size:]


if __name__ == "__main__":
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "serve":
        serve(folder)
    else:
        watch(folder, float(sys.argv[3]))
