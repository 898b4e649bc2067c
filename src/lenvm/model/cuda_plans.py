"""Attention plans on the GPU: which kernel reads what, for a prefill and for a candidate step.

Shape legend: L layers, P pages, S tokens of a page, N packed tokens, R rows (requests), Hq query
heads, Hkv key heads, D head size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lenvm.model.attention_kernels import candidate_attention, causal_attention
from lenvm.model.hopper import attention as hopper
from lenvm.model.kernel_choices import PLAIN, Choices


class CudaPlan(Protocol):
    """Keys and values are stored first, then attended to."""

    choices: Choices
    """Kernels of the layers around the attention."""
    total: Tensor | None
    """[1] int32: packed tokens from there on are padding. None: compute all."""

    @property
    def starts_beside(self) -> bool:
        """Whether the next kernel may run beside the last one, which is the plan's own."""

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the keys and values of the packed tokens go: k, v [*, Hkv, D], index [N] int64."""

    def attend_stored(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        """q [N, Hq, D] contiguous -> [N, Hq, D], once keys and values are at their destination."""


class _StoreFirst:
    """`AttentionPlan` for the model's own modelling code, over a `CudaPlan`."""

    def attend(
        self: CudaPlan,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        k_to, v_to, index = self.destination(layer)
        k_to.index_copy_(0, index, k)
        v_to.index_copy_(0, index, v)
        return self.attend_stored(layer, q.contiguous(), scale, window)


@dataclass
class CudaExtend(_StoreFirst):
    """Prefill or append."""

    data: Tensor
    """[L, 2, P, S, Hkv, D]"""
    write_slots: Tensor
    """[N] int64"""
    table: Tensor
    blocks: Tensor
    """[B, 4] int32, as `attention_kernels.causal_attention` reads them."""
    choices: Choices = PLAIN
    total: Tensor | None = None
    starts_beside = False

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.data[layer].flatten(1, 2)
        return k, v, self.write_slots

    def attend_stored(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        out = torch.empty_like(q)
        k, v = self.data[layer]
        causal_attention(q, k, v, self.table, self.blocks, out, scale=scale, window=window)
        return out


@dataclass
class CudaCandidates(_StoreFirst):
    """One position for every row; reads everything that changes between steps from the device."""

    data: Tensor
    """[L, 2, P, S, Hkv, D]"""
    table: Tensor
    rows: Tensor
    """[R] row of `table` of each row."""
    lengths: Tensor
    """[R] prefix lengths."""
    first: Tensor
    """[R + 1] where each row's packed candidates begin."""
    index: Tensor
    """[N] where own keys and values go: slots of the store, or 0, 1, 2 ... of the stash."""
    stash: Tensor | None
    """[L, 2, N, Hkv, D]; None where there is one candidate a row, which goes to the store."""
    max_candidates: int
    num_splits: int
    count: Tensor
    """int32 of `attention_kernels.count_size`, 0 between kernels."""
    units: hopper.Units | None = None
    """For the kernel of `hopper/`; None: Triton's."""
    choices: Choices = PLAIN
    total: Tensor | None = None
    _scratch: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def starts_beside(self) -> bool:
        return self.units is not None and self.choices.pdl

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.data[layer].flatten(1, 2) if self.stash is None else self.stash[layer]
        return k, v, self.index

    def attend_stored(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        own_k, own_v, index = self.destination(layer)
        k, v = self.data[layer]
        out = torch.empty_like(q)
        rows = self.table, self.rows, self.lengths, self.first
        if self.units is not None:
            hopper.candidate_attention(
                q,
                own_k,
                own_v,
                index,
                k,
                v,
                self.units,
                out,
                scale=scale,
                window=window,
                own_is_token=self.stash is not None,
                pdl=self.choices.pdl,
            )
            return out
        if self._scratch is None:
            shape = (self.num_splits if self.num_splits > 1 else 0, *q.shape)
            part = torch.empty(shape, dtype=torch.float32, device=q.device)
            lse = torch.empty(shape[:-1], dtype=torch.float32, device=q.device)
            self._scratch = part, lse, self.count
        candidate_attention(
            q,
            own_k,
            own_v,
            index,
            k,
            v,
            *rows,
            out,
            self._scratch,
            scale=scale,
            window=window,
            max_candidates=self.max_candidates,
            num_splits=self.num_splits,
            max_block=self.choices.attention.block,
            num_stages=self.choices.attention.stages,
            merges=self.choices.attention.merges,
            own_is_token=self.stash is not None,
            pdl=self.choices.pdl,
        )
        return out
