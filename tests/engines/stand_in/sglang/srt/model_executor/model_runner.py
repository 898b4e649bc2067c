"""The worker: `sample` as SGLang's, without what lenvm does not touch."""

from typing import Any

from sglang.srt.layers import sampler


class ModelRunner:
    def __init__(self, server_args: Any, tp_rank: int = 0, tp_size: int = 1) -> None:
        self.server_args, self.device, self.gpu_id = server_args, "cpu", 0
        self.tp_rank, self.tp_size, self.pp_size = tp_rank, tp_size, 1
        self.is_draft_worker, self.is_generation = False, True
        self.initialize()

    def initialize(self) -> None: ...

    def sample(self, logits_output: Any, forward_batch: Any) -> Any:
        info = forward_batch.sampling_info
        if info.has_custom_logit_processor:
            sampler.apply_custom_logit_processor(logits_output, info)
        return logits_output
