"""Attention of a RaggedDecoder: packed queries against per-request prefixes, and candidates merged.

Registered with transformers under `lenvm_ragged`; the model's own modelling code calls it with
rotated queries and keys of the packed tokens, and the `plan` of the current forward does the rest.
A candidate attends to its request's prefix and to itself, never to its siblings. The plans here are
plain torch, for any device; `cuda_plans.py` has those of the GPU.

Shape legend: L layers, P pages, S tokens of a page, N packed tokens, R rows (requests), K
candidates a row, Hq query heads, Hkv key heads, G = Hq / Hkv, T prefix tokens, D head size.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "lenvm_ragged"
GROUP_PAGES = 8
"""Pages that a group of rows must save over a larger one: as long as its own calls take."""
MANY_QUERIES = 16
"""Queries of a row and key head from which on attention runs as separate products on a CPU."""


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


@functools.lru_cache(maxsize=256)
def split_rows(num_pages: tuple[int, ...], cost: int) -> tuple[tuple[int, ...], ...]:
    """Rows in groups, each read as far as its longest: the split with the least pages, where each
    group counts as `cost` more. num_pages: of each row. Indices in a group are ascending."""
    order = sorted(range(len(num_pages)), key=lambda row: num_pages[row])
    best = [0] + [0] * len(order)  # of the first i rows
    begins = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        most = max(num_pages[order[end - 1]], 1)
        totals = [best[i] + (end - i) * most + cost for i in range(end)]
        best[end] = min(totals)
        begins[end] = totals.index(best[end])
    groups, end = [], len(order)
    while end:
        groups.append(tuple(sorted(order[begins[end] : end])))
        end = begins[end]
    return tuple(groups)


class Workspace:
    """Buffers for what a layer makes on its way; one doubles when a longer prefix needs more."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised, good until that name is taken again."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = like.new_empty(2 * size, dtype=dtype)
        return self.buffers[name][:size].view(shape)


@dataclass
class TorchCandidates:
    """One position for every row: attend to the prefix and to oneself.

    With one candidate a row (`single`) its key and value are written to the store at once, where a
    commit of that token finds it. With several they wait in `stash` for the choice. Rows of about
    the same length attend together.
    """

    data: Tensor
    """[L, 2, P, S, Hkv, D]"""
    flat: Tensor
    """[N] index of each packed candidate in the padded [R * K] layout."""
    width: int
    """K"""
    next_slots: Tensor | None
    """[R] slot of each row's next position; given means `single`."""
    stash: Tensor
    """[L, 2, >= N, Hkv, D], where not `single`."""
    groups: Sequence["RowGroup"]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        store, own = self.data[layer], None
        if self.next_slots is not None:
            slots = store.flatten(1, 2)
            slots[0].index_copy_(0, self.next_slots, k)
            slots[1].index_copy_(0, self.next_slots, v)
        else:
            own = self.stash[layer, :, : len(q)]
            own[0].copy_(k)
            own[1].copy_(v)
        if len(self.groups) == 1:
            return self.groups[0].attend(store, q, own, scale, window)
        out = torch.empty_like(q)
        for group in self.groups:
            mine = own if own is None else own.index_select(1, group.tokens)
            part = group.attend(store, q.index_select(0, group.tokens), mine, scale, window)
            out.index_copy_(0, group.tokens, part)
        return out


@dataclass
class RowGroup:
    """Rows whose prefixes are read together, each as far as the longest one.

    Several candidates of a row stand behind its prefix under a mask that shows each its own: one
    softmax over all, in one call. R, N and `flat` are the group's own here.
    """

    tokens: Tensor
    """[N] places of the group's candidates among all packed ones, ascending."""
    page_table: Tensor
    """[R, C] pages of each row: of its prefix, with room for the next position when `is_single`;
    else followed by those of page 0 that make room for K candidates."""
    lengths: Tensor
    """[R] prefix length of each row."""
    flat: Tensor
    """[N] index of each candidate in the padded [R * K] layout."""
    width: int
    """K"""
    is_single: bool
    work: "Workspace"
    name: str = ""
    """Of its buffers that outlive a layer."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _places: Tensor | None = None
    _bias: Tensor | None = None
    _bias_of: Tensor | None = None

    def attend(
        self, store: Tensor, q: Tensor, own: Tensor | None, scale: float, window: int | None
    ) -> Tensor:
        """store [2, P, S, Hkv, D] of the layer, q [N, Hq, D], own [2, N, Hkv, D] -> [N, Hq, D]."""
        num_tokens, num_heads, head_size = q.shape
        num_kv = store.shape[3]
        found = self._gather(store)
        if own is not None:
            found.flatten(1, 2).index_copy_(1, self._own_places(found.shape[2]), own)
        if window not in self._masks:
            self._masks[window] = self._build_mask(window, num_heads // num_kv, found.shape[2], q)
        keys, values = found.transpose(2, 3)
        query = self._pad(q.reshape(num_tokens, num_kv, -1, head_size))
        mask = self._masks[window]
        if self._by_products(query):
            out = self._attend_by_products(query, keys, values, mask, scale)
        else:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        return self._unpad(out).reshape(num_tokens, num_heads, head_size)

    def _by_products(self, query: Tensor) -> bool:
        """Where torch's attention was measured to be slower than its parts one by one."""
        many = query.shape[0] > 1 and query.shape[2] >= MANY_QUERIES
        return many and query.dtype == torch.bfloat16 and query.device.type == "cpu"

    def _attend_by_products(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """What `scaled_dot_product_attention` computes, rounded where it rounds: scores and softmax
        in fp32, weights in the values' type."""
        num_rows, num_kv, num_queries, head_size = query.shape
        num_keys, take, dtype = keys.shape[2], self.work.take, query.dtype

        def copy_of(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
            return take(name, tuple(x.shape), x, dtype).copy_(x).flatten(0, 1)

        q, k = copy_of("q", query, torch.float32), copy_of("k", keys, torch.float32)
        if self._bias is None or self._bias_of is not mask:
            bias = mask.expand(num_rows, num_kv, num_queries, num_keys)
            self._bias_of, self._bias = mask, copy_of(f"bias{self.name}", bias, torch.float32)
        shape = (num_rows * num_kv, num_queries, num_keys)
        scores = take("scores", shape, q, torch.float32)
        torch.baddbmm(self._bias, q, k.transpose(1, 2), alpha=scale, out=scores)
        weights = copy_of("weights", torch.softmax(scores, -1, out=scores)[None], dtype)
        out = torch.bmm(weights, copy_of("v", values, dtype))
        return out.view(num_rows, num_kv, num_queries, head_size)

    def _gather(self, store: Tensor) -> Tensor:
        """[2, P, S, Hkv, D] -> [2, R, T, Hkv, D] of the rows' pages."""
        num_rows, columns = self.page_table.shape
        _, _, page_size, *rest = store.shape
        shape = (2, num_rows * columns, page_size, *rest)
        pages = self.work.take("pages", shape, store, store.dtype)
        torch.index_select(store, 1, self.page_table.view(-1), out=pages)
        return pages.view(2, num_rows, columns * page_size, *rest)

    def _own_places(self, num_keys: int) -> Tensor:
        """[N] where in [R * T] the candidates' own keys go: the last K of each row."""
        if self._places is None:
            rows, columns = self.flat // self.width, self.flat % self.width
            self._places = rows * num_keys + columns + (num_keys - self.width)
        return self._places

    def _pad(self, rows: Tensor) -> Tensor:
        """[N, Hkv, G, D] -> [R, Hkv, G * K, D], zeros where there is no candidate."""
        num_kv, group, head_size = rows.shape[1:]
        num_rows = self.lengths.shape[0]
        if self.width == 1 and rows.shape[0] == num_rows:
            return rows
        if rows.shape[0] < num_rows * self.width:
            padded = rows.new_zeros(num_rows * self.width, num_kv, group, head_size)
            rows = padded.index_copy_(0, self.flat, rows)
        by_row = rows.view(num_rows, self.width, num_kv, group, head_size).permute(0, 2, 3, 1, 4)
        return by_row.reshape(num_rows, num_kv, group * self.width, head_size)

    def _unpad(self, x: Tensor) -> Tensor:
        """[R, Hkv, G * K, D] -> [N, Hkv, G, D] of the packed candidates."""
        num_rows, num_kv, _, size = x.shape
        if self.width == 1 and self.flat.shape[0] == num_rows:
            return x
        by_row = x.view(num_rows, num_kv, -1, self.width, size).permute(0, 3, 1, 2, 4)
        padded = by_row.reshape(num_rows * self.width, num_kv, -1, size)
        if self.flat.shape[0] == len(padded):
            return padded
        return padded.index_select(0, self.flat)

    def _build_mask(self, window: int | None, group: int, num_keys: int, like: Tensor) -> Tensor:
        """0 where a candidate may look, else -inf: [R, 1, G * K, T], or [R, 1, 1, T] for one."""
        position = torch.arange(num_keys, device=like.device)
        lengths = self.lengths.unsqueeze(-1)
        visible = position < lengths + self.is_single
        if window is not None:
            visible &= position > lengths - window
        visible = visible.unsqueeze(1)  # [R, 1, T]
        if not self.is_single:
            candidate = torch.arange(self.width, device=like.device).unsqueeze(-1)
            visible = visible | (position == candidate + (num_keys - self.width))
        bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
        bias.masked_fill_(~visible, -torch.inf)
        if not self.is_single:
            bias = bias.repeat(1, group, 1)
        return bias.unsqueeze(1)
