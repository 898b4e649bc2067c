"""Attention of a RaggedDecoder: packed queries against per-request prefixes, and candidates merged.

Registered with transformers under `lenvm_ragged`; the model's own modelling code calls it with
rotated queries and keys of the packed tokens, and the `plan` of the current forward does the rest.
No mask between candidates is ever built: a candidate attends to its request's prefix, with the
log-sum-exp returned, and its own key and value are merged in closed form, so it cannot see its
siblings. The plans here are plain torch, for any device; `cuda_plans.py` has those of the GPU.

Shape legend: L layers, P pages, S tokens of a page, N packed tokens, R rows (requests), K
candidates a row, Hq query heads, Hkv key heads, G = Hq / Hkv, T prefix tokens, D head size.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "lenvm_ragged"


class AttentionPlan(Protocol):
    """What one forward knows about its packed tokens."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] of the packed tokens -> [N, Hq, D].

        Keeps keys and values where the plan says. A window of w lets a token see itself and the
        w - 1 tokens before it."""


def ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, N, D], key and value [1, Hkv, N, D]."""
    assert plan is not None, "a RaggedDecoder calls the backbone with its plan"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query_N, key_N, value_N = (x[0].transpose(0, 1) for x in (query, key, value))
    out = plan.attend(int(module.layer_idx), query_N, key_N, value_N, scale, sliding_window)
    return out.unsqueeze(0), None


def register() -> None:
    """Make the attention known to transformers. Without a mask function of its name, transformers
    builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, ragged_attention)


@dataclass
class Segment:
    """Consecutive new tokens of one request: packed at `offset`, placed from position `start`."""

    offset: int
    start: int
    length: int
    slots: Tensor
    """Slots of positions 0 .. start - 1, empty where start is 0."""


@dataclass
class TorchExtend:
    """Prefill or append: every token is written to the store, attention is causal per request.

    Packed tokens after the last segment are padding: they are not written, and mean nothing."""

    data: Tensor
    """[L, 2, P, S, Hkv, D]"""
    write_slots: Tensor
    """[N - padding] slot of each packed token."""
    segments: list[Segment]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        store = self.data[layer].flatten(1, 2)  # [2, P * S, Hkv, D]
        num_tokens = len(self.write_slots)
        store[0].index_copy_(0, self.write_slots, k[:num_tokens])
        store[1].index_copy_(0, self.write_slots, v[:num_tokens])
        outs = []
        for s in self.segments:
            new = slice(s.offset, s.offset + s.length)
            keys, values = k[new], v[new]
            if s.start:
                keys = torch.cat([store[0].index_select(0, s.slots), keys])
                values = torch.cat([store[1].index_select(0, s.slots), values])
            causal = s.start == 0 and (window is None or s.length <= window)
            mask = None if causal else _causal_mask(s.start, s.length, window, q)
            out = F.scaled_dot_product_attention(
                q[None, new].transpose(1, 2),
                keys.unsqueeze(0).transpose(1, 2),
                values.unsqueeze(0).transpose(1, 2),
                attn_mask=mask,
                is_causal=causal,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat([*outs, torch.zeros_like(q[num_tokens:])])


def _causal_mask(start: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """True where query start + i may see position j: [length, start + length]."""
    at = torch.arange(start, start + length, device=like.device).unsqueeze(-1)
    seen = torch.arange(start + length, device=like.device)
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


@dataclass
class TorchCandidates:
    """One position for every row: attend to the prefix, then to oneself.

    With one candidate a row (`single`) it is written to the store at once, where a commit of that
    token finds it; with several, keys and values wait in `stash` for the choice.
    """

    data: Tensor
    """[L, 2, P, S, Hkv, D]"""
    page_table: Tensor
    """[R, C] pages of each row; room for the next position included when `single`."""
    lengths: Tensor
    """[R] prefix length of each row."""
    flat: Tensor
    """[N] index of each packed candidate in the padded [R * K] layout."""
    width: int
    """K"""
    next_slots: Tensor | None
    """[R] slot of each row's next position; given means `single`."""
    stash: list[Tensor] = field(default_factory=list)
    """Per layer [2, N, Hkv, D], where not `single`."""
    _bias: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        num_tokens, num_heads, head_size = q.shape
        num_kv = k.shape[1]
        shape = (-1, num_kv, num_heads // num_kv, head_size)
        store = self.data[layer]
        if self.next_slots is not None:
            store[0].flatten(0, 1).index_copy_(0, self.next_slots, k)
            store[1].flatten(0, 1).index_copy_(0, self.next_slots, v)
        else:
            self.stash.append(torch.stack([k, v]))
        keys, values = self._gather(store[0]), self._gather(store[1])
        if window not in self._bias:
            self._bias[window] = self._build_bias(window, keys)
        rows = q.reshape(shape)
        out, log_sum = attend_with_lse(self._pad(rows), keys, values, self._bias[window], scale)
        out = self._unpad(out)
        if self.next_slots is None:
            own = (rows * k.unsqueeze(2)).sum(-1, keepdim=True, dtype=torch.float32) * scale
            # softmax over {prefix, own}: weight of own = sigmoid(own score - log-sum-exp of prefix)
            weight = torch.sigmoid(own - self._unpad(log_sum.unsqueeze(-1)))
            out = torch.lerp(out.float(), v.unsqueeze(2).float(), weight).to(q.dtype)
        return out.reshape(num_tokens, num_heads, head_size)

    def _gather(self, store: Tensor) -> Tensor:
        """[P, S, Hkv, D] -> [R, Hkv, T, D] of the rows' pages."""
        num_rows, columns = self.page_table.shape
        pages = store.index_select(0, self.page_table.view(-1))
        return pages.view(num_rows, columns * store.shape[1], *store.shape[2:]).transpose(1, 2)

    def _pad(self, rows: Tensor) -> Tensor:
        """[N, Hkv, G, D] -> [R, Hkv, G * K, D], zeros where there is no candidate."""
        num_kv, group, head_size = rows.shape[1:]
        if self.width == 1 and rows.shape[0] == self.lengths.shape[0]:
            return rows
        padded = rows.new_zeros(self.lengths.shape[0] * self.width, num_kv, group, head_size)
        padded[self.flat] = rows
        by_row = padded.view(-1, self.width, num_kv, group, head_size).permute(0, 2, 3, 1, 4)
        return by_row.reshape(-1, num_kv, group * self.width, head_size)

    def _unpad(self, x: Tensor) -> Tensor:
        """[R, Hkv, G * K, E] -> [N, Hkv, G, E] of the packed candidates."""
        num_kv, size = x.shape[1], x.shape[-1]
        group = x.shape[2] // self.width
        if self.width == 1 and self.flat.shape[0] == x.shape[0]:
            return x
        by_row = x.reshape(-1, num_kv, group, self.width, size).permute(0, 3, 1, 2, 4)
        return by_row.reshape(-1, num_kv, group, size)[self.flat]

    def _build_bias(self, window: int | None, keys: Tensor) -> Tensor:
        """0 where a row's candidates may look, -inf elsewhere: [R, 1, 1, T]."""
        position = torch.arange(keys.shape[2], device=keys.device)
        lengths = self.lengths.unsqueeze(-1)
        visible = position < (lengths if self.next_slots is None else lengths + 1)
        if window is not None:
            visible &= position > lengths - window
        bias = torch.zeros(visible.shape, dtype=keys.dtype, device=keys.device)
        return bias.masked_fill(~visible, -torch.inf)[:, None, None]


def attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp. query [R, Hkv, Q, D], key and value [R, Hkv, T, D], bias
    [R, 1, 1, T] -> out [R, Hkv, Q, D], log-sum-exp [R, Hkv, Q] fp32.

    A row whose bias is -inf everywhere gives out 0 and log-sum-exp -inf.
    """
    if query.device.type == "cpu" and query.dtype != torch.float16:
        mask = bias.expand(-1, 1, query.shape[2], -1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return out, log_sum.float()
    scores = (query @ key.transpose(-1, -2)).float() * scale + bias.float()
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.unsqueeze(-1)).exp().nan_to_num(0.0).to(value.dtype)
    return weights @ value, log_sum
