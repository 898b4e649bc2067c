"""Another server behind this one: a stock vLLM or SGLang with the lenvm plugin.

Requests under /v1 go through as they are, and answers come back byte for byte with their status,
errors and streams. Only the `length` object is checked here and rewritten into the form that the
other server's plugin takes.
"""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lenvm.errors import ControlError, InputError
from lenvm.evals.wire import wrap_control
from lenvm.guidance.request import LengthControl
from lenvm.server.app import bare_app
from lenvm.server.config import ServerConfig
from lenvm.server.disconnect import ClientGone, EventStream, while_connected
from lenvm.server.errors import ApiError, from_lenvm
from lenvm.server.metrics import Metrics

log = logging.getLogger("lenvm.server")
UpstreamEngine = Literal["vllm", "sglang", "lenvm"]
OWN_HEADERS = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""Headers of one connection, which do not go through."""


def build_upstream_app(
    url: str, config: ServerConfig, *, engine: UpstreamEngine, api_key: str | None = None
) -> FastAPI:
    """An app that passes /v1 through to `url` (its root, or ending in /v1).

    api_key: sent to the other server in place of the client's own.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"upstream is {url!r}; it must start with http:// or https://")
    root = url.rstrip("/").removesuffix("/v1")
    client = httpx.AsyncClient(
        base_url=root,
        timeout=httpx.Timeout(config.timeout_s, connect=10.0),
        limits=httpx.Limits(max_connections=1024),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await client.aclose()

    app = bare_app(config, Metrics(), lifespan)

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", tags=["server"])
    async def ready() -> Response:
        try:
            reply = await client.get("/v1/models", headers=_key({}, api_key))
        except httpx.HTTPError as error:
            why = f"{root} does not answer ({type(error).__name__})"
        else:
            if reply.is_success:
                return JSONResponse({"status": "ready"})
            why = f"{root} answers {reply.status_code}"
            if reply.status_code in (401, 403):
                why += "; give its key in LENVM_UPSTREAM_KEY"
        return JSONResponse({"status": "waiting", "why": why}, 503)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST"], include_in_schema=False)
    async def pass_through(path: str, request: HttpRequest) -> Response:
        body = _rewrite(await request.body(), engine)
        sent = client.build_request(
            request.method,
            f"/v1/{path}",
            content=body,
            params=request.query_params,
            headers=_key(_pass_on(request), api_key),
        )
        try:
            answer = await while_connected(request, client.send(sent, stream=True))
        except ClientGone:
            return Response(status_code=499)
        except httpx.TimeoutException:
            raise ApiError(504, f"{root} did not answer in time") from None
        except httpx.HTTPError as error:
            raise ApiError(
                502, f"{root} does not answer ({type(error).__name__}); is that server running?"
            ) from None
        return _PassedStream(answer)

    return app


class _PassedStream(EventStream):
    """Another server's answer, chunk by chunk."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(_chunks(answer))
        self.answer = answer
        self.status_code = answer.status_code
        self.raw_headers = [
            (k.lower(), v) for k, v in answer.headers.raw if k.decode().lower() not in OWN_HEADERS
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answer.aclose()


async def _chunks(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.HTTPError as error:
        log.warning("upstream broke off: %s", error, extra={"event": "upstream_broke_off"})
        raise


def _pass_on(request: HttpRequest) -> dict[str, str]:
    return {k: v for k, v in request.headers.items() if k not in OWN_HEADERS}


def _key(headers: dict[str, str], api_key: str | None) -> dict[str, str]:
    return headers if api_key is None else headers | {"authorization": f"Bearer {api_key}"}


def _rewrite(body: bytes, engine: UpstreamEngine) -> bytes:
    """The body with `length` in the other server's form; untouched where it has none."""
    if b'"length"' not in body or engine == "lenvm":
        return body
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        return body  # the other server says what is wrong with it
    if not isinstance(data, dict) or data.get("length") is None:
        return body
    try:
        control = LengthControl.parse(data.pop("length"))
    except ControlError as error:
        raise from_lenvm(error) from None
    form = wrap_control(engine, control.model_dump(exclude_defaults=True))
    for name, value in form.items():
        data[name] = {**(data.get(name) or {}), **value}
    return json.dumps(data).encode()
