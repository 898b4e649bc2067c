"""What `lenvm eval` adds to the time that an engine needs for the same requests (goal: at most 5%).

The same LIFEBench requests are sent twice: by a bare client (sockets, no parsing, no files) and by
`run_lifebench` (openai client, records, grades, bootstrap, summary). Against a stub that answers as
an engine with 64 slots does, or against a real server:

    python benchmarks/evals.py                                   # stub server, two processes
    python benchmarks/evals.py --endpoint http://HOST:PORT/v1    # real one; requests are seeded

Writes benchmarks/results/evals_overhead.json (stub) or evals_overhead_server.json.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
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


async def send_bare(url: str, bodies: list[bytes], concurrency: int) -> None:
    """POST every body over keep-alive sockets and read the replies, nothing else."""
    parts = urlsplit(url)
    source = iter(bodies)

    async def work() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 24)
        for body in source:
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
        writer.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))


def measure(
    url: str, config: LifebenchConfig, concurrency: int, model: str | None
) -> dict[str, Any]:
    """Seconds of both clients for the same requests; the eval client goes first and last."""
    endpoint = connect(url, model=model).endpoint
    seconds: dict[str, list[float]] = {"bare": [], "eval": []}
    tokens = 0
    generator = Recorder(endpoint, concurrency=concurrency)
    for turn in ("warm", "eval", "bare", "eval", "bare"):
        start = time.perf_counter()
        if turn == "bare":
            bodies = [
                json.dumps(build_body(r, endpoint.engine, endpoint.model, ())).encode()
                for r in generator.requests
            ]
            start = time.perf_counter()
            asyncio.run(send_bare(url, bodies, concurrency))
        else:
            with tempfile.TemporaryDirectory() as folder:
                summary = run_lifebench(config, generator, Path(folder))
                seconds_taken = time.perf_counter() - start
                lines = (Path(folder) / "records.jsonl").read_text().splitlines()
            if summary["num_failed"]:
                raise SystemExit(f"{summary['num_failed']} requests failed")
            tokens = sum(json.loads(line)["num_tokens"] for line in lines)
            start = time.perf_counter() - seconds_taken
        if turn != "warm":
            seconds[turn].append(time.perf_counter() - start)
            print(f"{turn}: {seconds[turn][-1]:.2f} s", flush=True)
    bare, evaluated = min(seconds["bare"]), min(seconds["eval"])
    return {
        "headline": {"overhead": evaluated / bare - 1},
        "num_requests": len(generator.requests),
        "num_tokens": tokens,
        "concurrency": concurrency,
        "seconds": seconds,
        "tokens_per_s_bare": tokens / bare,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint")
    parser.add_argument("--model")
    parser.add_argument("--file", default="/work/shared/data/lifebench/data_en.jsonl")
    parser.add_argument("--items", type=int, default=96)
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--concurrency", type=int, default=2 * SLOTS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = LifebenchConfig(
        Path(options.file),
        tuple(parse_arms(["prompt", "soft:100"], KINDS)),
        targets=tuple(options.targets),
        limit=options.items,
        sampling=Sampling(top_p=0.999, top_k=15, seed=0),
    )
    process = None
    url = options.endpoint
    if url is None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=serve_stub, args=(theirs,), daemon=True)
        process.start()
        url = ours.recv()
    try:
        result = measure(url, config, options.concurrency, options.model)
    finally:
        if process is not None:
            process.kill()
    result |= {
        "server": options.endpoint or f"stub, {SLOTS} slots of {TOKENS_PER_S:g} tokens/s",
        "command": "python " + " ".join(sys.argv),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("openai", "numpy")},
        },
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
    }
    name = "evals_overhead_server.json" if options.endpoint else "evals_overhead.json"
    path = options.output or ROOT / "benchmarks" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"overhead {result['headline']['overhead']:+.1%}; {path}")


if __name__ == "__main__":
    main()
