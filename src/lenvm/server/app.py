"""The application of one server: routes, page, health, metrics."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import JSONResponse, Response

from lenvm import __version__
from lenvm.engines.transformers import TransformersEngine
from lenvm.server import errors, generation, lengths
from lenvm.server.config import ServerConfig
from lenvm.server.guard import Guard
from lenvm.server.state import ServerState

PAGE_FILES = {
    "page.css": "text/css",
    "run.css": "text/css",
    "docs.css": "text/css",
    "docs.js": "text/javascript",
    "run.js": "text/javascript",
    "page.js": "text/javascript",
    "stream.js": "text/javascript",
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DESCRIPTION = "An OpenAI-compatible server whose answers have the length that is asked for."


def build_app(engine: TransformersEngine, config: ServerConfig) -> FastAPI:
    """The app over an in-process engine. `app.state.server` is its `ServerState`."""
    state = ServerState.build(engine, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.read_weights()
        state.loop.start()
        try:
            yield
        finally:
            await state.loop.stop()
            state.encoder.close()

    app = bare_app(config, state.metrics, lifespan)
    app.state.server = state
    app.include_router(generation.build_router(state))
    app.include_router(lengths.build_router(state))
    app.include_router(_about(state))
    return app


def bare_app(config: ServerConfig, metrics: Any, lifespan: Callable[..., Any]) -> FastAPI:
    """What every back-end has: guard, errors, page."""
    app = FastAPI(
        title="lenvm",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    app.add_middleware(Guard, config=config, metrics=metrics)

    @app.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page_file("index.html", "text/html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page_file("docs.html", "text/html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in PAGE_FILES:
            raise errors.ApiError(404, "no such file of the page")
        return _page_file(name, PAGE_FILES[name])

    return app


def _page_file(name: str, media_type: str) -> Response:
    data = files("lenvm.server").joinpath("page", name).read_bytes()
    headers = {
        "content-security-policy": PAGE_POLICY,
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(data, media_type=f"{media_type}; charset=utf-8", headers=headers)


def _about(state: ServerState) -> APIRouter:
    """Models, health, readiness."""
    router = APIRouter(tags=["server"])
    value_model = state.engine.value_model

    def entry() -> dict[str, Any]:
        about: dict[str, Any] = {
            "id": state.config.name,
            "object": "model",
            "created": 0,
            "owned_by": "lenvm",
            "max_model_len": state.engine.max_length,
        }
        if value_model is not None:
            session = state.engine.session
            about["lenvm"] = {
                "gamma": value_model.config.gamma,
                "head": value_model.config.head,
                "max_candidates": session.scorer.max_candidates if session else 0,
            }
        return about

    @router.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @router.get("/v1/models/{name}", summary="One model", responses=errors.RESPONSES)
    async def model(name: str) -> dict[str, Any]:
        state.check_model(name)
        return entry()

    @router.get("/health", summary="Whether the engine lives")
    async def health() -> Response:
        alive = not state.loop.failed
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @router.get("/ready", summary="Whether requests are taken")
    async def ready() -> Response:
        taken = not (state.loop.failed or state.loop.draining)
        return JSONResponse({"status": "ready" if taken else "draining"}, 200 if taken else 503)

    return router
