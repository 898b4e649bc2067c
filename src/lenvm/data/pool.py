"""Workers over completers: retries, failures on record, endpoints set aside, records written.

A server that says it has no place (HTTP 429) lives: its requests wait as long as it says, that is
no failed attempt, and fewer of them are under way at once until it takes more (`_Gate`).
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lenvm.data.completers import Completer, CompletionError, Sampled, SampleRequest
from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError, EndpointError
from lenvm.files import JsonlWriter

REFUSED_BEFORE_GIVING_UP = 16
LONGEST_WAIT_S = 60.0
"""A server that says to wait longer is asked again after so long."""


@dataclass
class SampleReport:
    """What a run did; `str` is the message at its end."""

    path: Path
    num_before: int = 0
    """Completions that were there from earlier runs."""
    num_written: int = 0
    num_failed: int = 0
    """Completions whose requests failed for good: listed in `failures_path(path)`."""
    first_failure: str = ""
    """Why the first of them failed."""
    num_busy: int = 0
    """Times that a server had no place and said to wait."""
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
                f"the same command tries them again. The first one: {self.first_failure}"
            )
        if self.num_busy:
            lines.append(
                f"{self.num_busy} times a server had no place and its requests waited; a lower "
                "--concurrency asks for fewer at once"
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


@dataclass
class _Job:
    request: SampleRequest
    num_attempts: int = 0
    num_busy: int = 0
    busy_since: float | None = None
    """When this endpoint first had no place for it."""
    begun: float = 0.0
    """When it was last asked for."""


class _Gate:
    """Requests under way at one endpoint: as many as it takes at once, first come, first served."""

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.num_open = most, float(most), 0
        self.queue: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if not self.queue and self.num_open < int(self.limit):
            self.num_open += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queue.append(place)
        await place

    def leave(self) -> None:
        self.num_open -= 1
        while self.queue and self.num_open < int(self.limit):
            place = self.queue.popleft()
            if not place.done():  # cancelled: the run ends
                self.num_open += 1
                place.set_result(None)

    def shrink(self) -> None:
        """One under way found no place: what the others are is what there is room for."""
        self.limit = float(max(1, min(int(self.limit), self.num_open - 1)))

    def grow(self) -> None:
        """One more at once for each round of completed requests."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)


@dataclass
class Pool:
    """Workers that take jobs until none is left, each bound to one completer."""

    requests: Iterator[SampleRequest]
    writer: JsonlWriter
    report: SampleReport
    model: str
    retries: int
    backoff_s: float
    patience_s: float
    busy_s: float
    """How long a request waits for a place."""
    strict: bool
    progress: Callable[[], None]

    def __post_init__(self) -> None:
        self.returned: deque[_Job] = deque()
        self.num_in_flight = 0
        self.num_refused_first = 0
        self.failures: JsonlWriter | None = None
        self.wake = asyncio.Event()
        self.last_good: dict[str, float] = {}
        """When each endpoint last showed that it lives."""
        self.last_done: dict[str, float] = {}
        """When each endpoint last completed a request."""
        self.gates: dict[str, _Gate] = {}

    async def run(self, completers: Sequence[Completer], concurrency: int) -> None:
        now = time.monotonic()
        self.last_good = {c.name: now for c in completers}
        self.last_done = dict(self.last_good)
        share = [concurrency // len(completers)] * len(completers)
        for i in range(concurrency % len(completers)):
            share[i] += 1
        self.gates = {c.name: _Gate(max(1, s)) for c, s in zip(completers, share, strict=True)}
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
        name = completer.name
        while name not in self.report.set_aside:
            try:
                sampled = await self._ask(completer, job)
            except CompletionError as error:
                if error.kind == "busy":
                    wait_s = self._wait_for_place(name, job, error)
                    if wait_s is None and name not in self.report.set_aside:
                        self._record_failure(completer, job, error)
                        return
                    await asyncio.sleep(wait_s or 0.0)
                    continue
                job.num_attempts += error.kind in ("transient", "refused")
                if error.kind == "refused" or job.num_attempts > self.retries:
                    self._record_failure(completer, job, error)
                    return
                waited = job.begun - self.last_good[name]
                if error.kind == "closed" or waited > self.patience_s:
                    self.report.set_aside[name] = str(error)
                    break
                wait = self.backoff_s * 2.0 ** min(job.num_attempts, 6)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            else:
                if sampled is None:
                    break
                self.last_good[name] = self.last_done[name] = time.monotonic()
                self._record(job.request, sampled, completer)
                return
        job.busy_since = None
        self.returned.append(job)

    async def _ask(self, completer: Completer, job: _Job) -> Sequence[Sampled] | None:
        """The completions, once the gate lets the request through; None: set aside meanwhile."""
        gate = self.gates[completer.name]
        await gate.enter()
        job.begun = time.monotonic()
        try:
            if completer.name in self.report.set_aside:
                return None
            sampled = await completer.complete(job.request)
        except CompletionError as error:
            if error.kind == "busy":
                gate.shrink()
            raise
        else:
            gate.grow()
            return sampled
        finally:
            gate.leave()

    def _wait_for_place(self, name: str, job: _Job, error: CompletionError) -> float | None:
        """Seconds until a job may ask again; None: it waited long enough, and an endpoint that
        completed nothing meanwhile is set aside."""
        now = time.monotonic()
        self.last_good[name] = now
        self.report.num_busy += 1
        job.num_busy += 1
        job.busy_since = job.busy_since or now
        if now - job.busy_since > self.busy_s:
            if now - self.last_done[name] > self.busy_s:
                self.report.set_aside[name] = f"no place within {self.busy_s:g} s: {error}"
            return None
        if error.wait_s is None:
            return self.backoff_s * 2.0 ** min(job.num_busy, 6) * random.uniform(0.5, 1.0)
        return min(max(error.wait_s, self.backoff_s), LONGEST_WAIT_S) * random.uniform(1.0, 1.1)

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
        self.report.first_failure = self.report.first_failure or str(error)
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
            f"{self.report.path}. Mend what it says, start the server again where it stopped, and "
            "run the same command: it continues."
        )


def to_trajectory(request: SampleRequest, index: int, sampled: Sampled, model: str) -> Trajectory:
    """The record of one completion."""
    prompt = request.prompt
    values = {k: v for k, v in request.sampling.items() if v is not None}
    return Trajectory(
        schema="lenvm.trajectory/1",
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
