"""Where SGLang runs processors."""

from typing import Any


def apply_custom_logit_processor(logits: Any, sampling_batch_info: Any) -> None:
    raise AssertionError("lenvm's hook stands in front of this")
