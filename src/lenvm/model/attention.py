"""Attention of a RaggedDecoder: packed queries against per-request prefixes, and candidates merged.

Registered with transformers under `lenvm_ragged`; the model's own modelling code calls it with
rotated queries and keys of the packed tokens, and the `plan` of the current forward. No mask is
ever built for candidates: a candidate attends to its request's prefix, with the log-sum-exp
returned, and its own key and value are merged in closed form, so it cannot see its siblings.

Shape legend: L layers, S slots (requests), N packed tokens, R rows, K candidates a row, Hq query
heads, Hkv key heads, G = Hq / Hkv, C capacity of a slot in tokens, D head size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "lenvm_ragged"


@dataclass
class KVStore:
    """Keys and values of all slots, [L, 2, S, Hkv, C, D]; grown by doubling up to the budget."""

    data: Tensor

    @property
    def capacity(self) -> int:
        return int(self.data.shape[4])

    @property
    def num_slots(self) -> int:
        return int(self.data.shape[2])


@dataclass
class Segment:
    """Consecutive new tokens of one request: packed at `offset`, written from position `start`."""

    slot: int
    start: int
    length: int
    offset: int


@dataclass
class ExtendPlan:
    """Prefill or append: every token is written to the store, attention is causal per request."""

    store: KVStore
    segments: list[Segment]


@dataclass
class CandidatePlan:
    """One position for every row: attend to the prefix, then to oneself.

    With one candidate a row (`single`) it is written to the store at once, where a commit of that
    token finds it; with several, keys and values wait in `stash` for the choice.
    """

    store: KVStore
    slots: Tensor
    """[R] slot of each row."""
    lengths: Tensor
    """[R] prefix length of each row."""
    flat: Tensor
    """[N] index of each packed candidate in the padded [R * K] layout."""
    num_candidates: int
    single: bool
    num_slots: int
    """Slots 0 .. num_slots - 1 are read."""
    max_length: int
    bias: dict[int | None, Tensor] = field(default_factory=dict)
    """Additive mask over [num_slots, max_length (+1)] by sliding window (None = full)."""
    stash: list[Tensor] = field(default_factory=list)
    """Per layer [2, N, Hkv, D]."""


def ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    plan: ExtendPlan | CandidatePlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, N, D], key and value [1, Hkv, N, D]."""
    assert plan is not None, "a RaggedDecoder calls the backbone with its plan"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx)
    if isinstance(plan, ExtendPlan):
        out = _extend(plan, layer, query, key, value, scale, sliding_window)
    else:
        out = _candidates(plan, layer, query[0], key[0], value[0], scale, sliding_window)
    return out, None


def _extend(
    plan: ExtendPlan,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """-> [1, N, Hq, D]."""
    store = plan.store.data[layer]
    outs = []
    for s in plan.segments:
        new, end = slice(s.offset, s.offset + s.length), s.start + s.length
        store[0, s.slot, :, s.start : end] = key[0, :, new]
        store[1, s.slot, :, s.start : end] = value[0, :, new]
        causal = s.start == 0 and (window is None or end <= window)
        mask = None if causal else _causal_mask(s.start, s.length, window, query)
        outs.append(
            F.scaled_dot_product_attention(
                query[:, :, new],
                store[0, s.slot, None, :, :end],
                store[1, s.slot, None, :, :end],
                attn_mask=mask,
                is_causal=causal,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(outs, 2).transpose(1, 2)


def _causal_mask(start: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """True where query start + i may see position j: [length, start + length]."""
    at = torch.arange(start, start + length, device=like.device).unsqueeze(-1)
    seen = torch.arange(start + length, device=like.device)
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


def _candidates(
    plan: CandidatePlan,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """query [Hq, N, D] -> [1, N, Hq, D]."""
    store = plan.store.data[layer]
    num_heads, num_tokens, head_size = query.shape
    num_kv = key.shape[0]
    group, width = num_heads // num_kv, plan.num_candidates
    key_N, value_N = key.transpose(0, 1), value.transpose(0, 1)
    length = plan.max_length
    if plan.single:
        store[0, plan.slots, :, plan.lengths] = key_N
        store[1, plan.slots, :, plan.lengths] = value_N
        length += 1
    else:
        plan.stash.append(torch.stack([key_N, value_N]))
    # queries in slot order: [S, Hkv, G * K, D]; slots without a row hold zeros, and are not read
    rows = query.view(num_kv, group, num_tokens, head_size).permute(2, 0, 1, 3)
    padded = query.new_zeros(plan.slots.shape[0] * width, num_kv, group, head_size)
    padded[plan.flat] = rows
    by_row = padded.view(-1, width, num_kv, group, head_size).permute(0, 2, 3, 1, 4)
    by_slot = query.new_zeros(plan.num_slots, num_kv, group * width, head_size)
    by_slot[plan.slots] = by_row.reshape(-1, num_kv, group * width, head_size)
    if window not in plan.bias:
        plan.bias[window] = _prefix_bias(plan, length, window, query)
    keys = store[0, : plan.num_slots, :, :length]
    values = store[1, : plan.num_slots, :, :length]
    out, log_sum = attend(by_slot, keys, values, plan.bias[window], scale)
    if not plan.single:
        out = _to_tokens(out, plan, width)
        log_sum = _to_tokens(log_sum.unsqueeze(-1), plan, width)
        own = (rows * key_N.unsqueeze(2)).sum(-1, keepdim=True, dtype=torch.float32) * scale
        # softmax over {prefix, own}: weight of own = sigmoid(own score - log-sum-exp of prefix)
        weight = torch.sigmoid(own - log_sum)
        out = torch.lerp(out.float(), value_N.unsqueeze(2).float(), weight).to(query.dtype)
    else:
        out = _to_tokens(out, plan, width)
    return out.reshape(1, num_tokens, num_heads, head_size)


def _to_tokens(x: Tensor, plan: CandidatePlan, width: int) -> Tensor:
    """[S, Hkv, G * K, E] in slot order -> [N, Hkv, G, E] of the packed candidates."""
    num_kv, size = x.shape[1], x.shape[-1]
    by_row = x[plan.slots].view(-1, num_kv, x.shape[2] // width, width, size)
    return by_row.permute(0, 3, 1, 2, 4).reshape(-1, num_kv, x.shape[2] // width, size)[plan.flat]


def _prefix_bias(plan: CandidatePlan, length: int, window: int | None, like: Tensor) -> Tensor:
    """0 where a row's candidates may look, -inf elsewhere: [S, 1, 1, length]."""
    position = torch.arange(length, device=like.device)
    visible = torch.zeros(plan.num_slots, length, dtype=torch.bool, device=like.device)
    seen = plan.lengths.unsqueeze(-1) + (1 if plan.single else 0)
    mask = position < seen
    if window is not None:
        mask &= position > plan.lengths.unsqueeze(-1) - window
    visible[plan.slots] = mask
    visible[:, 0] |= ~visible.any(-1)  # slots that nobody reads: anything finite
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill(~visible, -torch.inf)[:, None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with log-sum-exp. query [S, Hkv, Q, D], key and value [S, Hkv, T, D], bias
    [S, 1, 1, T] -> out [S, Hkv, Q, D], log-sum-exp [S, Hkv, Q] fp32.
    """
    if query.device.type == "cpu" and query.dtype != torch.float16:
        mask = bias.expand(-1, 1, query.shape[2], -1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return out, log_sum.float()
    scores = (query @ key.transpose(-1, -2)).float() * scale + bias.float()
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.unsqueeze(-1)).exp().to(value.dtype)
    return weights @ value, log_sum


def register() -> None:
    """Make the attention known to transformers. Without a mask function of its name, transformers
    builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, ragged_attention)
