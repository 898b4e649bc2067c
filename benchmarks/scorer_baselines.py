"""What the candidate scorer is measured against, written for the benchmark only.

`TwoForward` is the published way: append the chosen token in one forward, score the candidates in
a second one under a mask, both eager, on a dense KV cache. `naive` runs every candidate with its
whole prefix through the model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "lenvm_two_forward"


class _DenseCache:
    """Keys and values [L][2, B, Hkv, T, D]; a forward writes its tokens from `start`."""

    def __init__(self, backbone: Any, batch: int, length: int) -> None:
        config = backbone.config
        head_size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        shape = (2, batch, config.num_key_value_heads, length, head_size)
        like = next(backbone.parameters())
        self.layers = [
            torch.randn(shape, dtype=like.dtype, device=like.device)
            for _ in range(config.num_hidden_layers)
        ]
        self.start = 0
        self.mask: Tensor | None = None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    cache: _DenseCache = kwargs.pop("dense_cache")
    kv, end = cache.layers[module.layer_idx], cache.start + key.shape[2]
    kv[0, :, :, cache.start : end] = key
    kv[1, :, :, cache.start : end] = value
    keys, values = kv[0, :, :, :end], kv[1, :, :, :end]
    kwargs.pop("is_causal", None)
    out, _ = sdpa_attention_forward(
        module, query, keys, values, cache.mask, is_causal=False, **kwargs
    )
    return out, None


class TwoForward:
    """Step of `batch` requests with a prefix of `prefix` tokens and `width` candidates each."""

    def __init__(self, backbone: Any, head: Any, batch: int, prefix: int, width: int) -> None:
        AttentionInterface.register(NAME, _attention)
        self.backbone, self.head = backbone, head
        self.batch, self.prefix, self.width = batch, prefix, width
        self.cache = _DenseCache(backbone, batch, prefix + 1 + width)
        device = next(backbone.parameters()).device
        seen = torch.ones(width, prefix + 1, dtype=torch.bool, device=device)
        itself = torch.eye(width, dtype=torch.bool, device=device)
        self.mask = torch.cat([seen, itself], 1).expand(batch, 1, -1, -1)

    @torch.inference_mode()
    def step(self, chosen_B: Tensor, candidates_BK: Tensor) -> Tensor:
        """-> raw outputs [B, K, D]."""
        self._forward(chosen_B.unsqueeze(1), self.prefix, None)
        hidden = self._forward(candidates_BK, self.prefix + 1, self.mask)
        raw: Tensor = self.head(hidden)
        return raw

    def _forward(self, tokens: Tensor, start: int, mask: Tensor | None) -> Tensor:
        self.cache.start, self.cache.mask = start, mask
        before = self.backbone.config._attn_implementation
        self.backbone.config._attn_implementation = NAME
        try:
            out = self.backbone(
                input_ids=tokens,
                position_ids=torch.full_like(tokens, start),
                use_cache=False,
                dense_cache=self.cache,
            )
        finally:
            self.backbone.config._attn_implementation = before
        hidden: Tensor = out.last_hidden_state
        return hidden


@torch.inference_mode()
def naive(backbone: Any, head: Any, sequences_BT: Tensor) -> Tensor:
    """Raw outputs of the last token of every sequence, each run from its start: [B, D]."""
    hidden = backbone(input_ids=sequences_BT, use_cache=False).last_hidden_state[:, -1]
    raw: Tensor = head(hidden)
    return raw
