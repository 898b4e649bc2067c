"""Block-diagonal causal attention for packed batches, as transformers' attention `lenvm_packed`.

On CUDA in bf16 or fp16 one flash-attention call over all sequences; else one SDPA call each.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm.errors import TrainingError

NAME = "lenvm_packed"


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, N, D], key and value [1, Hkv, N, D].

    Without `cu_seqlens` [S + 1] the rows of the batch are single sequences, padded at the end.
    """
    if cu_seqlens is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # rotary positions turn q and k into fp32 where the residual stream is fp32
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash(query, key, value, scaling, sliding_window, cu_seqlens, max_length), None
    bounds = cu_seqlens.tolist()
    outs = []
    for start, end in itertools.pairwise(bounds):
        part = slice(start, end)
        window = sliding_window is not None and end - start > sliding_window
        mask = _window_mask(end - start, sliding_window, query.device) if window else None
        outs.append(
            F.scaled_dot_product_attention(
                query[:, :, part],
                key[:, :, part],
                value[:, :, part],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outs, 2).transpose(1, 2), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    at = torch.arange(length, device=device)
    distance = at.unsqueeze(-1) - at
    return (distance >= 0) & (distance < (window or length))


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    cu_seqlens: Tensor,
    max_length: int | None,
) -> Tensor:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # torch 2.11 and 2.13 differ
    group = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    longest = max_length or int(cu_seqlens.diff().max())
    left = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scaling} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = (left, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise TrainingError("sliding-window attention needs a newer torch (2.13 has it)")
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def use_packed_attention(backbone: Any) -> None:
    """Make a backbone attend by `packed_attention`; of a VLM its text part, since images are not
    causal. transformers builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    backbone.config.get_text_config()._attn_implementation = NAME
