"""OpenAI's answers from the engine's events: pure functions, events in, JSON-ready dicts out."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from lenvm.engines.request import Completion
from lenvm.server.loop import Event
from lenvm.server.prompts import PromptEncoder

Kind = Literal["chat.completion", "text_completion"]
Json = dict[str, Any]


def sse(data: Json | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return b"data: " + text.encode("utf-8", errors="replace") + b"\n\n"


def length_state(event: Event) -> Json | None:
    """`lenvm` of a streamed chunk."""
    if event.value is None or event.remaining is None:
        return None
    return {
        "value": round(event.value, 6),
        "remaining": round(event.remaining, 2),
        "num_tokens": event.num_tokens,
        "predicted_length": event.predicted_length,
    }


def usage(num_prompt_tokens: int, completions: Sequence[Completion]) -> Json:
    """Token counts, and the length that was predicted before the first token: one number, or for
    several prompts `predicted_lengths`, in their order. completions: in the order of the choices.
    """
    num = sum(len(c.token_ids) for c in completions)
    counts: Json = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num,
        "total_tokens": num_prompt_tokens + num,
    }
    predicted = [c.predicted_length for c in completions if c.request.index == 0]
    if any(length is None for length in predicted):
        return counts
    many = len(predicted) > 1
    return counts | {
        "lenvm": {"predicted_lengths": predicted} if many else {"predicted_length": predicted[0]}
    }


def token_log_probs(kind: Kind, events: Sequence[Event], names: PromptEncoder) -> Json:
    """`logprobs` of a choice: of the generator's own distribution, before anything changes it."""
    given = [e for e in events if e.token_id is not None]
    tops = [[(names.name(i), p) for i, p in e.top_log_probs] for e in given]
    if kind == "text_completion":
        return {
            "tokens": [names.name(e.token_id) for e in given if e.token_id is not None],
            "token_logprobs": [e.log_prob for e in given],
            "top_logprobs": [dict(top) for top in tops],
            "text_offset": [e.offset for e in given],
        }
    content = []
    for event, top in zip(given, tops, strict=True):
        assert event.token_id is not None
        entry = _token(names.name(event.token_id), event.log_prob)
        content.append(entry | {"top_logprobs": [_token(name, p) for name, p in top]})
    return {"content": content, "refusal": None}


def choice(
    kind: Kind,
    index: int,
    completion: Completion,
    log_probs: Json | None,
    *,
    token_ids: bool = False,
) -> Json:
    """A finished choice."""
    shown: Json = {"index": index, "finish_reason": completion.finish_reason, "logprobs": log_probs}
    if kind == "chat.completion":
        shown["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
    else:
        shown["text"] = completion.text
    if completion.predicted_length is not None:
        shown["lenvm"] = {
            "predicted_length": completion.predicted_length,
            "num_tokens": len(completion.token_ids),
        }
    if token_ids:
        shown["prompt_token_ids"] = list(completion.request.prompt_token_ids)
        shown["token_ids"] = list(completion.token_ids)
    return shown


def delta(kind: Kind, event: Event, log_probs: Json | None, *, first: bool) -> Json:
    """The choice of a streamed chunk."""
    reason = event.completion.finish_reason if event.completion else None
    shown: Json = {"index": event.index, "finish_reason": reason, "logprobs": log_probs}
    if kind == "chat.completion":
        role = {"role": "assistant"} if first else {}
        shown["delta"] = role | {"content": event.text}
    else:
        shown["text"] = event.text
    return shown


def _token(name: str, log_prob: float | None) -> Json:
    whole = "\N{REPLACEMENT CHARACTER}" not in name
    return {"token": name, "logprob": log_prob, "bytes": list(name.encode()) if whole else None}
