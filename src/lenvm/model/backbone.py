"""A model's own modelling code over packed tokens, with our attention in the place of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lenvm.model import attention
from lenvm.model.attention import AttentionPlan


def run_backbone(
    backbone: Any, tokens_N: Tensor, positions_N: Tensor, plan: AttentionPlan
) -> Tensor:
    """Final hidden states of packed tokens through the model's own modelling code: [N, H]."""
    with _ragged_attention(backbone):
        out = backbone(
            input_ids=tokens_N.unsqueeze(0),
            position_ids=positions_N.unsqueeze(0),
            use_cache=False,
            plan=plan,
        )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


@contextmanager
def _ragged_attention(backbone: Any) -> Iterator[None]:
    """The backbone with our attention, for one forward; it is left as it was."""
    configs = {id(c): c for c in (backbone.config, backbone.config.get_text_config())}.values()
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = attention.NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
