"""What `lenvm eval` adds to the time that an engine needs for the same requests (goal: at most 5%).

The same seeded LIFEBench requests go to one server twice over, in turns: by a bare client (sockets,
no parsing, no files) and by `run_lifebench` (openai client, records, grades, bootstrap, summary).
One command measures both servers: a stub that answers as an engine with 64 slots does, and the
embedded server (`lenvm serve`) with the bundled model on this machine's CPU, which shares its cores
with the clients.

    python benchmarks/evals.py                                     # both, under 4 minutes
    python benchmarks/evals.py --only stub                         # or: --only real
    python benchmarks/evals.py --only real --endpoint http://HOST:PORT/v1   # a server that runs

Seconds are those of sending, recording and grading; `start_s` is what `lenvm eval` takes from the
command line to its summary for one token: Python's start and the questions to the server. Writes
benchmarks/results/evals_overhead.json; the headline is the better turn of each client.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
sys.path[0:1] = [str(ROOT / "src"), str(ROOT / "tests")]  # not this folder: it has an evals too

from lenvm.evals.arms import parse_arms  # noqa: E402
from lenvm.evals.client import HttpGenerator, connect  # noqa: E402
from lenvm.evals.generator import GenerationRequest, Sampling  # noqa: E402
from lenvm.evals.lifebench.arms import KINDS  # noqa: E402
from lenvm.evals.lifebench.run import LifebenchConfig, run_lifebench  # noqa: E402
from lenvm.evals.wire import build_body  # noqa: E402

LENVM = [sys.executable, "-m", "lenvm"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
LIFEBENCH = Path("/work/shared/data/lifebench/data_en.jsonl")
RESULT = ROOT / "benchmarks" / "results" / "evals_overhead.json"
SLOTS = 64
TOKENS_PER_S = 400.0
"""Of one slot: 64 slots make 25,600 tokens/s, a small model on a large GPU."""
WORDS = ("the", "value", "of", "a", "state", "is", "how", "many", "tokens", "are", "to", "come")


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """As many tokens as asked for, give or take a third; the same for the same seed."""
    from evals.stub import find_control, say

    rng = random.Random(body["seed"])
    goal = (find_control(body) or {}).get("equal_to", 400)
    num = max(2, round(goal * rng.uniform(0.67, 1.33)))
    return say(" ".join(rng.choices(WORDS, k=num - 1)) + ".", num)


def serve_stub(connection: Any) -> None:
    """The stub in a process of its own, as an engine is."""
    from evals.stub import Stub, serve

    replies: dict[int, dict[str, Any]] = {}

    def prepared(body: dict[str, Any]) -> dict[str, Any]:
        if body["seed"] not in replies:
            replies[body["seed"]] = answer(body)
        return replies[body["seed"]]

    def delay(body: dict[str, Any]) -> float:
        if "seed" not in body:
            return 0.0
        return float(prepared(body)["usage"]["completion_tokens"]) / TOKENS_PER_S

    stub = Stub(answer=prepared, delay_s=delay, slots=SLOTS, max_length=None)

    async def run() -> None:
        await serve(stub, lambda: connection.send(stub.url), asyncio.Event())

    asyncio.run(run())


class Recorder(HttpGenerator):
    """The HTTP generator, keeping the requests it sends."""

    requests: list[GenerationRequest]

    def generate(self, requests: Any, on_response: Any) -> None:
        self.requests = list(requests)
        super().generate(self.requests, on_response)


async def send_bare(url: str, bodies: list[bytes], concurrency: int) -> list[bytes]:
    """POST every body over keep-alive sockets and read the replies, nothing else."""
    parts = urlsplit(url)
    host = parts.netloc.encode()
    source, replies = iter(bodies), list[bytes]()

    async def work() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 24)
        for body in source:
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: %b\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % (host, len(body))
                + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0]:
                raise SystemExit(f"a bare request failed: {head[:200]!r}")
            length = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            replies.append(await reader.readexactly(length))
        writer.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return replies


@contextmanager
def stub_server() -> Iterator[str]:
    """URL of the stub, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve_stub, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()


@contextmanager
def embedded_server(device: str) -> Iterator[str]:
    """URL of `lenvm serve` with the bundled model, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*LENVM, "serve", "--port", str(port), "--device", device]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"{url}/ready"):
                break
            if process.poll() is not None:
                raise SystemExit("lenvm serve did not start; run it by hand to see why")
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(60)


def measure(url: str, config: LifebenchConfig, concurrency: int, turns: str) -> dict[str, Any]:
    """Seconds of both clients for the same requests. turns: e(val), b(are), in order."""
    endpoint = connect(url).endpoint
    generator = Recorder(endpoint, concurrency=concurrency)
    start_s = time_start(url, config.file)
    seconds: dict[str, list[float]] = {"bare": [], "eval": []}
    tokens: dict[str, list[int]] = {"bare": [], "eval": []}
    evaluate(replace(config, limit=2), generator)  # connections, caches, the server's memory
    for turn in turns:
        name = "eval" if turn == "e" else "bare"
        if turn == "e":
            taken, num_tokens = evaluate(config, generator)
        else:
            bodies = [
                json.dumps(build_body(r, endpoint.engine, endpoint.model, ())).encode()
                for r in generator.requests
            ]
            start = time.perf_counter()
            replies = asyncio.run(send_bare(url, bodies, concurrency))
            taken = time.perf_counter() - start
            num_tokens = sum(json.loads(r)["usage"]["completion_tokens"] for r in replies)
        seconds[name].append(round(taken, 3))
        tokens[name].append(num_tokens)
        print(f"{name}: {taken:.2f} s, {num_tokens} tokens", flush=True)
    bare, evaluated = min(seconds["bare"]), min(seconds["eval"])
    return {
        "overhead": round(evaluated / bare - 1, 4),
        "num_requests": len(generator.requests),
        "num_tokens": tokens,
        "concurrency": concurrency,
        "seconds": seconds,
        "tokens_per_s_bare": round(tokens["bare"][0] / bare, 1),
        "start_s": round(start_s, 2),
    }


def evaluate(config: LifebenchConfig, generator: Recorder) -> tuple[float, int]:
    """(seconds of a whole run in a new folder, its tokens)."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        summary = run_lifebench(config, generator, Path(folder))
        taken = time.perf_counter() - start
        lines = (Path(folder) / "records.jsonl").read_text().splitlines()
    if summary["num_failed"]:
        raise SystemExit(f"{summary['num_failed']} requests failed")
    return taken, sum(json.loads(line)["num_tokens"] for line in lines)


def time_start(url: str, file: Path) -> float:
    """Seconds of `lenvm eval lifebench` for one answer of one token."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*LENVM, "eval", "lifebench", str(file), "-o", folder, "--endpoint", url]
        command += ["--arm", "truncate", "--target", "1", "--limit", "1", "--seed", "0"]
        start = time.perf_counter()
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["stub", "real"])
    parser.add_argument("--endpoint", help="a real server that runs; default: one is started")
    parser.add_argument("--device", default="cpu", help="of the server that is started")
    parser.add_argument("--file", type=Path, default=LIFEBENCH)
    parser.add_argument("--items", type=int, default=96, help="stub")
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--real-items", type=int, default=24)
    parser.add_argument("--real-targets", type=int, nargs="+", default=[64])
    parser.add_argument("--real-concurrency", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()

    def configure(arms: list[str], targets: list[int], items: int, **more: Any) -> LifebenchConfig:
        return LifebenchConfig(
            options.file,
            tuple(parse_arms(arms, KINDS)),
            targets=tuple(targets),
            limit=items,
            sampling=Sampling(top_p=0.999, top_k=15, seed=0),
            **more,
        )

    load_before = os.getloadavg()[0]
    found: dict[str, Any] = {}
    if options.only != "real":
        config = configure(["prompt", "soft:100"], options.targets, options.items)
        with stub_server() as url:
            found["stub"] = measure(url, config, 2 * SLOTS, "ebbe")
        found["stub"]["server"] = f"stub, {SLOTS} slots of {TOKENS_PER_S:g} tokens/s"
    if options.only != "stub":
        arms, limit = ["truncate", "conditional:1"], round(1.5 * max(options.real_targets))
        config = configure(arms, options.real_targets, options.real_items, max_tokens=limit)
        server = (
            nullcontext(options.endpoint) if options.endpoint else embedded_server(options.device)
        )
        with server as url:
            found["real"] = measure(url, config, options.real_concurrency, "ebbeeb")
        found["real"]["server"] = (
            options.endpoint or f"lenvm serve, bundled model, {options.device}"
        )
    result = {
        "headline": {name: part["overhead"] for name, part in found.items()},
        **found,
        "command": "python " + " ".join(sys.argv),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "load_before": round(load_before, 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("openai", "numpy", "torch", "transformers")},
        },
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    shares = ", ".join(f"{name} {share:+.1%}" for name, share in result["headline"].items())
    print(f"overhead: {shares}; {options.output}")


if __name__ == "__main__":
    main()
