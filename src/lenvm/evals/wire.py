"""Wire forms: how a request's length control is written for each server. Requests in, JSON out.

| engine | control | the rest |
|---|---|---|
| `lenvm` | `length: {...}` | our embedded server |
| `vllm` | `vllm_xargs: {"lenvm": "<json>"}` | stock vLLM with the plugin |
| `sglang` | `custom_params: {"lenvm": {...}}` | stock SGLang with the plugin |
| `openai` | none | any other server: unguided arms only |

The EOS baselines are OpenAI's `logit_bias`, and `exponential_decay_length_penalty: [start, factor]`
under the name that transformers gives it (a server may take it; ours is asked).
"""

import json
from typing import Any, Literal, get_args

from lenvm.evals.generator import GenerationRequest
from lenvm.guidance.request import LengthControl

Engine = Literal["lenvm", "vllm", "sglang", "openai"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


def wrap_control(engine: Engine, control: dict[str, Any]) -> dict[str, Any]:
    """The body fields that carry a control."""
    if engine == "vllm":
        return {"vllm_xargs": {"lenvm": json.dumps(control)}}
    if engine == "sglang":
        return {"custom_params": {"lenvm": control}}
    return {"length": control}


def control_to_json(control: LengthControl) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    return control.model_dump(exclude_defaults=True)


def build_body(
    request: GenerationRequest, engine: Engine, model: str, eos_token_ids: tuple[int, ...]
) -> dict[str, Any]:
    """The JSON body of /v1/chat/completions for a request."""
    sampling = request.sampling
    messages = [dict(m) for m in request.messages]
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "logprobs": True,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if sampling.min_p:
        body["min_p"] = sampling.min_p
    body |= sampling.penalties
    if request.control is not None:
        body |= wrap_control(engine, control_to_json(request.control))
    if request.eos_bias:
        body["logit_bias"] = {str(i): request.eos_bias for i in eos_token_ids}
    if request.eos_decay is not None:
        body["exponential_decay_length_penalty"] = list(request.eos_decay)
    if request.answer_prefix:
        messages.append({"role": "assistant", "content": request.answer_prefix})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def reports_generator(request: GenerationRequest, engine: Engine) -> bool:
    """True where the log-probabilities of the answer are the generator's own.

    SGLang computes them after logits processors, biases, penalties and the temperature.
    """
    changed = request.control is not None or request.eos_bias or request.eos_decay is not None
    changed = changed or request.sampling.temperature != 1 or bool(request.sampling.penalties)
    return engine != "sglang" or not changed


def parse_completion(body: dict[str, Any]) -> dict[str, Any]:
    """Fields of a GenerationResponse from a chat completion. ValueError for another shape."""
    try:
        choice, usage = body["choices"][0], body["usage"]
        tokens = ((choice.get("logprobs") or {}).get("content")) or []
        log_probs = [token["logprob"] for token in tokens]
        num_tokens = int(usage["completion_tokens"])
        is_whole = bool(log_probs) and len(log_probs) == num_tokens  # the ending token is there
        return {
            "text": choice["message"]["content"] or "",
            "num_tokens": num_tokens,
            "num_prompt_tokens": int(usage["prompt_tokens"]),
            "finish_reason": str(choice["finish_reason"]),
            "mean_log_prob": sum(log_probs) / len(log_probs) if log_probs else None,
            "last_log_prob": log_probs[-1] if is_whole else None,
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"not a chat completion ({type(error).__name__}: {error})") from None
