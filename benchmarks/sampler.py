"""How fast `lenvm sample` can go: completions per second against a stub server on this machine.

    python benchmarks/sampler.py --out benchmarks/results/sampler_cpu.json

The stub (tests/stub_server.py) runs in another process and invents completions of 1 to 80 tokens at
once, so what is measured is the client: requests, token ids, checks, records on disk. All processes
share the machine's cores. With `shards` over 1, several samplers run at once, each on its part of
the prompts and with its own file (`lenvm sample --shard I/K`).

Last, what the client leaves of a second server's gain: one endpoint, then two, that answer each
request after 0.6 s with 4 completions of 256 tokens, 24 requests in flight for each of them: about
the pace of vLLM on one H200 each under `multi_gpu.py sample --num-prompts 96 --per-endpoint 24`.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BARRIER: Any = None
sys.path.insert(0, str(ROOT / "src"))


def measure(
    urls: list[str], n: int, num_completions: int, concurrency: int, shards: int = 1
) -> dict[str, Any]:
    """Runs of the sampler from start to a closed file, `shards` of them at a time."""
    if shards == 1:
        return measure_one(urls, n, num_completions, concurrency, 0, None)
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(shards)
    with concurrent.futures.ProcessPoolExecutor(
        shards, context, initializer=_set_barrier, initargs=(together,)
    ) as pool:
        size = num_completions // shards
        jobs = [
            pool.submit(measure_one, urls, n, size, concurrency // shards, i, shards)
            for i in range(shards)
        ]
        runs = [job.result() for job in jobs]
    seconds = max(run["end"] for run in runs) - min(run["begin"] for run in runs)
    written = sum(run["num_completions"] for run in runs)
    return {
        "completions_per_prompt": n,
        "shards": shards,
        "num_completions": written,
        "num_tokens": sum(run["num_tokens"] for run in runs),
        "seconds": round(seconds, 3),
        "completions_per_s": round(written / seconds, 1),
    }


def _set_barrier(barrier: Any) -> None:
    global BARRIER
    BARRIER = barrier


def measure_one(
    urls: list[str], n: int, num_completions: int, concurrency: int, shard: int, shards: int | None
) -> dict[str, Any]:
    """One run; with `shards`, several processes begin together."""
    import aiohttp  # noqa: F401 - imported before the clock starts

    from lenvm.data.prompts import Prompt
    from lenvm.data.sampler import sample_from_endpoints

    prompts = [
        Prompt.from_text(f"Tell a story of {i} words about the sea, part {shard}.")
        for i in range(num_completions // n)
    ]
    if shards:
        BARRIER.wait()
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        cpu, begun = time.process_time(), time.perf_counter()
        report = sample_from_endpoints(
            prompts,
            Path(folder) / "t.jsonl",
            endpoints=urls,
            n=n,
            sampling={"temperature": 1.0, "max_tokens": 256},
            concurrency=concurrency,
        )
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    assert report.num_written == len(prompts) * n
    assert report.num_failed == report.num_mismatched == 0
    return {
        "completions_per_prompt": n,
        "shards": 1,
        "endpoints": len(urls),
        **({"begin": begin, "end": time.time()} if shards else {}),
        "num_completions": report.num_written,
        "num_tokens": report.num_tokens,
        "seconds": round(seconds, 3),
        "completions_per_s": round(report.num_written / seconds, 1),
        "cpu_ms_per_completion": round(1e3 * cpu / report.num_written, 3),
    }


@contextmanager
def stubs(count: int, *options: str) -> Iterator[list[str]]:
    """The URLs of stub servers, each in a process of its own."""
    argv = [sys.executable, str(ROOT / "tests" / "stub_server.py"), *options]
    children = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        yield [child.stdout.readline().strip() for child in children if child.stdout]
    finally:
        for child in children:
            child.kill()


def describe_machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}


def find_version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--num-completions", type=int, default=8000)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--concurrency", type=int, default=64)
    args = parser.parse_args()
    machine = describe_machine()
    with stubs(1, "--max-length", "80") as urls:
        measure(urls, 4, 200, args.concurrency)
        runs = []
        for n in args.n:
            size = args.num_completions // 4 if n == 1 else args.num_completions
            runs.append(measure(urls, n, size, args.concurrency))
            print(json.dumps(runs[-1]), flush=True)
        runs.append(measure(urls, 1, args.num_completions // 2, args.concurrency, shards=2))
        print(json.dumps(runs[-1]), flush=True)
    with stubs(2, "--delay", "0.6", "--min-length", "256", "--max-length", "256") as urls:
        paced = [measure(urls[:k], 4, 768, 24 * k) for k in (1, 2)]
        print(json.dumps(paced), flush=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "headline": {
            f"completions_per_s_n{r['completions_per_prompt']}_shards{r['shards']}": r[
                "completions_per_s"
            ]
            for r in runs
        }
        | {"two_endpoints_over_one": round(paced[0]["seconds"] / paced[1]["seconds"], 3)},
        "command": "python benchmarks/sampler.py " + " ".join(sys.argv[1:]),
        "hardware": machine,
        "versions": {
            "python": platform.python_version(),
            **{name: find_version(name) for name in ("aiohttp", "pydantic")},
        },
        "commit": commit,
        "concurrency": args.concurrency,
        "runs": runs,
        "paced_runs": paced,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
