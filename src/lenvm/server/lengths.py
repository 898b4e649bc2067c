"""/v1/length/predict, /v1/length/values and /v1/length/candidates."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from lenvm.server import examples
from lenvm.server.disconnect import ClientGone, while_connected
from lenvm.server.errors import RESPONSES, ApiError, refuse
from lenvm.server.examples import answers
from lenvm.server.protocol import (
    CandidatesRequest,
    Message,
    PredictRequest,
    Sequences,
    ValuesRequest,
)
from lenvm.server.state import ServerState
from lenvm.server.values import PART_TOKENS, Numbers, ValueReader
from lenvm.server.wire import Json

MAX_VALUES = 262_144
"""Positions of one answer of /v1/length/values."""


def build_router(state: ServerState) -> APIRouter:
    """The three routes, for one server."""
    router = APIRouter(prefix="/v1/length", responses=RESPONSES, tags=["lengths"])
    model = state.engine.value_model
    reader = None if model is None else ValueReader(state.engine, model)

    async def serve(work: Any, body: Sequences, request: HttpRequest) -> Response:
        state.check_model(body.model)
        if reader is None:
            raise ApiError(
                400, "this server has no value model; start it with --lenvm FOLDER", param="model"
            )
        try:
            with state.loop.calls():
                async with asyncio.timeout(state.config.timeout_s):
                    found = await while_connected(request, work(state, reader, body))
        except ClientGone:
            request.state.facts["client"] = "gone"
            return Response(status_code=499)
        except TimeoutError:
            raise ApiError(504, "not finished in time; send fewer tokens at once") from None
        about = {"object": "list", "model": state.config.name, **reader.about()}
        return JSONResponse(about | found)

    @router.post(
        "/predict",
        summary="How long will the answers be?",
        responses=answers(examples.PREDICT),
    )
    async def predict(body: PredictRequest, request: HttpRequest) -> Any:
        if body.budget is not None and reader is not None and not reader.has_distribution:
            raise refuse("budget", body.budget, "null: it needs the distribution head")
        return await serve(_predict, body, request)

    @router.post(
        "/values", summary="Values of texts, token by token", responses=answers(examples.VALUES)
    )
    async def values(body: ValuesRequest, request: HttpRequest) -> Any:
        return await serve(_values, body, request)

    @router.post(
        "/candidates", summary="Values of next tokens", responses=answers(examples.CANDIDATES)
    )
    async def candidates(body: CandidatesRequest, request: HttpRequest) -> Any:
        return await serve(_candidates, body, request)

    return router


async def _predict(state: ServerState, reader: ValueReader, body: PredictRequest) -> Json:
    sequences = await _encode(state, body)
    data: list[Json] = []
    for part in _parts(sequences):
        chunk = [sequences[i] for i in part]
        ends = [[len(ids) - 1] for ids in chunk]
        found = await state.loop.call(
            lambda chunk=chunk, ends=ends: reader.read(chunk, ends, budget=body.budget)  # type: ignore[misc]
        )
        data += [
            {"index": i, "prompt_tokens": len(sequences[i]), **_predicted(rows[0])}
            for i, rows in zip(part, found, strict=True)
        ]
    return {"data": sorted(data, key=lambda row: row["index"])}


def _predicted(numbers: Numbers) -> Json:
    if "p50" not in numbers:
        return dict(numbers)
    return dict(numbers) | {
        "median": numbers["p50"],
        "interval_80": [numbers["p10"], numbers["p90"]],
    }


async def _values(state: ServerState, reader: ValueReader, body: ValuesRequest) -> Json:
    sequences = await _encode(state, body)
    positions = _positions(sequences, body.positions)
    values: list[list[Numbers]] = [[] for _ in sequences]
    for part in _parts(sequences):
        chunk = [sequences[i] for i in part]
        places = [positions[i] for i in part]
        found = await state.loop.call(
            lambda chunk=chunk, places=places: reader.read(  # type: ignore[misc]
                chunk, places, quantiles=body.quantiles or ()
            )
        )
        for i, rows in zip(part, found, strict=True):
            values[i] = rows
    reply: Json = {
        "values": values,
        "lengths": [[row["length"] for row in rows] for rows in values],
    }
    if body.token_ids is None:
        reply["token_ids"] = sequences
        reply["tokens"] = [[state.encoder.name(i) for i in ids] for ids in sequences]
    return reply


def _positions(
    sequences: Sequence[Sequence[int]], asked: list[list[int]] | None
) -> list[list[int]]:
    if asked is None:
        asked = [list(range(len(ids))) for ids in sequences]
    if len(asked) != len(sequences):
        allowed = f"one list for each of the {len(sequences)} sequences"
        raise refuse("positions", f"{len(asked)} lists", allowed)
    if (total := sum(len(p) for p in asked)) > MAX_VALUES:
        raise refuse("positions", f"{total} positions", f"up to {MAX_VALUES} in one request")
    for i, (ids, places) in enumerate(zip(sequences, asked, strict=True)):
        if places and max(places) >= len(ids):
            raise refuse(f"positions.{i}", max(places), f"0 to {len(ids) - 1}")
    return asked


async def _candidates(state: ServerState, reader: ValueReader, body: CandidatesRequest) -> Json:
    sequences = await _encode(state, body, reserve=1)
    named: list[Any] = [None] * len(sequences)
    if body.candidates is not None:
        if len(body.candidates) != len(sequences):
            allowed = f"one list for each of the {len(sequences)} prefixes"
            raise refuse("candidates", f"{len(body.candidates)} lists", allowed)
        named = body.candidates
        for i, ids in enumerate(named):
            _check_tokens(state, f"candidates.{i}", ids)
    data = []
    for i, (prefix, ids) in enumerate(zip(sequences, named, strict=True)):
        rows = await state.loop.call(
            lambda prefix=prefix, ids=ids: reader.candidates(prefix, ids, body.top_k)  # type: ignore[misc]
        )
        for row in rows:
            row["token"] = state.encoder.name(row["token_id"])
        data.append({"index": i, "prompt_tokens": len(prefix), "candidates": rows})
    return {"data": data}


async def _encode(state: ServerState, body: Sequences, *, reserve: int = 0) -> list[list[int]]:
    """Token ids of a body's sequences; each checked against vocabulary and length."""
    field, sequences = "token_ids", list[list[int]]()
    if body.token_ids is not None:
        given: Any = body.token_ids
        sequences = [given] if isinstance(given[0], int) else given
    elif body.text is not None:
        field = "text"
        texts = [body.text] if isinstance(body.text, str) else body.text
        sequences = [await state.encoder.text(t) for t in texts]
    elif body.messages is not None:
        field = "messages"
        turns: Any = body.messages
        talks = [turns] if isinstance(turns[0], Message) else turns
        sequences = [await _chat(state, t) for t in talks]
    elif isinstance(body, PredictRequest) and body.prompts is not None:
        field = "prompts"
        for prompt in body.prompts:
            if isinstance(prompt, str):
                prompt = [Message(role="user", content=prompt)]
            sequences.append(await state.encoder.chat(prompt))
    limit = state.engine.max_length - reserve
    for i, ids in enumerate(sequences):
        if len(ids) > limit:
            raise refuse(f"{field}.{i}", f"{len(ids)} tokens", f"1 to {limit} tokens", status=400)
        _check_tokens(state, f"{field}.{i}", ids)
    return sequences


async def _chat(state: ServerState, messages: list[Message]) -> list[int]:
    return await state.encoder.chat(messages, go_on=messages[-1].role == "assistant")


def _check_tokens(state: ServerState, field: str, ids: Sequence[int]) -> None:
    limit = state.vocab_size
    if max(ids) >= limit:
        raise refuse(field, max(ids), f"token ids from 0 to {limit - 1}")


def _parts(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices in groups of at most PART_TOKENS padded tokens, or of one: like by like."""
    group: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if group and len(sequences[group[0]]) * (len(group) + 1) > PART_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
