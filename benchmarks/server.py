"""The embedded server under load: errors, memory, throughput, latency, predictions.

    python benchmarks/server.py --out benchmarks/results/server_cpu.json    # about 13 minutes
    python benchmarks/server.py --minutes 1 --tiny          # a check of the benchmark itself

`--clients` streaming clients ask for answers without control, with equal_to, at_most, at_least and
tilt in turn, and one in six leaves at a random token. The server is a process of its own and the
clients share its cores. `throughput_ratio` is its generated tokens/s over those of the in-process
batch loop on the same requests (same prompts, controls, limits and departures) with as many running
at once. Clients and loop draw from one series each: were every client to have its own, it would ask
for one control only, and the server's batch would hold more guided rows than the loop's. The loop
is timed before the server's minutes and again after them, so that a machine that changes its speed
shows; `others` is what the rest of the machine took of the cores meanwhile. Before the clock starts
the KV stores are filled once, since the system gives their memory only where it is first written;
the slope of the memory is that of least squares from a quarter of the time on.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from lenvm.cli import prepare_process  # noqa: E402  (the package is found from here)
from lenvm.errors import InputError  # noqa: E402

prepare_process()  # the loop in this process waits as the server's does

TOPICS = ("the sea", "bread", "a lighthouse", "rain", "the moon", "a bicycle", "tea", "old maps")
CONTROLS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"equal_to": 60},
    None,
    {"at_most": 80},
    {"at_least": 40},
    None,
    {"tilt": 5.0},
    {"equal_to": 120, "rule": "soft"},
)
LEAVES = 1 / 6
MAX_TOKENS = 160


@dataclass(frozen=True)
class Case:
    """One request of the load; the same index is the same request everywhere."""

    text: str
    control: dict[str, Any] | None
    max_tokens: int
    seed: int
    leaves_after: int | None

    @classmethod
    def build(cls, index: int, tiny: bool) -> "Case":
        draw = random.Random(index)
        words = [f"w{draw.randrange(6, 64)}" for _ in range(draw.randrange(5, 60))]
        text = f"Tell me {draw.choice(('briefly', 'something', 'a lot'))} about "
        text += draw.choice(TOPICS)
        control = CONTROLS[index % len(CONTROLS)]
        if control is not None:
            control = {"top_k": 5, "min_p": 0.02} | control
        leaves = draw.randrange(1, 60) if draw.random() < LEAVES else None
        return cls(" ".join(words) if tiny else text, control, MAX_TOKENS, index, leaves)


@dataclass
class Tally:
    """What the clients saw."""

    num_requests: int = 0
    num_left: int = 0
    num_refused: int = 0
    errors: list[str] = field(default_factory=list)
    first_s: dict[str, list[float]] = field(default_factory=lambda: {"guided": [], "free": []})
    between_s: dict[str, list[float]] = field(default_factory=lambda: {"guided": [], "free": []})


# -- the server's process -----------------------------------------------------------------------


def start_server(options: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if options.tiny:
        command = [sys.executable, __file__, "--serve-tiny", str(port)]
    else:
        code = "from lenvm.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", "--port", str(port)]
        command += ["--max-requests", str(options.clients)]
        command += ["--max-tokens", str(options.kv_tokens)]
        command += ["--lenvm", options.lenvm] if options.lenvm else []
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    return process, f"http://127.0.0.1:{port}"


def load_engine(options: argparse.Namespace) -> Any:
    if options.tiny:
        from serving import tiny_engine

        return tiny_engine(max_requests=options.clients, max_tokens=options.kv_tokens)
    from lenvm.cli._inputs import load_value_model
    from lenvm.engines.transformers import TransformersEngine
    from lenvm.model.device import pick_dtype

    return TransformersEngine.load(
        "smollm2",
        load_value_model(options.lenvm, device="cpu"),
        dtype=pick_dtype("cpu"),
        max_requests=options.clients,
        max_tokens=options.kv_tokens,
        max_candidates=256,
    )


def serve_tiny(options: argparse.Namespace) -> None:
    from lenvm.server.app import build_app
    from lenvm.server.config import ServerConfig
    from lenvm.server.run import run

    config = ServerConfig(name="tiny", port=options.serve_tiny)
    run(build_app(load_engine(options), config), config)


def cpu_s(pid: int | str = "self") -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Seconds of CPU time that the whole machine has used."""
    times = [int(x) for x in Path("/proc/stat").read_text().split()[1:9]]
    return (sum(times) - times[3] - times[4]) / os.sysconf("SC_CLK_TCK")  # idle, waiting for disks


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [x for x in status.splitlines() if x.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


# -- the clients ----------------------------------------------------------------------------------


async def ask(session: aiohttp.ClientSession, case: Case, tally: Tally) -> None:
    """One streamed request; whatever is not as it should be is an error."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": case.text}],
        "max_tokens": case.max_tokens,
        "seed": case.seed,
        "stream": True,
    }
    if case.control is not None:
        body["length"] = case.control
    side = "free" if case.control is None else "guided"
    tally.num_requests += 1
    start = last = time.perf_counter()
    tokens, done = 0, False
    async with session.post("/v1/chat/completions", json=body) as reply:
        if reply.status == 429:
            tally.num_refused += 1
            await asyncio.sleep(float(reply.headers["Retry-After"]))
            return
        if reply.status != 200:
            tally.errors.append(f"{reply.status}: {(await reply.text())[:200]}")
            return
        async for line in reply.content:
            if not line.strip():
                continue
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            if b'"error"' in line[:20]:
                tally.errors.append(line.decode()[:200])
                return
            (tally.between_s if tokens else tally.first_s)[side].append(now - last)
            last, tokens = now, tokens + 1
            if tokens == case.leaves_after:
                tally.num_left += 1
                reply.close()
                return
    if not done:
        tally.errors.append(f"the stream ended without [DONE] after {now - start:.1f} s")


async def load(options: argparse.Namespace, url: str, pid: int) -> dict[str, Any]:
    tally, memory = Tally(), list[tuple[float, float]]()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        await wait_ready(session)
        await fill_kv(session, options)
        before, start = await read_metrics(session), time.monotonic()
        busy_before, cpu_before = busy_s(), (cpu_s(pid), cpu_s())
        deadline = start + 60 * options.minutes

        indices = count()

        async def client() -> None:
            while time.monotonic() < deadline:
                try:
                    await ask(session, Case.build(next(indices), options.tiny), tally)
                except (aiohttp.ClientError, TimeoutError) as error:
                    tally.errors.append(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(0.2)

        async def watch() -> None:
            while True:
                memory.append((time.monotonic() - start, resident_mb(pid)))
                await asyncio.sleep(2)

        watcher = asyncio.create_task(watch())
        clients = [asyncio.create_task(client()) for _ in range(options.clients)]
        await asyncio.sleep(deadline - time.monotonic())
        seconds, after = time.monotonic() - start, await read_metrics(session)
        cpu = cpu_s(pid) - cpu_before[0], cpu_s() - cpu_before[1]
        others = busy_s() - busy_before - sum(cpu)
        await asyncio.gather(*clients)
        watcher.cancel()
        predictions = await predict(session, options)
        numbers = await read_metrics(session)
    warm = [(t, m) for t, m in memory if seconds / 4 <= t <= seconds]
    tokens = after["lenvm_generated_tokens_total"] - before["lenvm_generated_tokens_total"]
    step_s = numbers["lenvm_step_seconds_total"]
    return {
        "seconds": round(seconds, 1),
        "num_requests": tally.num_requests,
        "num_left": tally.num_left,
        "num_refused_429": tally.num_refused,
        "num_errors": len(tally.errors),
        "errors": tally.errors[:20],
        "num_tokens": int(tokens),
        "tokens_per_s": round(tokens / seconds, 2),
        "cpu_s": {
            "server": round(cpu[0], 1),
            "clients": round(cpu[1], 1),
            "others": round(others, 1),
        },
        "guidance_share_of_step": round(numbers["lenvm_guidance_seconds_total"] / step_s, 3),
        "memory_mb": {"start": round(warm[0][1], 1), "end": round(warm[-1][1], 1)},
        "memory_mb_by_second": {round(t): round(m) for t, m in memory[::10]},
        "memory_slope_mb_per_min": round(slope(warm) * 60, 3),
        "kv_tokens_left": numbers["lenvm_kv_tokens"],
        "time_to_first_token_s": {k: spread(v) for k, v in tally.first_s.items()},
        "inter_token_s": {k: spread(v) for k, v in tally.between_s.items()},
        "predict": predictions,
    }


async def wait_ready(session: aiohttp.ClientSession) -> None:
    for _ in range(1200):
        try:
            async with session.get("/ready") as reply:
                if reply.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit("the server did not start")


async def fill_kv(session: aiohttp.ClientSession, options: argparse.Namespace) -> None:
    """Write every page of both KV stores once, by long prompts that run together."""
    length = options.kv_tokens // options.clients - 24

    async def one(i: int) -> None:
        ids = [random.Random(i).randrange(6, 60) for _ in range(length)]
        body = {"prompt": ids, "max_tokens": 20, "ignore_eos": True, "track_length": True}
        async with session.post("/v1/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()

    await asyncio.gather(*(one(i) for i in range(options.clients)))


async def predict(session: aiohttp.ClientSession, options: argparse.Namespace) -> dict[str, Any]:
    """Prompts/s of /v1/length/predict on a server that does nothing else, by batch size."""
    found = {}
    for size in (1, 8, 32, 128):
        body = {"prompts": [Case.build(i, options.tiny).text for i in range(size)]}
        answered, start = 0, time.perf_counter()
        while time.perf_counter() - start < options.predict_s:
            async with session.post("/v1/length/predict", json=body) as reply:
                assert reply.status == 200, await reply.text()
                answered += len((await reply.json())["data"])
        found[str(size)] = round(answered / (time.perf_counter() - start), 1)
    return {"prompts_per_s_by_batch": found}


async def read_metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("lenvm_")]
    return {name: float(value) for name, value in pairs}


# -- the batch loop -------------------------------------------------------------------------------


def batch_loop(engine: Any, options: argparse.Namespace, window_s: float) -> dict[str, Any]:
    """The same requests in this process, without a server: tokens/s. Leaves the engine empty."""
    from lenvm.engines.request import Request
    from lenvm.engines.sampling import SamplingParams
    from lenvm.guidance.request import LengthControl
    from lenvm.model.tokenization import encode_prompt

    index, num_tokens = 0, 0
    departures: dict[str, int | None] = {}
    start, busy_before, cpu_before = time.monotonic(), busy_s(), cpu_s()
    deadline = start + window_s
    while time.monotonic() < deadline:
        while engine.num_unfinished < options.clients:
            case = Case.build(index, options.tiny)
            prompt = encode_prompt(engine.tokenizer, [{"role": "user", "content": case.text}])
            control = LengthControl.parse(case.control) if case.control else None
            sampling = SamplingParams(max_tokens=case.max_tokens, seed=case.seed)
            departures[str(index)] = case.leaves_after
            engine.submit(Request(str(index), tuple(prompt), sampling, control, stream=True))
            index += 1
        for completion in engine.step():
            num_tokens += 1
            leaves = departures[completion.request.id]
            if completion.finish_reason is None and len(completion.token_ids) == leaves:
                engine.cancel(completion.request.id)
    seconds, cpu = time.monotonic() - start, cpu_s() - cpu_before
    for name in departures:
        with suppress(InputError):  # it has ended
            engine.cancel(name)
    return {
        "seconds": round(seconds, 1),
        "num_tokens": num_tokens,
        "tokens_per_s": round(num_tokens / seconds, 2),
        "cpu_s": {"loop": round(cpu, 1), "others": round(busy_s() - busy_before - cpu, 1)},
    }


# -- numbers --------------------------------------------------------------------------------------


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares: y per x."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread_x = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / max(spread_x, 1e-9)


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    picks = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    at = {name: ordered[int(q * (len(ordered) - 1))] for name, q in picks.items()}
    return {name: round(value, 4) for name, value in at.items()} | {"count": len(values)}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.machine()


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kv-tokens", type=int, default=12_288)
    parser.add_argument("--lenvm", help="value model folder; default: the package's")
    parser.add_argument(
        "--loop-share", type=float, default=0.2, help="of --minutes, for the batch loop"
    )
    parser.add_argument("--predict-s", type=float, default=10.0, help="seconds a batch size")
    parser.add_argument("--tiny", action="store_true", help="tiny random models")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve-tiny", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_tiny:
        options.tiny = True
        serve_tiny(options)
        return
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "-s", "src") else "")
    load_before = os.getloadavg()[0]
    engine = load_engine(options)
    window_s = 60 * options.minutes * options.loop_share / 2
    batch_loop(engine, options, min(10.0, window_s))  # warm up
    loops = [batch_loop(engine, options, window_s)]
    process, url = start_server(options)
    try:
        server = asyncio.run(load(options, url, process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    loops.append(batch_loop(engine, options, window_s))
    loop_tokens_per_s = sum(x["num_tokens"] for x in loops) / sum(x["seconds"] for x in loops)
    result = {
        "headline": {
            "errors": server["num_errors"],
            "memory_slope_mb_per_min": server["memory_slope_mb_per_min"],
            "throughput_ratio": round(server["tokens_per_s"] / loop_tokens_per_s, 3),
        },
        "command": "python " + " ".join(sys.argv),
        "model": "tiny random models" if options.tiny else "SmolLM2-135M-Instruct, its value model",
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_before": round(load_before, 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")},
        },
        "commit": commit,
        "clients": options.clients,
        "kv_tokens": options.kv_tokens,
        "server": server,
        "batch_loop": {"tokens_per_s": round(loop_tokens_per_s, 2), "before_and_after": loops},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
