"""n completions per prompt, from one or several completers, into a trajectory file.

Which completions are missing follows from the file alone, so that a run that was killed at any
moment goes on where it stopped: nothing finished is lost, nothing is written twice. Requests are
made as they are needed and records are written as they come, so memory does not grow with either.
A request that fails is tried again, then recorded beside the output as failed and counted. An
endpoint that only fails is set aside and named, and the others take over its requests (`pool`).
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lenvm.data.completers import (
    Completer,
    HttpCompleter,
    SampleRequest,
    ServerKind,
    TextEncoder,
    check_images,
    connect_all,
)
from lenvm.data.pool import Pool, SampleReport, failures_path
from lenvm.data.prompts import Prompt
from lenvm.errors import DataError, InputError
from lenvm.files import JsonlWriter, claim, read_jsonl

Progress = Callable[[str, int, int], None]
Control = Mapping[str, Any] | None


def sample_from_endpoints(
    prompts: Sequence[Prompt],
    path: Path,
    *,
    endpoints: Sequence[str],
    model: str | None = None,
    n: int = 1,
    sampling: Mapping[str, Any] | None = None,
    controls: Sequence[Control] = (),
    encoder: TextEncoder | None = None,
    server: ServerKind | None = None,
    concurrency: int = 64,
    api_key: str = "none",
    timeout_s: float = 3600.0,
    progress: Progress = lambda *_: None,
    **options: Any,
) -> SampleReport:
    """Append the missing ones of n completions per prompt, from OpenAI-compatible servers.

    sampling: temperature, top_p, top_k, min_p, seed, max_tokens and whatever else the server takes.
    controls: length controls (JSON objects, None for unguided) cycled over a prompt's completions.
    encoder re-tokenises for servers without token ids. `options` go to `run_sampling`.

    Raises InputError where `path` holds a run with other settings, EndpointError where no endpoint
    is left (what was finished stays), DataError where the disk is full.
    """
    if not endpoints:
        raise InputError("no endpoint: give at least one, such as http://127.0.0.1:8000/v1")

    async def run() -> SampleReport:
        completers = [
            HttpCompleter(
                url,
                model,
                api_key=api_key,
                encoder=encoder,
                server=server,
                timeout_s=timeout_s,
            )
            for url in dict.fromkeys(endpoints)
        ]
        try:
            name, dead = await connect_all(completers)
            return await run_sampling(
                prompts,
                path,
                [c for c in completers if c.name not in dead],
                model=name,
                n=n,
                sampling=sampling or {},
                controls=controls,
                concurrency=concurrency,
                progress=progress,
                set_aside=dead,
                busy_s=timeout_s,
                **options,
            )
        finally:
            for completer in completers:
                await completer.close()

    return asyncio.run(run())


async def run_sampling(
    prompts: Sequence[Prompt],
    path: Path,
    completers: Sequence[Completer],
    *,
    model: str,
    n: int = 1,
    sampling: Mapping[str, Any],
    controls: Sequence[Control] = (),
    concurrency: int = 64,
    per_request: int = 16,
    retries: int = 4,
    backoff_s: float = 0.5,
    patience_s: float = 30.0,
    busy_s: float = 3600.0,
    strict: bool = False,
    progress: Progress = lambda *_: None,
    set_aside: Mapping[str, str] | None = None,
) -> SampleReport:
    """`sample_from_endpoints` over any completers.

    concurrency: requests in flight, over all completers; per_request: most completions in one;
    retries: of a request; patience_s: how long a completer may do nothing but fail; busy_s: how
    long a request waits for a place (HTTP 429), which counts as neither; strict: token ids that
    disagree with the server's count end the run with a DataError.
    """
    if n < 1 or concurrency < 1 or per_request < 1 or not prompts:
        raise InputError(
            f"{len(prompts)} prompts, n {n}, concurrency {concurrency}, per_request {per_request}: "
            "each must be at least 1"
        )
    check_images(list(prompts))
    controls = list(controls) or [None]
    config = sampling_config(prompts, model=model, n=n, sampling=sampling, controls=controls)
    claim(path, "trajectories", config)
    failures = failures_path(path)
    failures.unlink(missing_ok=True)
    report = SampleReport(path, set_aside=dict(set_aside or {}))
    with JsonlWriter(path) as writer:
        done = find_done(path)
        report.num_before = sum(mask.bit_count() for mask in done.values())
        requests = plan_requests(
            prompts, done, n=n, sampling=sampling, controls=controls, per_request=per_request
        )
        total = len({p.prompt_hash for p in prompts}) * n
        pool = Pool(
            requests=requests,
            writer=writer,
            report=report,
            model=model,
            retries=retries,
            backoff_s=backoff_s,
            patience_s=patience_s,
            busy_s=busy_s,
            strict=strict,
            progress=lambda: progress(
                "sample completions", report.num_before + report.num_written, total
            ),
        )
        begun = time.monotonic()
        try:
            await pool.run(completers, concurrency)
        finally:
            report.seconds = time.monotonic() - begun
            report.num_mismatched = sum(c.num_mismatched for c in completers)
    return report


def sampling_config(
    prompts: Sequence[Prompt],
    *,
    model: str,
    n: int,
    sampling: Mapping[str, Any],
    controls: Sequence[Control],
) -> dict[str, Any]:
    """What a trajectory file is made with: a second run must agree on all of it."""
    hashes = "\n".join(p.prompt_hash for p in prompts)
    return {
        "model": model,
        "n": n,
        "sampling": {k: v for k, v in sampling.items() if v is not None},
        "controls": [c and dict(c) for c in controls],
        "num_prompts": len(prompts),
        "prompts_hash": hashlib.sha256(hashes.encode()).hexdigest()[:16],
    }


def find_done(path: Path) -> dict[str, int]:
    """Prompt hash -> bit mask of the sample indices that the file holds."""
    done: dict[str, int] = {}
    for number, row in read_jsonl(path):
        try:
            done[row["prompt_hash"]] = done.get(row["prompt_hash"], 0) | 1 << row["sample_index"]
        except (KeyError, TypeError):
            raise DataError(f"{path}:{number}: not a trajectory") from None
    return done


def plan_requests(
    prompts: Sequence[Prompt],
    done: Mapping[str, int],
    *,
    n: int,
    sampling: Mapping[str, Any],
    controls: Sequence[Control],
    per_request: int,
) -> Iterator[SampleRequest]:
    """Requests for what is missing, lazily. With a seed, each has its own: a function of the seed,
    the prompt and the first sample index."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.prompt_hash in seen:
            continue
        seen.add(prompt.prompt_hash)
        mask = done.get(prompt.prompt_hash, 0)
        for offset, control in enumerate(controls):
            missing = [i for i in range(offset, n, len(controls)) if not mask >> i & 1]
            for start in range(0, len(missing), per_request):
                indices = tuple(missing[start : start + per_request])
                values = dict(sampling)
                if values.get("seed") is not None:
                    values["seed"] = derive_seed(values["seed"], prompt.prompt_hash, indices[0])
                yield SampleRequest(prompt, indices, values, control)


def derive_seed(seed: int, prompt_hash: str, index: int) -> int:
    """A 31-bit seed for one request."""
    digest = hashlib.sha256(f"{seed}/{prompt_hash}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
