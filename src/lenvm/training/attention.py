"""Attention over packed batches, registered with transformers as `lenvm_packed`.

A batch is a row of segments (`Packing`): each attends causally to its own keys and to nothing else,
which keeps sequences apart and lets the completions of a shared prompt see it. On CUDA in bf16 or
fp16 all segments are one flash-attention call (`torch.nn.attention.varlen`); elsewhere one SDPA
call each. No mask is ever built.

Shape legend: N query tokens of the batch, Hq and Hkv heads, D head size.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm.data.packing import Packing
from lenvm.errors import InputError, TrainingError

NAME = "lenvm_packed"
REFUSED = {"softcap": "soft-capped scores", "s_aux": "attention sinks", "position_bias": "a bias"}
Kernel = Callable[[Tensor, Tensor, Tensor, Packing, float | None, int | None], Tensor]


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, N, D], key and value [1, Hkv, N, D].

    Without `packing` the rows are single sequences, padded at the end if at all: causality alone
    keeps the padding out. Raises InputError for a kind of attention that it does not compute.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise InputError(
                f"this backbone attends with {what}, which packed attention does not compute; "
                "train another backbone"
            )
    kernel_dtype = _kernel_dtype(query)
    if kernel_dtype is not None:
        # rotary positions turn q and k into fp32 where the residual stream is fp32
        query, key, value = (x.to(kernel_dtype) for x in (query, key, value))
    else:
        key, value = key.to(query.dtype), value.to(query.dtype)
    if packing is None:
        return _causal(query, key, value, scaling, sliding_window, dropout).transpose(1, 2), None
    if packing.key_index is not None:
        key, value = (x.index_select(2, packing.key_index) for x in (key, value))
    if kernel_dtype is None:
        return _one_by_one(query, key, value, scaling, sliding_window, dropout, packing), None
    if dropout:
        raise InputError(f"the backbone's attention dropout is {dropout}; packed batches need 0")
    if _KERNEL is None:
        raise TrainingError(
            f"torch {torch.__version__} has no torch.nn.attention.varlen; use torch >= 2.11"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _KERNEL(q, k, v, packing, scaling, sliding_window).unsqueeze(0), None


def _kernel_dtype(query: Tensor) -> torch.dtype | None:
    """The type in which flash attention takes these tensors, None where it cannot."""
    if not query.is_cuda:
        return None
    if query.dtype in (torch.bfloat16, torch.float16):
        return query.dtype
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return None


# its lengths are data: compiled, it would be compiled for each
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    dropout: float,
    packing: Packing,
) -> Tensor:
    queries, keys = packing.cu_queries.tolist(), packing.cu_keys.tolist()
    outs = []
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(queries), itertools.pairwise(keys), strict=True
    ):
        q, k, v = query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1]
        outs.append(_causal(q, k, v, scaling, window, dropout))
    return torch.cat(outs, 2).transpose(1, 2)


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Causal attention whose last query stands at the last key: [B, Hq, Tq, D]."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None
    if num_queries != num_keys or (window is not None and num_keys > window):
        at = torch.arange(num_keys, device=query.device)
        distance = at[num_keys - num_queries :].unsqueeze(-1) - at
        mask = (distance >= 0) & (distance < (window or num_keys))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def bind_kernel(varlen_attn: Callable[..., Any]) -> Kernel:
    """A call that suits this torch's `varlen_attn`: 2.11 and 2.13 name their options differently.

    Where the kernel knows no grouped queries, keys and values are repeated for the query heads.
    """
    known = inspect.signature(varlen_attn).parameters
    grouped, windowed, scaled = (n in known for n in ("enable_gqa", "window_size", "scale"))
    if not windowed and "is_causal" not in known:
        raise TrainingError(
            f"torch {torch.__version__}: varlen_attn knows neither window_size nor is_causal; "
            "packed training on a GPU needs torch 2.11 to 2.13"
        )

    def call(
        q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        options: dict[str, Any] = {}
        if group > 1 and grouped:
            options["enable_gqa"] = True
        elif group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if windowed:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None:
            options["is_causal"] = True
        else:
            raise TrainingError(
                f"torch {torch.__version__} has no sliding window in varlen_attn; upgrade torch"
            )
        if scaled:
            options["scale"] = scaling
        elif scaling is not None:
            q = q * (scaling * q.shape[-1] ** 0.5)
        out = varlen_attn(
            q,
            k,
            v,
            packing.cu_queries,
            packing.cu_keys,
            packing.max_queries,
            packing.max_keys,
            **options,
        )
        assert isinstance(out, Tensor)
        return out

    return call


def _find_kernel() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # an older torch trains on CPUs as well
        return None
    return bind_kernel(varlen_attn)


_KERNEL = _find_kernel()  # once: a look-up inside the model could not be compiled


def use_packed_attention(backbone: Any) -> None:
    """Make a decoder (of a VLM: its text part) attend by `packed_attention`.

    transformers builds no mask for an attention that has no mask function registered.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    backbone.config.get_text_config()._attn_implementation = NAME


def restore_attention(backbone: Any) -> None:
    """Back to SDPA, which any transformers can load."""
    for config in (backbone.config, backbone.config.get_text_config()):
        config._attn_implementation = "sdpa"
