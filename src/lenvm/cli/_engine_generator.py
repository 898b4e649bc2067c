"""The in-process engine as an evaluation's generator: no server, the same records."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lenvm.engines.replicas import EngineReplicas
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Completion, Request, TransformersEngine
from lenvm.evals.generator import Feature, GenerationRequest, GenerationResponse, OnResponse
from lenvm.model.tokenization import encode_prompt


class EngineGenerator:
    """A `lenvm.evals.generator.Generator` over in-process engines. `model` labels results."""

    def __init__(self, engine: TransformersEngine | EngineReplicas, model: str) -> None:
        self.engine, self.model = engine, model
        self._encode_text = lru_cache(maxsize=8192)(self._encode)

    @property
    def max_length(self) -> int:
        return self.engine.max_length

    def lacks(self, feature: Feature) -> str | None:
        head = self.engine.head
        if feature in ("control", "conditional") and head is None:
            return "no value model is loaded (--lenvm)"
        if feature == "conditional" and head != "distribution":
            return "the value model has no distribution head"
        return None

    def count_tokens(self, text: str) -> int:
        return len(self.engine.tokenizer(text, add_special_tokens=False).input_ids)

    def generate(self, requests: Iterable[GenerationRequest], on_response: OnResponse) -> None:
        started: dict[str, float] = {}

        def fitting() -> Iterator[Request]:
            """Engine requests; those that can never run are answered with an error at once."""
            for request in requests:
                converted = self._convert(request)
                need = len(converted.prompt_token_ids) + request.max_tokens
                if need > self.max_length:
                    on_response(GenerationResponse(request.id, error=self._too_long(need)))
                    continue
                started[request.id] = time.perf_counter()
                yield converted

        for completion in self.engine.generate(fitting()):
            latency = time.perf_counter() - started.pop(completion.request.id)
            on_response(_to_response(completion, latency))

    def _too_long(self, need: int) -> str:
        return f"prompt and max_tokens need {need} tokens, the limit is {self.max_length}"

    def _convert(self, request: GenerationRequest) -> Request:
        sampling = request.sampling
        ids = self._encode_messages(request.messages)
        if request.answer_prefix:
            ids += tuple(
                self.engine.tokenizer(request.answer_prefix, add_special_tokens=False).input_ids
            )
        return Request(
            id=request.id,
            prompt_token_ids=ids,
            sampling=SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=sampling.seed,
                max_tokens=request.max_tokens,
                logit_bias=dict.fromkeys(self.engine.eos_token_ids, request.eos_bias)
                if request.eos_bias
                else {},
                exponential_decay_length_penalty=request.eos_decay,
                frequency_penalty=sampling.frequency_penalty,
                presence_penalty=sampling.presence_penalty,
                repetition_penalty=sampling.repetition_penalty,
            ),
            control=request.control,
        )

    def _encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids; arms and samples of a question share them."""
        rows = tuple(tuple(m.items()) for m in messages)
        is_text = all(isinstance(value, str) for row in rows for _, value in row)
        return self._encode_text(rows) if is_text else self._encode(rows)

    def _encode(self, rows: tuple[tuple[tuple[str, Any], ...], ...]) -> tuple[int, ...]:
        return tuple(encode_prompt(self.engine.tokenizer, [dict(row) for row in rows]))


def _to_response(completion: Completion, latency_s: float) -> GenerationResponse:
    return GenerationResponse(
        id=completion.request.id,
        text=completion.text,
        num_tokens=len(completion.token_ids),
        num_prompt_tokens=len(completion.request.prompt_token_ids),
        finish_reason=completion.finish_reason or "",
        mean_log_prob=sum(completion.log_probs) / len(completion.log_probs),
        last_log_prob=completion.log_probs[-1],
        latency_s=latency_s,
    )
