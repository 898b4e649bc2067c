"""Example answers for the OpenAPI schema; the tests compare their fields with real answers."""

from typing import Any

_BELIEF = {
    "value": -0.217,
    "length": 37.0,
    "mean": 76.1,
    "geometric_mean": 38.4,
    "p10": 8.0,
    "p50": 37.0,
    "p90": 157.0,
}
_ABOUT = {"object": "list", "model": "smollm2", "gamma": 0.9955, "head": "distribution"}
_USAGE = {
    "prompt_tokens": 36,
    "completion_tokens": 120,
    "total_tokens": 156,
    "lenvm": {"predicted_length": 159.0},
}
_LENGTHS = {"predicted_length": 159.0, "num_tokens": 120}

CHAT = {
    "id": "chatcmpl-1f0c",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "smollm2",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {
                "role": "assistant",
                "content": "The sky is blue because ...",
                "refusal": None,
            },
            "lenvm": _LENGTHS,
        }
    ],
    "usage": _USAGE,
}
COMPLETION = {
    "id": "cmpl-1f0c",
    "object": "text_completion",
    "created": 1790000000,
    "model": "smollm2",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "text": " there was a fox ...",
            "lenvm": _LENGTHS,
        }
    ],
    "usage": _USAGE,
}
CHUNK = {
    "id": "chatcmpl-1f0c",
    "object": "chat.completion.chunk",
    "created": 1790000000,
    "model": "smollm2",
    "choices": [
        {
            "index": 0,
            "finish_reason": None,
            "logprobs": None,
            "delta": {"role": "assistant", "content": "The"},
        }
    ],
    "lenvm": {"value": -0.408, "remaining": 104.0, "num_tokens": 1, "predicted_length": 159.0},
}
PREDICT = _ABOUT | {
    "data": [
        {"index": 0, "prompt_tokens": 34} | _BELIEF | {"median": 37.0, "interval_80": [8.0, 157.0]}
    ]
}
VALUES = _ABOUT | {
    "values": [[_BELIEF]],
    "lengths": [[37.0]],
    "token_ids": [[504]],
    "tokens": [["The"]],
}
CANDIDATES = _ABOUT | {
    "data": [
        {
            "index": 0,
            "prompt_tokens": 3,
            "candidates": [
                {"token_id": 253, "token": " a", "log_prob": -1.05, "is_ending": False} | _BELIEF
            ],
        }
    ]
}


def answers(example: dict[str, Any], chunk: dict[str, Any] | None = None) -> dict[int | str, Any]:
    """`responses` of a route: its 200 with an example, and one of a streamed event."""
    content: dict[str, Any] = {"application/json": {"example": example}}
    if chunk is not None:
        content["text/event-stream"] = {"example": chunk}
    return {200: {"description": "The answer.", "content": content}}
