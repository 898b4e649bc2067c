"""What a server is and what it can do, found by asking it.

A server without the plugin ignores a control silently, so the control is probed with one that is
out of range: a server with lenvm refuses it and names the field; any other answers.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from lenvm.errors import EndpointError, InputError
from lenvm.evals.generator import Feature
from lenvm.evals.wire import ENGINES, Engine, wrap_control

BAD_CONTROL = {"equal_to": -1}
BAD_DECAY = {"exponential_decay_length_penalty": [-1, -1.0]}
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Endpoint:
    """A server: `url` ends in /v1; `missing` says, per feature, in a sentence what it lacks."""

    url: str
    model: str
    engine: Engine
    max_length: int | None = None
    missing: dict[Feature, str] = field(default_factory=dict)


def probe(
    url: str, *, model: str | None = None, engine: str = "auto", api_key: str = "none"
) -> Endpoint:
    """Ask a server for its model, its wire form and its features.

    engine: one of ENGINES, or "auto". Raises EndpointError where the server does not answer or has
    several models and none was chosen.
    """
    if engine != "auto" and engine not in ENGINES:
        raise InputError(f"engine is {engine!r}; allowed: auto, {', '.join(ENGINES)}")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"endpoint is {url!r}; it must start with http:// or https://")
    return asyncio.run(_probe(url.rstrip("/"), model, engine, api_key))


async def _probe(url: str, model: str | None, engine: str, api_key: str) -> Endpoint:
    from lenvm.evals.client import open_client

    async with open_client(url, api_key, PROBE_TIMEOUT_S, 2) as client:
        entry = await _find_model(client, url, model)
        body = {
            "model": entry["id"],
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        }
        candidates: list[Engine] = [e for e in ENGINES if e != "openai" and engine in ("auto", e)]
        found: Engine | None = None
        for name in candidates:
            if await _refuses(client, body | wrap_control(name, BAD_CONTROL), "equal_to"):
                found = name
                break
        missing: dict[Feature, str] = {}
        if found is None:
            found = next((e for e in ENGINES if e == engine), None) or _guess(entry)
            reason = f"the server at {url} has no lenvm plugin: it ignores length controls"
            missing |= {"control": reason, "conditional": reason}
        elif await _refuses(
            client, body | wrap_control(found, {"equal_to": 1, "rule": "conditional"}), ""
        ):
            missing["conditional"] = "its value model has no distribution head"
        if not await _refuses(client, body | BAD_DECAY, "exponential_decay"):
            missing["eos_decay"] = f"the server at {url} has no exponential_decay_length_penalty"
        if found == "openai":
            missing["continue"] = f"the server at {url} is not known to continue a given answer"
    limit = entry.get("max_model_len") or entry.get("max_length")
    return Endpoint(url, entry["id"], found, int(limit) if limit else None, missing)


async def _find_model(client: Any, url: str, model: str | None) -> dict[str, Any]:
    import openai

    try:
        reply = await client.get("/models", cast_to=object)
        entries = {str(entry["id"]): entry for entry in reply["data"]}
    except openai.APIConnectionError as error:
        raise EndpointError(
            f"{url} does not answer ({error.__cause__ or error}); is the server running?"
        ) from None
    except (openai.APIStatusError, KeyError, TypeError, ValueError) as error:
        raise EndpointError(f"{url}/models gives no list of models: {error}") from None
    if model is None and len(entries) == 1:
        return dict(next(iter(entries.values())))
    if model not in entries:
        raise EndpointError(
            f"{url} serves {', '.join(entries) or 'no model'}; "
            + (f"not {model!r}" if model else "choose one with --model")
        )
    return dict(entries[model])


async def _refuses(client: Any, body: dict[str, Any], named: str) -> bool:
    """True where the server answers 4xx with `named` in its message."""
    import openai

    try:
        await client.post("/chat/completions", body=body, cast_to=object)
    except openai.APIStatusError as error:
        if error.status_code >= 500:
            raise EndpointError(f"the server fails on a small request: {error.message}") from None
        return named in str(error.body) or named in error.message
    except openai.APIConnectionError as error:
        raise EndpointError(f"the server stopped answering: {error.__cause__ or error}") from None
    return False


def _guess(entry: dict[str, Any]) -> Engine:
    """The engine by what /v1/models says of its owner."""
    owner = str(entry.get("owned_by", "")).lower()
    return next((e for e in ("vllm", "sglang", "lenvm") if e == owner), "openai")


def describe(endpoint: Endpoint) -> str:
    """One line for the terminal."""
    limit = f", at most {endpoint.max_length:,} tokens" if endpoint.max_length else ""
    control = "no length control" if "control" in endpoint.missing else "length control"
    return f"{endpoint.model} at {endpoint.url} ({endpoint.engine}{limit}, {control})"
