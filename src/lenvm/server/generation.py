"""/v1/chat/completions and /v1/completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from lenvm.engines.request import Completion, Request
from lenvm.engines.sampling import SamplingParams
from lenvm.errors import LenVMError
from lenvm.guidance.request import LengthControl, pick_max_tokens
from lenvm.server import examples
from lenvm.server.disconnect import ClientGone, EventStream, while_connected
from lenvm.server.errors import CUT_OFF, RESPONSES, ApiError, from_lenvm, refuse
from lenvm.server.examples import answers
from lenvm.server.loop import EngineError, Event, Ticket
from lenvm.server.protocol import ChatRequest, CompletionRequest, Generation
from lenvm.server.state import ServerState
from lenvm.server.wire import (
    Json,
    Kind,
    choice,
    delta,
    length_state,
    sse,
    token_log_probs,
    usage,
)


@dataclass(frozen=True)
class Job:
    """One HTTP request, ready for the engine: completions of one or more prompts."""

    kind: Kind
    id: str
    created: int
    body: Generation
    requests: Sequence[Request]
    num_prompt_tokens: int
    log_probs: bool


def build_router(state: ServerState) -> APIRouter:
    """The two routes, for one server."""
    router = APIRouter(prefix="/v1", responses=RESPONSES, tags=["generation"])

    @router.post(
        "/chat/completions",
        summary="Answer a conversation, with the length asked for",
        responses=answers(examples.CHAT, examples.CHUNK),
    )
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Any:
        state.check_model(body.model)
        ids = await state.encoder.chat(
            body.messages,
            open_turn=body.add_generation_prompt,
            go_on=body.continue_final_message,
        )
        max_tokens = body.max_tokens or body.max_completion_tokens
        top = (body.top_logprobs or 0) if body.logprobs else 0
        job = _job(state, "chat.completion", body, [ids], max_tokens, body.logprobs, top)
        return await _answer(state, job, request)

    @router.post(
        "/completions",
        summary="Continue a text, with the length asked for",
        responses=answers(examples.COMPLETION),
    )
    async def completions(body: CompletionRequest, request: HttpRequest) -> Any:
        state.check_model(body.model)
        prompts = []
        for prompt in _prompts(body):
            if isinstance(prompt, str):
                prompts.append(await state.encoder.text(prompt))
            else:
                _check_ids(state, "prompt", prompt)
                prompts.append(prompt)
        if len(prompts) * body.n > state.loop.capacity:
            allowed = f"prompts times n up to {state.loop.capacity}"
            raise refuse("n", body.n, allowed)
        log_probs = body.logprobs is not None
        top = body.logprobs or 0
        job = _job(state, "text_completion", body, prompts, body.max_tokens, log_probs, top)
        return await _answer(state, job, request)

    return router


def _prompts(body: CompletionRequest) -> list[Any]:
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _job(
    state: ServerState,
    kind: Kind,
    body: Generation,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    log_probs: bool,
    top: int,
) -> Job:
    if body.n * len(prompts) > state.loop.capacity:
        raise refuse("n", body.n, f"up to the server's {state.loop.capacity} places")
    name = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex[:24]}"
    if body.track_length and state.engine.session is None:
        raise refuse("track_length", True, "false: this server has no value model")
    if body.length is not None and state.engine.session is None:
        raise refuse("length", body.length, "null: this server has no value model")
    track = state.engine.session is not None and (
        state.config.track if body.track_length is None else body.track_length
    )
    requests = []
    for row, ids in enumerate(prompts):
        sampling = _sampling(state, body, len(ids), max_tokens)
        for index in range(body.n):
            request = Request(
                f"{name}-{row}-{index}",
                tuple(ids),
                sampling,
                body.length,
                track=track,
                predict=True,
                index=index,
                stream=body.stream or (log_probs and kind == "text_completion"),
                top_log_probs=top,
            )
            requests.append(request)
    total = sum(len(ids) for ids in prompts)
    return Job(kind, name, int(time.time()), body, requests, total, log_probs)


def _check_ids(state: ServerState, field: str, ids: Iterable[int]) -> None:
    """What the engine would refuse without the field's name."""
    size = state.engine.vocab_size
    for token in ids:
        if not 0 <= token < size:
            raise refuse(field, token, f"token ids from 0 to {size - 1}")


def _sampling(
    state: ServerState, body: Generation, num_prompt_tokens: int, max_tokens: int | None
) -> SamplingParams:
    for name in body.logit_bias or ():
        _check_ids(state, f"logit_bias.{name}", [int(name)])
    _check_ids(state, "stop_token_ids", body.stop_token_ids)
    limit = state.engine.max_length
    room = limit - num_prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {num_prompt_tokens} tokens; allowed: up to {limit - 1}, so that one "
            "can be generated",
            param="messages" if isinstance(body, ChatRequest) else "prompt",
            code="context_length_exceeded",
            value=num_prompt_tokens,
            allowed=f"1 to {limit - 1} tokens",
        )
    if max_tokens is not None and max_tokens > room:
        allowed = f"1 to {room}: prompt and answer together have {limit} tokens"
        raise refuse("max_tokens", max_tokens, allowed, status=400)
    if body.length is not None:
        _check_fits(body.length, room, max_tokens, limit)
    default = state.config.default_max_tokens
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        max_tokens=max_tokens or pick_max_tokens(body.length, default=default, room=room),
        seed=body.seed,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logit_bias={int(k): v for k, v in (body.logit_bias or {}).items()},
        exponential_decay_length_penalty=body.exponential_decay_length_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )


def _check_fits(control: LengthControl, room: int, max_tokens: int | None, limit: int) -> None:
    """Refuse a least length that the answer has no room for."""
    if control.least > (max_tokens or room):
        name = "equal_to" if control.equal_to is not None else "at_least"
        most = (
            f"up to this request's max_tokens, {max_tokens}"
            if max_tokens is not None
            else f"up to {room}: prompt and answer together have {limit} tokens"
        )
        raise refuse(f"length.{name}", getattr(control, name), most)


async def _answer(state: ServerState, job: Job, request: HttpRequest) -> Response:
    ticket = state.loop.open(job.requests)
    facts = {"prompt_tokens": job.num_prompt_tokens, "n": len(job.requests)}
    if job.body.length is not None:
        facts["length"] = job.body.length.model_dump(exclude_defaults=True)  # type: ignore[assignment]
    if state.config.log_prompts:
        facts["prompt"] = job.body.model_dump(include={"messages", "prompt"})  # type: ignore[assignment]
    request.state.facts.update(facts)
    if job.body.stream:
        events = _stream(state, job, ticket, request.state.facts)
        return EventStream(events, lambda: state.loop.close(ticket))
    try:
        return await while_connected(request, _collect(state, job, ticket, request.state.facts))
    except ClientGone:
        request.state.facts["client"] = "gone"
        return Response(status_code=499)
    finally:
        state.loop.close(ticket)


@asynccontextmanager
async def _limited(state: ServerState, ticket: Ticket, facts: Json) -> AsyncIterator[None]:
    """Time limit and clean end of a ticket; errors of the engine as answers."""
    try:
        async with asyncio.timeout(state.config.timeout_s):
            yield
    except TimeoutError:
        raise ApiError(
            504,
            f"not finished within {state.config.timeout_s:g} s; lower max_tokens, or start the "
            "server with a longer --timeout",
        ) from None
    except EngineError as error:
        raise ApiError(500, str(error)) from None
    except asyncio.CancelledError:
        facts["client"] = "gone"
        raise
    finally:
        state.loop.close(ticket)


async def _collect(state: ServerState, job: Job, ticket: Ticket, facts: Json) -> Response:
    events: dict[int, list[Event]] = {i: [] for i in range(len(job.requests))}
    async with _limited(state, ticket, facts):
        async for event in ticket.events():
            events[event.index].append(event)
    completions = []
    for found in events.values():
        completion = found[-1].completion
        assert completion is not None
        _raise_error(completion)
        completions.append(completion)
    choices = [
        choice(
            job.kind,
            i,
            completion,
            token_log_probs(job.kind, events[i], state.encoder) if job.log_probs else None,
            token_ids=job.body.return_token_ids,
        )
        for i, completion in enumerate(completions)
    ]
    numbers = usage(job.num_prompt_tokens, completions)
    facts |= {"completion_tokens": numbers["completion_tokens"]}
    facts |= {"finish_reason": [c.finish_reason for c in completions]}
    return JSONResponse(
        {
            "id": job.id,
            "object": job.kind,
            "created": job.created,
            "model": state.config.name,
            "choices": choices,
            "usage": numbers,
        }
    )


async def _stream(
    state: ServerState, job: Job, ticket: Ticket, facts: Json
) -> AsyncGenerator[bytes, None]:
    base: Json = {
        "id": job.id,
        "object": "chat.completion.chunk" if job.kind == "chat.completion" else job.kind,
        "created": job.created,
        "model": state.config.name,
    }
    completions: dict[int, Completion] = {}
    begun: set[int] = set()
    try:
        async with _limited(state, ticket, facts), aclosing(ticket.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if event.completion is not None:
                    _raise_error(event.completion)
                    completions[event.index] = event.completion
                log_probs = (
                    token_log_probs(job.kind, [event], state.encoder) if job.log_probs else None
                )
                first = event.index not in begun
                begun.add(event.index)
                chunk = base | {"choices": [delta(job.kind, event, log_probs, first=first)]}
                if (lengths := length_state(event)) is not None:
                    chunk["lenvm"] = lengths
                yield sse(chunk)
    except ApiError as error:
        facts["error"] = str(error)
        yield sse(error.body())
        return
    except asyncio.CancelledError:
        if not state.loop.draining:
            raise
        facts.pop("client", None)  # is still there: the drain is over
        facts["error"] = str(CUT_OFF)
        yield sse(CUT_OFF.body())
        return
    ended = [completions[i] for i in sorted(completions)]
    numbers = usage(job.num_prompt_tokens, ended)
    facts |= {"completion_tokens": numbers["completion_tokens"]}
    facts |= {"finish_reason": [c.finish_reason for c in ended]}
    if job.body.stream_options is not None and job.body.stream_options.include_usage:
        yield sse(base | {"choices": [], "usage": numbers})
    yield sse("[DONE]")


def _raise_error(completion: Completion) -> None:
    error: LenVMError | None = completion.error
    if error is not None:
        raise ApiError(500, str(error)) if isinstance(error, EngineError) else from_lenvm(error)
