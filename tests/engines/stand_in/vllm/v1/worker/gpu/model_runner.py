"""The V2 runner, as far as it makes the sampler."""

from typing import Any

from vllm.v1.worker.gpu.sample.sampler import Sampler


class GPUModelRunner:
    def __init__(self, vllm_config: Any, req_states: Any, *, is_last: bool = True) -> None:
        self.vllm_config, self.req_states, self.is_last = vllm_config, req_states, is_last
        self.sampler: Sampler | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if self.is_last:
            self.sampler = Sampler()
