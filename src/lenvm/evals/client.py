"""HttpGenerator: answers from any OpenAI-compatible server, many requests at once.

The openai client does connections, time-outs and retries; bodies are read as plain JSON, since an
answer's log-probabilities are too many objects to build for each.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from functools import cache
from typing import Any

from lenvm.errors import EndpointError, InputError
from lenvm.evals.generator import Feature, GenerationRequest, GenerationResponse, OnResponse
from lenvm.evals.probe import Endpoint
from lenvm.evals.wire import build_body, parse_completion, reports_generator

TokenCounter = Callable[[str], int]
CONNECTIONS_PER_CLIENT = 16
"""The HTTP pool looks at all its connections for every request: many small pools are cheaper."""


class HttpGenerator:
    """A `Generator` over one server. Made by `connect`."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        api_key: str = "none",
        concurrency: int = 64,
        timeout_s: float = 600.0,
        max_retries: int = 4,
        eos_token_ids: tuple[int, ...] = (),
        token_counter: TokenCounter | None = None,
    ) -> None:
        """eos_token_ids: for the EOS-bias arm; token_counter: for arms that strip text."""
        if concurrency < 1:
            raise InputError(f"concurrency is {concurrency}; it must be at least 1")
        self.endpoint = endpoint
        self.concurrency, self.eos_token_ids = concurrency, eos_token_ids
        self._api_key, self._timeout_s, self._max_retries = api_key, timeout_s, max_retries
        self._token_counter = token_counter
        self._unreachable = 0

    @property
    def model(self) -> str:
        return self.endpoint.model

    @property
    def max_length(self) -> int | None:
        return self.endpoint.max_length

    def lacks(self, feature: Feature) -> str | None:
        if feature == "count_tokens":
            return None if self._token_counter else "counting its tokens needs a tokenizer"
        if feature == "eos_bias":
            return None if self.eos_token_ids else "the ids of the ending tokens are not known"
        return self.endpoint.missing.get(feature)

    def count_tokens(self, text: str) -> int:
        if self._token_counter is None:
            raise InputError("counting tokens needs a tokenizer")
        return self._token_counter(text)

    def generate(self, requests: Iterable[GenerationRequest], on_response: OnResponse) -> None:
        asyncio.run(self._generate(iter(requests), on_response))

    async def _generate(self, source: Iterator[GenerationRequest], on_response: OnResponse) -> None:
        self._unreachable = 0
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    open_client(
                        self.endpoint.url, self._api_key, self._timeout_s, self._max_retries
                    )
                )
                for _ in range(-(-self.concurrency // CONNECTIONS_PER_CLIENT))
            ]
            workers = [
                asyncio.create_task(self._work(clients[i % len(clients)], source, on_response))
                for i in range(self.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(
        self, client: Any, source: Iterator[GenerationRequest], on_response: OnResponse
    ) -> None:
        for request in source:
            on_response(await self._answer(client, request))

    async def _answer(self, client: Any, request: GenerationRequest) -> GenerationResponse:
        import openai

        body = build_body(request, self.endpoint.engine, self.model, self.eos_token_ids)
        start = time.perf_counter()
        fields: dict[str, Any]
        try:
            reply = await client.post("/chat/completions", body=body, cast_to=object)
            fields = parse_completion(reply)
            if not reports_generator(request, self.endpoint.engine):
                fields["mean_log_prob"] = fields["last_log_prob"] = None
            self._unreachable = 0
        except openai.APIConnectionError as error:
            self._count_unreachable(error)
            fields = {"error": f"no answer: {error.__cause__ or error}"}
        except openai.APIStatusError as error:
            self._unreachable = 0
            fields = {"error": f"HTTP {error.status_code}: {error.message}"[:500]}
        except ValueError as error:
            fields = {"error": str(error)[:500]}
        return GenerationResponse(request.id, latency_s=time.perf_counter() - start, **fields)

    def _count_unreachable(self, error: Exception) -> None:
        """A server that answers nobody is gone: stop, so that the run can be continued later."""
        self._unreachable += 1
        if self._unreachable > 2 * self.concurrency:
            raise EndpointError(
                f"{self.endpoint.url} stopped answering ({error.__cause__ or error}); what is "
                "finished is kept, run the same command again when it is back"
            ) from error


def open_client(url: str, api_key: str, timeout_s: float, max_retries: int) -> Any:
    """An openai client: its `post` and `get` give plain JSON with `cast_to=object`."""
    import openai

    return openai.AsyncOpenAI(
        base_url=url,
        api_key=api_key,
        max_retries=max_retries,
        timeout=openai.Timeout(timeout_s, connect=30.0),
        http_client=openai.DefaultAsyncHttpxClient(verify=_ssl_context()),
    )


@cache
def _ssl_context() -> ssl.SSLContext:
    """One for all clients: making one takes as long as many requests."""
    return ssl.create_default_context()


def connect(
    url: str,
    *,
    model: str | None = None,
    engine: str = "auto",
    api_key: str = "none",
    **options: Any,
) -> HttpGenerator:
    """A generator for a server, after asking what it is. `options`: those of HttpGenerator."""
    from lenvm.evals.probe import probe

    endpoint = probe(url, model=model, engine=engine, api_key=api_key)
    return HttpGenerator(endpoint, api_key=api_key, **options)
