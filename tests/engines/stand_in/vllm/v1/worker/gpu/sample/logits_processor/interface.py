"""The V2 interface's shape (vLLM after 0.25, same path)."""

from abc import ABC, abstractmethod
from typing import Any


class LogitsProcessor(ABC):
    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.vllm_config = vllm_config

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    @abstractmethod
    def apply(self, logits: Any, ctx: Any) -> Any: ...
