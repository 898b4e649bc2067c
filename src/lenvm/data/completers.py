"""Where completions come from: the `Completer` seam and its HTTP implementation.

A completer turns one `SampleRequest` (a prompt, n completions) into n `Sampled` with token ids.
`HttpCompleter` speaks to any OpenAI-compatible server and knows what each kind of server calls its
extensions. It does so over aiohttp alone: the openai client on top of it takes more time than all
that is done here. It neither retries nor schedules: `sampler` does. What goes wrong is a
`CompletionError` that says whether trying again, or elsewhere, can help.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lenvm.data.images import to_wire_messages
from lenvm.data.prompts import Prompt
from lenvm.errors import EndpointError, InputError

ServerKind = Literal["vllm", "sglang", "lenvm", "openai"]
SERVER_KINDS: tuple[ServerKind, ...] = ("vllm", "sglang", "lenvm", "openai")
Fault = Literal["refused", "transient", "busy", "unreachable", "closed"]


@dataclass(frozen=True)
class SampleRequest:
    """n completions of one prompt in one request."""

    prompt: Prompt
    indices: tuple[int, ...]
    """Sample indices of the completions, one each."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """temperature, top_p, top_k, min_p, seed, max_tokens and what else the server takes."""
    control: Mapping[str, Any] | None = None
    """A LengthControl as JSON object, or None."""


@dataclass(frozen=True)
class Sampled:
    """One completion with the token ids that the model saw and wrote, the ending token included."""

    text: str
    finish_reason: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    usage: dict[str, int] | None = None
    """prompt_tokens, completion_tokens as the server counted; None where it did not say."""


class CompletionError(Exception):
    """A request that did not succeed.

    "refused": the request is at fault, trying again is no use; "transient": it may succeed later;
    "busy": the server lives and has no place now, `wait_s` is when to come again, None where it did
    not say; "unreachable": the server did not answer at all; "closed": the endpoint cannot serve
    this run.
    """

    def __init__(self, kind: Fault, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.wait_s = kind, wait_s


class Completer(Protocol):
    """A source of completions: an HTTP endpoint, or a model in this process."""

    name: str
    num_mismatched: int
    """Requests whose token ids and the server's own count disagree."""

    async def complete(self, request: SampleRequest) -> list[Sampled]:
        """As many completions as `request.indices`. Raises CompletionError."""
        ...

    async def close(self) -> None: ...


class TextEncoder(Protocol):
    """Re-tokenises where a server returns text alone."""

    eos_token_id: int

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids as the generator sees them, those that stand for images included."""
        ...

    def encode_text(self, text: str) -> list[int]: ...


class HttpCompleter:
    """Completions of one OpenAI-compatible endpoint."""

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str = "none",
        encoder: TextEncoder | None = None,
        server: ServerKind | None = None,
        timeout_s: float = 3600.0,
    ) -> None:
        """base_url: http://HOST:PORT/v1; model None takes the one that is served; server None asks
        the server itself, and takes one that does not say for a common one with extensions. Made
        inside a running event loop."""
        self.name = normalise_url(base_url)
        self.model, self.server = model, server
        self.encoder, self.num_mismatched = encoder, 0
        self._asks_for_ids = True
        self._timeout_s = timeout_s
        self._session = _open_session(self.name, api_key)

    async def connect(self) -> str:
        """Ask which models are served; returns the model's name. Raises CompletionError."""
        try:
            cards = (await self._call("/models")).get("data")
        except CompletionError as error:
            if self.model is not None and str(error).startswith("HTTP 404"):
                return self.model  # a server that lists no models: the name is taken as given
            raise
        if not isinstance(cards, list) or not all(isinstance(c, dict) for c in cards):
            raise CompletionError("closed", f"{self.name}/models is not a list of models")
        names = [str(card.get("id")) for card in cards]
        if self.model is None:
            if len(names) != 1:
                raise InputError(
                    f"{self.name} serves {len(names)} models ({', '.join(names)}); name one of them"
                )
            self.model = names[0]
        elif self.model not in names:
            raise CompletionError(
                "closed", f"serves {', '.join(names) or 'nothing'}, not {self.model}"
            )
        if self.server is None:
            owner = next((str(c.get("owned_by")) for c in cards if c.get("id") == self.model), "")
            self.server = next((kind for kind in SERVER_KINDS if kind == owner), None)
        return self.model

    async def complete(self, request: SampleRequest) -> list[Sampled]:
        asks = self._asks_for_ids
        path, body = self._build_body(request)
        try:
            answer = await self._call(path, body)
        except CompletionError as error:
            if not (error.kind == "refused" and asks and _names_extension(error)):
                raise
            self._asks_for_ids = False  # a server that takes no extensions: re-tokenise instead
            path, body = self._build_body(request)
            answer = await self._call(path, body)
        return self._read(request, answer)

    async def close(self) -> None:
        await self._session.close()

    async def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import aiohttp

        method, limit_s = ("GET", 30.0) if body is None else ("POST", self._timeout_s)
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=10.0)
        try:
            async with self._session.request(
                method, self.name + path, json=body, timeout=timeout
            ) as response:
                status, data = response.status, await response.read()
                wait_s = parse_retry_after(response.headers.get("Retry-After"))
        except TimeoutError:
            raise CompletionError("transient", "no answer within the time limit") from None
        except (aiohttp.ClientError, OSError) as error:
            raise CompletionError("unreachable", str(error) or type(error).__name__) from None
        except ValueError as error:  # a key or an address that HTTP has no form for
            raise CompletionError("closed", f"cannot be asked: {error}") from None
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if status >= 400:
            said = _find_message(answer) or data[:500].decode("utf-8", "replace")
            raise _status_error(status, said, wait_s, answer)
        if not isinstance(answer, dict):
            raise CompletionError("transient", f"the answer is not a JSON object: {data!r:.80}")
        return answer

    def _build_body(self, request: SampleRequest) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": self.model, "n": len(request.indices)}
        body.update((k, v) for k, v in request.sampling.items() if v is not None)
        if body.get("top_k", 1) < 1:
            del body["top_k"]
        if not body.get("min_p", 1):
            del body["min_p"]
        if request.control is not None:
            body.update(to_wire_control(request.control, self.server))
        prompt = request.prompt
        if self._asks_for_ids:
            chat = prompt.messages is not None
            body.update(_token_id_fields(self.server, chat=chat))
        if prompt.messages is None:
            return "/completions", {**body, "prompt": prompt.prompt_text}
        return "/chat/completions", {**body, "messages": to_wire_messages(prompt)}

    def _read(self, request: SampleRequest, answer: dict[str, Any]) -> list[Sampled]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != len(request.indices):
            found = len(choices) if isinstance(choices, list) else "no"
            raise CompletionError(
                "transient", f"asked for {len(request.indices)} completions, got {found}"
            )
        usage = answer.get("usage") or {}
        encoder = self.encoder
        sampled: list[tuple[str, str, list[int], list[int]]] = []
        for choice in choices:
            message = choice.get("message") or {}
            text = choice.get("text", message.get("content")) or ""
            text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
            reason = str(choice.get("finish_reason"))
            ids = _completion_ids(choice)
            prompt_ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
            if encoder is None and (ids is None or prompt_ids is None):
                raise CompletionError(
                    "closed",
                    "the server returns no token ids; name its tokenizer (--tokenizer), or use a "
                    "server that returns them (vLLM 0.11 on, SGLang 0.5.13 on)",
                )
            if ids is None and encoder is not None:
                ids = encoder.encode_text(text) + [encoder.eos_token_id] * (reason == "stop")
            if prompt_ids is None and encoder is not None:
                prompt_ids = encoder.encode_prompt(request.prompt)
            if not ids or not prompt_ids:
                raise CompletionError("transient", "a completion without a token")
            sampled.append((text, reason, prompt_ids, ids))
        agrees = usage.get("completion_tokens") == sum(len(s[3]) for s in sampled)
        self.num_mismatched += not agrees
        counts = _split_usage(usage, [len(s[3]) for s in sampled], agrees=agrees)
        return [
            Sampled(text, reason, prompt_ids, ids, count)
            for (text, reason, prompt_ids, ids), count in zip(sampled, counts, strict=True)
        ]


def normalise_url(url: str) -> str:
    """http://HOST:PORT with /v1 where no path is given. InputError for what is no HTTP address."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        raise InputError(f"endpoint {url!r}: expected an address such as http://127.0.0.1:8000/v1")
    url = url.rstrip("/")
    return url if url.count("/") > 2 else url + "/v1"


def to_wire_control(control: Mapping[str, Any], server: ServerKind | None) -> dict[str, Any]:
    """The request field that carries a length control to a server of that kind."""
    if server == "vllm":
        return {"vllm_xargs": {"lenvm": json.dumps(dict(control))}}
    if server == "sglang":
        return {"custom_params": {"lenvm": dict(control)}}
    return {"length": dict(control)}


def _token_id_fields(server: ServerKind | None, *, chat: bool) -> dict[str, Any]:
    """What asks a server of that kind for token ids."""
    if server == "openai":
        return {}
    if server == "sglang" and chat:
        return {"logprobs": True, "return_meta_info": True, "return_prompt_token_ids": True}
    return {"return_token_ids": True}


def _completion_ids(choice: dict[str, Any]) -> list[int] | None:
    """Token ids of a choice in vLLM's form, or in SGLang's (log-probs of meta_info)."""
    if choice.get("token_ids") is not None:
        return list(choice["token_ids"])
    triples = (choice.get("meta_info") or {}).get("output_token_logprobs")
    return None if triples is None else [int(triple[1]) for triple in triples]


def _split_usage(
    usage: Mapping[str, Any], lengths: list[int], *, agrees: bool
) -> list[dict[str, int] | None]:
    """The server's count for each completion: it counts a request as a whole."""
    prompt = usage.get("prompt_tokens")
    if prompt is None or (not agrees and len(lengths) > 1):
        return [None] * len(lengths)
    counts = lengths if agrees else [int(usage.get("completion_tokens") or 0)]
    return [{"prompt_tokens": int(prompt), "completion_tokens": count} for count in counts]


def _find_message(answer: Any) -> str:
    """What a server says of an error; empty where it says it in no known form."""
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else str(error or "")


def _find_detail(answer: Any, name: str) -> Any:
    """`param` or `code` of an error in OpenAI's form; None where there is none."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return error.get(name) if isinstance(error, dict) else None


def _status_error(status: int, message: str, wait_s: float | None, answer: Any) -> CompletionError:
    said = f"HTTP {status}: {message}"
    if status == 429 and _find_detail(answer, "code") == "insufficient_quota":
        return CompletionError("closed", said)  # OpenAI's: no waiting helps
    if status == 429 or (status == 503 and wait_s is not None):
        return CompletionError("busy", said, wait_s=wait_s)
    if status in (401, 403, 404, 405):
        return CompletionError("closed", said)
    if status in (408, 409, 425) or status >= 500:
        return CompletionError("transient", said)
    if _find_detail(answer, "param") == "n":
        said += "; ask for fewer completions in one request (--per-request)"
    return CompletionError("refused", said)


def parse_retry_after(text: str | None) -> float | None:
    """Seconds from now of a Retry-After header: a number, or an HTTP date; None for neither."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _names_extension(error: CompletionError) -> bool:
    fields = ("return_token_ids", "return_meta_info", "return_prompt_token_ids", "logprobs")
    return any(name in str(error) for name in fields)


def _open_session(url: str, api_key: str) -> Any:
    """Connections to one server, as many as there are requests; by a proxy where the environment
    names one (asked here: aiohttp would ask again for every request)."""
    import aiohttp

    parts = urlsplit(url)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers={"Authorization": f"Bearer {api_key}"},
        proxy=None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme),
    )


def check_images(prompts: list[Prompt]) -> None:
    """Raise InputError for the first image file that is not there, before anything is sent."""
    for prompt in prompts:
        for image in prompt.images:
            if not image.startswith(("http://", "https://", "data:")) and not Path(image).is_file():
                raise InputError(f"prompt {prompt.prompt_hash}: no image file {image}")


async def connect_all(completers: list[HttpCompleter]) -> tuple[str, dict[str, str]]:
    """Connect to every endpoint: (the model's name, why each dead one is left out, by name).

    Raises EndpointError where none answers, InputError where they serve different models.
    """
    dead: dict[str, str] = {}
    models: dict[str, str] = {}
    for completer in completers:
        try:
            models[completer.name] = await completer.connect()
        except CompletionError as error:
            dead[completer.name] = str(error)
    if not models:
        rows = "\n".join(f"  {name}: {why}" for name, why in dead.items())
        raise EndpointError(
            f"no endpoint can serve this run:\n{rows}\nStart the server, or correct the address "
            "(http://HOST:PORT/v1) or the model's name, and run the same command again."
        )
    if len(set(models.values())) > 1:
        rows = "\n".join(f"  {name}: {model}" for name, model in models.items())
        raise InputError(f"the endpoints serve different models:\n{rows}\nName one: --model")
    return next(iter(models.values())), dead
