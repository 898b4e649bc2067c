"""Stand-in for vLLM in tests: the names and fields that lenvm's adapter touches, nothing else.

With the real package on the path (LENVM_TEST_VLLM names a folder of it) the tests use that."""

from dataclasses import dataclass, field
from typing import Any, ClassVar


class ModelRegistry:
    models: ClassVar[dict[str, str]] = {}

    @classmethod
    def get_supported_archs(cls) -> set[str]:
        return set(cls.models)

    @classmethod
    def register_model(cls, name: str, target: str) -> None:
        cls.models[name] = target


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] | None = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logit_bias: dict[int, float] | None = None
    thinking_token_budget: int | None = None
    extra_args: dict[str, Any] | None = None
    logprobs: int | None = None
    _eos_token_id: int | None = None

    @property
    def eos_token_id(self) -> int | None:
        return self._eos_token_id
