"""n completions per prompt from one or several completers, into a trajectory file that is never torn.

Which completions are missing follows from the file alone, so that a run that was killed at any
moment goes on where it stopped: nothing finished is lost, nothing is written twice. Requests are
made as they are needed and records are written as they come, so memory does not grow with either.
A request that fails is tried again, then recorded beside the output as failed and counted. An
endpoint that only fails is set aside and named, and the others take over its requests.
"""

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenvm.data.completers import (
    Completer,
    CompletionError,
    HttpCompleter,
    Sampled,
    SampleRequest,
    ServerKind,
    TextEncoder,
    check_images,
    connect_all,
)
from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError, EndpointError, InputError
from lenvm.files import JsonlWriter, claim, read_jsonl

Progress = Callable[[str, int, int], None]
Control = Mapping[str, Any] | None
REFUSED_BEFORE_GIVING_UP = 16


@dataclass
class SampleReport:
    """What a run did; `str` is the message at its end."""

    path: Path
    num_before: int = 0
    """Completions that were there from earlier runs."""
    num_written: int = 0
    num_failed: int = 0
    """Completions whose requests failed for good: listed in `failures_path(path)`."""
    num_tokens: int = 0
    num_truncated: int = 0
    num_mismatched: int = 0
    """Requests whose token ids and the server's own count disagree."""
    seconds: float = 0.0
    set_aside: dict[str, str] = field(default_factory=dict)
    """Endpoints that were given up, with the reason."""

    def __str__(self) -> str:
        rate = self.num_written / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.path}: {self.num_written} completions written, {self.num_before} were there "
            f"({self.num_tokens} tokens, {self.num_truncated} truncated, {rate:.1f} completions/s)"
        ]
        if self.num_failed:
            lines.append(
                f"{self.num_failed} completions failed, see {failures_path(self.path)}; "
                "the same command tries them again"
            )
        if self.num_mismatched:
            lines.append(
                f"{self.num_mismatched} requests whose token ids disagree with the server's usage"
            )
        lines += [f"set aside {name}: {why}" for name, why in self.set_aside.items()]
        return "\n".join(lines)


def failures_path(path: Path) -> Path:
    """Where the failed requests of the latest run are recorded."""
    return path.with_name(path.name + ".failures.jsonl")


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
                max_connections=concurrency,
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
    strict: bool = False,
    progress: Progress = lambda *_: None,
    set_aside: Mapping[str, str] | None = None,
) -> SampleReport:
    """`sample_from_endpoints` over any completers.

    concurrency: requests in flight, over all completers; per_request: most completions in one;
    retries: of a request; patience_s: how long a completer may do nothing but fail; strict: token
    ids that disagree with the server's count end the run with a DataError.
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
        pool = _Pool(
            requests=requests,
            writer=writer,
            report=report,
            model=model,
            retries=retries,
            backoff_s=backoff_s,
            patience_s=patience_s,
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


@dataclass
class _Job:
    request: SampleRequest
    num_attempts: int = 0


@dataclass
class _Pool:
    """Workers that take jobs until none is left, each bound to one completer."""

    requests: Iterator[SampleRequest]
    writer: JsonlWriter
    report: SampleReport
    model: str
    retries: int
    backoff_s: float
    patience_s: float
    strict: bool
    progress: Callable[[], None]

    def __post_init__(self) -> None:
        self.returned: deque[_Job] = deque()
        self.num_in_flight = 0
        self.num_refused_first = 0
        self.failures: JsonlWriter | None = None
        self.wake = asyncio.Event()
        self.last_good: dict[str, float] = {}

    async def run(self, completers: Sequence[Completer], concurrency: int) -> None:
        now = time.monotonic()
        self.last_good = {c.name: now for c in completers}
        share = [concurrency // len(completers)] * len(completers)
        for i in range(concurrency % len(completers)):
            share[i] += 1
        tasks = [
            asyncio.create_task(self._work(completer))
            for completer, count in zip(completers, share, strict=True)
            for _ in range(max(1, count))
        ]
        try:
            finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.failures is not None:
                self.failures.close()
        for task in finished:
            task.result()
        if len(finished) == len(tasks) and self._take() is not None:
            self._raise_no_endpoint()

    def _take(self) -> _Job | None:
        if self.returned:
            return self.returned.popleft()
        request = next(self.requests, None)
        return None if request is None else _Job(request)

    async def _work(self, completer: Completer) -> None:
        while completer.name not in self.report.set_aside:
            job = self._take()
            if job is None:
                if self.num_in_flight == 0:
                    return
                await self.wake.wait()
                continue
            self.num_in_flight += 1
            self.wake.clear()
            try:
                await self._finish(completer, job)
            finally:
                self.num_in_flight -= 1
                if self.returned or self.num_in_flight == 0:
                    self.wake.set()

    async def _finish(self, completer: Completer, job: _Job) -> None:
        """Complete a job, retrying; or record it as failed; or return it where the endpoint is."""
        while completer.name not in self.report.set_aside:
            begun = time.monotonic()
            try:
                sampled = await completer.complete(job.request)
            except CompletionError as error:
                job.num_attempts += error.kind in ("transient", "refused")
                if error.kind == "refused" or job.num_attempts > self.retries:
                    self._record_failure(completer, job, error)
                    return
                waited = begun - self.last_good[completer.name]
                if error.kind == "closed" or waited > self.patience_s:
                    self.report.set_aside[completer.name] = str(error)
                    break
                wait = self.backoff_s * 2.0 ** min(job.num_attempts, 6)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            else:
                self.last_good[completer.name] = time.monotonic()
                self._record(job.request, sampled, completer)
                return
        self.returned.append(job)

    def _record(
        self, request: SampleRequest, sampled: Sequence[Sampled], completer: Completer
    ) -> None:
        if self.strict and completer.num_mismatched:
            raise DataError(
                f"{completer.name}: prompt {request.prompt.prompt_hash}: the token ids disagree "
                "with the server's usage.completion_tokens; give the server's own tokenizer, or "
                "leave out --strict to keep such completions and count them"
            )
        rows = [
            to_trajectory(request, index, one, self.model)
            for index, one in zip(request.indices, sampled, strict=True)
        ]
        self.writer.write_lines([row.to_json_line() for row in rows])
        self.report.num_written += len(rows)
        self.report.num_tokens += sum(row.length for row in rows)
        self.report.num_truncated += sum(not row.is_complete for row in rows)
        self.progress()

    def _record_failure(self, completer: Completer, job: _Job, error: CompletionError) -> None:
        self.report.num_failed += len(job.request.indices)
        if self.failures is None:
            self.failures = JsonlWriter(failures_path(self.report.path))
        self.failures.write(
            {
                "prompt_hash": job.request.prompt.prompt_hash,
                "sample_indices": list(job.request.indices),
                "endpoint": completer.name,
                "num_attempts": job.num_attempts,
                "error": str(error),
            }
        )
        if self.report.num_written == 0 and error.kind == "refused":
            self.num_refused_first += 1
            if self.num_refused_first >= REFUSED_BEFORE_GIVING_UP:
                raise EndpointError(
                    f"{completer.name} refused each of the first {self.num_refused_first} "
                    f"requests: {error}"
                )

    def _raise_no_endpoint(self) -> None:
        rows = "\n".join(f"  {name}: {why}" for name, why in self.report.set_aside.items())
        raise EndpointError(
            f"no endpoint is left:\n{rows}\n{self.report.num_written} completions were written to "
            f"{self.report.path}. Start the server again and run the same command: it continues."
        )


def to_trajectory(request: SampleRequest, index: int, sampled: Sampled, model: str) -> Trajectory:
    """The record of one completion."""
    prompt = request.prompt
    values = {k: v for k, v in request.sampling.items() if v is not None}
    return Trajectory(
        id=f"{prompt.prompt_hash}-{index}",
        prompt_hash=prompt.prompt_hash,
        sample_index=index,
        domain=prompt.domain,
        split=prompt.split,
        messages=prompt.messages,
        prompt_text=prompt.prompt_text,
        prompt_token_ids=sampled.prompt_token_ids,
        completion_token_ids=sampled.token_ids,
        completion_text=sampled.text,
        finish_reason=sampled.finish_reason,
        usage=sampled.usage,
        sampling={**values, "n": len(request.indices)},
        length_control=None if request.control is None else dict(request.control),
        model=model,
        images=list(prompt.images),
        metadata=prompt.metadata,
    )
