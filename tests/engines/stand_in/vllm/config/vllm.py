"""The configuration, as far as it decides which runner runs."""

from importlib.metadata import entry_points
from typing import Any


class VllmConfig:
    def __init__(self, *, tensor_parallel_size: int = 1, **model: Any) -> None:
        from types import SimpleNamespace

        self.model_config = SimpleNamespace(logits_processors=None, **model)
        self.parallel_config = SimpleNamespace(tensor_parallel_size=tensor_parallel_size)

    def _get_v2_model_runner_unsupported_features(self) -> list[str]:
        declared = entry_points(group="vllm.logits_processors")
        needs_v1 = (
            ["prompt embeds"] if getattr(self.model_config, "enable_prompt_embeds", 0) else []
        )
        if self.model_config.logits_processors or declared:
            return [*needs_v1, "custom logits processors"]
        return needs_v1
