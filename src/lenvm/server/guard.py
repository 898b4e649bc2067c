"""Guard: what every request passes before a route sees it, as plain ASGI.

Host (against DNS rebinding, on loopback), API key, size and speed of the body; and one log line and
the counters when it is over. No prompt text is logged.
"""

import asyncio
import logging
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lenvm.server.config import LOOPBACK, ServerConfig
from lenvm.server.errors import CUT_OFF, ApiError
from lenvm.server.metrics import Metrics

log = logging.getLogger("lenvm.server")
OPEN_PATHS = ("/", "/docs", "/health", "/ready", "/openapi.json")
"""No key is asked for these, nor for the page's files."""


class Guard:
    """Wraps an app. `scope["state"]["facts"]` is what its routes add to the log line."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        request_id, start, status = uuid.uuid4().hex[:16], time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope)
            body = await self._read(scope, receive)
            await self.app(scope, _replay(body, receive), answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except asyncio.CancelledError:  # by uvicorn, when the drain is over
            if not status:  # a stream that has begun has said it by itself
                await CUT_OFF.response()(scope, receive, answer)
        except Exception:
            log.exception("defect", extra={"event": "defect", "request_id": request_id})
            if status:
                raise
            message = f"a defect of the server; its log has it as {request_id}"
            await ApiError(500, message).response()(scope, receive, answer)
        finally:
            self._note(scope, request_id, status, time.perf_counter() - start, facts)

    def _check(self, scope: Scope) -> None:
        headers = {k: v.decode("latin-1") for k, v in scope["headers"]}
        if self.config.is_loopback:
            name = _host_name(headers.get(b"host", ""))
            if name not in LOOPBACK:
                raise ApiError(
                    421,
                    f"this server listens on loopback only and was asked as {name[:100]!r}; "
                    f"allowed: {', '.join(LOOPBACK)}",
                )
        path = scope["path"]
        if not self.config.api_keys or path in OPEN_PATHS or path.startswith("/page/"):
            return
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self.config.knows(key.strip()):
            raise ApiError(
                401,
                "this server asks for an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, within its limits of size and time."""
        limit = self.config.max_body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            raise _too_large(limit)
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the body ended early")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            waited = self.config.body_timeout_s
            raise ApiError(408, f"the body did not arrive within {waited:g} s") from None

    def _note(
        self, scope: Scope, request_id: str, status: int, seconds: float, facts: dict[str, Any]
    ) -> None:
        route = scope.get("route")
        # a client's own path is no label: there would be as many as it cares to make up
        path = getattr(route, "path", None) or "other"
        path = path if status not in (401, 404, 421) else "other"
        self.metrics.requests.labels(path, str(status or 499)).inc()
        self.metrics.duration.labels(path).observe(seconds)
        level = logging.DEBUG if scope["path"] in ("/health", "/ready", "/metrics") else 20
        extra = {
            "event": "request",
            "request_id": request_id,
            "method": scope["method"],
            "path": path,
            "status": status or 499,
            "duration_ms": round(seconds * 1000, 1),
            **facts,
        }
        log.log(level, "%s %s %s", scope["method"], path, status or 499, extra=extra)


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is over {limit} bytes", code="body_too_large", allowed=f"{limit} bytes"
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, and then what really comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
