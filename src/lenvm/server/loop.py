"""EngineLoop: the one thread that owns the engine, and its asyncio side.

The front never touches the engine: it opens and closes tickets, and asks for calls that run between
steps. A step's news go to the event loop in one go. A ticket that is closed is cancelled before the
next step, so compute and cache of a client that went away are free within one step.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lenvm.engines.request import Completion, Request
from lenvm.engines.transformers import TransformersEngine
from lenvm.errors import LenVMError
from lenvm.guidance.scorer import CandidateScorer
from lenvm.server.errors import ApiError
from lenvm.server.metrics import Metrics

log = logging.getLogger("lenvm.server")
T = TypeVar("T")


class EngineError(LenVMError):
    """The engine failed; what ran is lost, and it goes on with an empty batch."""


@dataclass(frozen=True)
class Event:
    """One token of one completion; the last has `completion`. An error may come without a token."""

    index: int
    num_tokens: int
    """Tokens so far."""
    token_id: int | None
    text: str
    """What became certain with this token; may be empty."""
    offset: int = 0
    """Characters of the answer before `text`."""
    log_prob: float | None = None
    top_log_probs: Sequence[tuple[int, float]] = ()
    value: float | None = None
    remaining: float | None = None
    predicted_length: float | None = None
    completion: Completion | None = None


@dataclass
class _Progress:
    """One completion of a ticket, on the engine's side."""

    ticket: "Ticket"
    index: int
    completion: Completion
    started: float
    num_sent: int = 0
    num_characters: int = 0
    last_token: float | None = None


@dataclass(eq=False)
class Ticket:
    """Some completions of one HTTP request; `events` is read once."""

    requests: Sequence[Request]
    queue: "asyncio.Queue[Event | Exception]" = field(default_factory=asyncio.Queue)
    num_open: int = 0
    closed: bool = False

    async def events(self) -> AsyncIterator[Event]:
        """Tokens as they come, until every completion has ended."""
        ended = 0
        while ended < len(self.requests):
            event = await self.queue.get()
            if isinstance(event, Exception):
                raise event
            ended += event.completion is not None
            yield event


class EngineLoop:
    """Runs a `TransformersEngine` in a thread for the coroutines of one event loop."""

    def __init__(
        self, engine: TransformersEngine, metrics: Metrics, *, max_waiting: int = 64
    ) -> None:
        self.engine, self.metrics, self.max_waiting = engine, metrics, max_waiting
        self.num_open = 0
        """Completions that were admitted here and have not ended."""
        self.num_calls = 0
        """Value requests under way."""
        self.failed = False
        """The engine could not be brought back."""
        self.draining = False
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._progress: dict[str, _Progress] = {}
        self._stopping = False
        self._guidance_s = 0.0
        self._mean_s = 5.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="lenvm-engine", daemon=True)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "requests_running": ("In the batch", lambda: engine.num_running),
            "requests_open": ("Admitted, not ended", lambda: self.num_open),
            "requests_waiting": (
                "Admitted, not yet in the batch",
                lambda: max(0, self.num_open - engine.num_running),
            ),
            "calls_open": ("Value requests under way", lambda: self.num_calls),
            "kv_tokens": ("Tokens in the generator's KV", lambda: engine.decoder.num_tokens),
            "kv_tokens_limit": ("Room for tokens in it", lambda: engine.max_tokens),
        }
        scorer = engine.session.scorer if engine.session is not None else None
        if isinstance(scorer, CandidateScorer):
            decoder = scorer.decoder
            gauges["value_kv_tokens"] = (
                "Tokens in the value model's KV",
                lambda: decoder.num_tokens,
            )
        for name, (text, read) in gauges.items():
            metrics.gauge(name, text, read)

    # -- the event loop's side --------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its step; what still runs is given up."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, 60.0)

    @property
    def capacity(self) -> int:
        """Completions that may be open at once."""
        return self.engine.max_requests + self.max_waiting

    def open(self, requests: Sequence[Request]) -> Ticket:
        """Admit the completions of one HTTP request together.

        ApiError 429 where there is no room, 503 on the way down; errors of
        `engine.check` where one can never run.
        """
        self._check_up()
        for request in requests:
            self.engine.check(request)
        if self.num_open + len(requests) > self.capacity:
            rounds = 1 + self.num_open // max(1, self.engine.max_requests)
            raise _no_room(self.capacity, self._mean_s * rounds / 2)
        ticket = Ticket(requests, num_open=len(requests))
        self.num_open += len(requests)
        self._command(lambda: self._submit(ticket))
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Cancel what of a ticket still runs. May be called at any time, more than once."""
        if ticket.closed:
            return
        ticket.closed = True
        self.num_open -= ticket.num_open
        if ticket.num_open:
            ticket.num_open = 0
            self._command(lambda: self._cancel(ticket))

    @contextmanager
    def calls(self) -> Iterator[None]:
        """A place for the calls of one HTTP request; as many as for completions (429, 503)."""
        self._check_up()
        if self.num_calls >= self.capacity:
            raise _no_room(self.capacity, self._mean_s / 2)
        self.num_calls += 1
        try:
            yield
        finally:
            self.num_calls -= 1

    def _check_up(self) -> None:
        if self.failed or self.draining:
            raise ApiError(
                503, "the server is going down; try again in a moment", headers={"Retry-After": "5"}
            )

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that runs in the engine's thread, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(set_it: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                set_it(value)

        def run() -> None:
            if future.cancelled():
                return
            try:
                result = function()
            except Exception as error:  # whatever it is belongs to the caller
                self._to_loop(settle, future.set_exception, error)
            else:
                self._to_loop(settle, future.set_result, result)

        with self._wake:
            self._calls.append(run)
            self._wake.notify()
        return await future

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _deliver(self, news: Sequence[tuple[Ticket, "Event | Exception"]]) -> None:
        for ticket, event in news:
            ended = isinstance(event, Exception) or event.completion is not None
            if ended and ticket.num_open:
                ticket.num_open -= 1
                self.num_open -= 1
            ticket.queue.put_nowait(event)

    # -- the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (
                    self._commands or self._calls or self._stopping or self.engine.num_unfinished
                ):
                    self._wake.wait()
                if self._stopping or self.failed:
                    return
                commands = list(self._commands)
                self._commands.clear()
                call = self._calls.popleft() if self._calls else None
            for command in commands:
                self._guard(command)
            if call is not None:
                call()
            if self.engine.num_unfinished:
                self._guard(self._step)

    def _guard(self, action: Callable[[], None]) -> None:
        """A defect ends what is in the engine, not the server."""
        try:
            action()
        except Exception as error:
            log.exception("engine step failed", extra={"event": "engine_failed"})
            message = f"the engine failed ({type(error).__name__}); the server's log says more"
            try:
                ended = self.engine.abort(EngineError(message))
                self._send(ended, time.perf_counter())
            except Exception:
                log.exception("engine lost", extra={"event": "engine_lost"})
                self.failed = True
                lost = [(p.ticket, EngineError(message)) for p in self._progress.values()]
                self._progress.clear()
                self._to_loop(self._deliver, lost)

    def _submit(self, ticket: Ticket) -> None:
        now = time.perf_counter()
        for index, request in enumerate(ticket.requests):
            if ticket.closed:
                break
            try:
                completion = self.engine.submit(request)
            except LenVMError as error:
                self._to_loop(self._deliver, [(ticket, error)])
                return
            self._progress[request.id] = _Progress(ticket, index, completion, now)
        self.metrics.prompt_tokens.inc(sum(len(r.prompt_token_ids) for r in ticket.requests))

    def _cancel(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            progress = self._progress.pop(request.id, None)
            if progress is not None and progress.completion.finish_reason is None:
                self.engine.cancel(request.id)
                self.metrics.completions.labels("cancelled").inc()

    def _step(self) -> None:
        start = time.perf_counter()
        completions = self.engine.step()
        now = time.perf_counter()
        self.metrics.step_seconds.inc(now - start)
        self.metrics.guidance_seconds.inc(self.engine.guidance_s - self._guidance_s)
        self._guidance_s = self.engine.guidance_s
        self._send(completions, now)

    def _send(self, completions: Sequence[Completion], now: float) -> None:
        news: list[tuple[Ticket, Event | Exception]] = []
        for completion in completions:
            progress = self._progress.get(completion.request.id)
            if progress is None:
                continue
            if completion.finish_reason is not None:
                del self._progress[completion.request.id]
                self._count_end(progress, now)
            if len(completion.token_ids) > progress.num_sent:
                self._count_token(progress, now)
            news.append((progress.ticket, _event(progress)))
        self._to_loop(self._deliver, news)

    def _count_token(self, progress: _Progress, now: float) -> None:
        guided = str(progress.completion.request.control is not None).lower()
        self.metrics.tokens.inc()
        if progress.last_token is None:
            self.metrics.first_token.labels(guided).observe(now - progress.started)
        else:
            self.metrics.between_tokens.labels(guided).observe(now - progress.last_token)
        progress.last_token = now

    def _count_end(self, progress: _Progress, now: float) -> None:
        completion = progress.completion
        control, length = completion.request.control, len(completion.token_ids)
        self._mean_s += 0.1 * (now - progress.started - self._mean_s)
        self.metrics.completions.labels(completion.finish_reason).inc()
        if completion.ended_by_itself and control is None and completion.predicted_length:
            error = abs(completion.predicted_length - length) / length
            self.metrics.prediction_error.observe(error)
        if completion.ended_by_itself and control is not None and control.equal_to:
            self.metrics.target_error.observe(abs(control.equal_to - length) / control.equal_to)

    def _to_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)


def _no_room(capacity: int, wait_s: float) -> ApiError:
    wait = max(1, round(wait_s))
    return ApiError(
        429,
        f"all {capacity} places are taken; try again in about {wait} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait)},
    )


def _event(progress: _Progress) -> Event:
    """News of a completion since the last event: one token, or its end without one."""
    completion = progress.completion
    count = len(completion.token_ids)
    ended = completion.finish_reason is not None
    shown = completion.text if ended else completion.stream.settled if completion.stream else ""
    offset = progress.num_characters
    text, progress.num_characters = shown[offset:], len(shown)
    has_token = count > progress.num_sent
    progress.num_sent = count
    return Event(
        index=progress.index,
        num_tokens=count,
        token_id=completion.token_ids[-1] if has_token else None,
        text=text,
        offset=offset,
        log_prob=completion.log_probs[-1] if has_token else None,
        top_log_probs=completion.top_log_probs[-1] if completion.top_log_probs else (),
        value=completion.values[-1] if completion.values else None,
        remaining=completion.remaining[-1] if completion.remaining else None,
        predicted_length=completion.predicted_length,
        completion=completion if ended else None,
    )
