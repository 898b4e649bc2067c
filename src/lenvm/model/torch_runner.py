"""TorchRunner: the forwards of a RaggedDecoder in plain torch, for the CPU and as the reference.

`Runner` is the seam to the GPU's. A runner knows tensors and pages; what may be asked for is the
decoder's to check.

Shape legend: R requests of a call, K candidates each, N packed tokens, H hidden size, E outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm.model import attention
from lenvm.model.attention import (
    AttentionPlan,
    RowGroup,
    Segment,
    TorchCandidates,
    TorchExtend,
    Workspace,
    split_rows,
)
from lenvm.model.backbone import run_backbone
from lenvm.model.kv_pages import Array, KVPages, build_zeros
from lenvm.model.packed_layers import pack_layers
from lenvm.model.packed_linear import pack_head

Head = Callable[[Tensor], Tensor]
"""hidden [N, H] -> outputs [N, E]."""
Forward = Callable[[Tensor, Tensor, AttentionPlan], Tensor]
"""(tokens [N], positions [N], plan) -> final hidden states [N, H]."""


class Runner(Protocol):
    """Runs packed tokens of open requests with room reserved. The caller advances lengths."""

    def extend(self, requests: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
        """Append each request's tokens: output after each last one, [R, E]."""

    def peek(
        self, request_ids: Sequence[str], candidates_RK: Tensor, num_candidates: int | None
    ) -> Tensor:
        """Output of every candidate, 0 where the id is -1: [R, K, E]. At most `num_candidates` ids
        are not -1, where that is known."""

    def keep(self, request_ids: Sequence[str], rows: Sequence[int], token_ids: Tensor) -> None:
        """Write keys and values of peeked tokens, one for each of `rows` of the last peek, to the
        next position of the requests in those rows."""

    def warm_up(self, num_requests: int, num_candidates: int) -> None:
        """Prepare the step of that shape."""

    def find_defect(self) -> str | None:
        """What was found wrong, too late to refuse it, in ids that were on the device; once."""


class TorchRunner:
    """Pages are gathered for every step: simple, and little beside the matrix products of a CPU."""

    def __init__(
        self, backbone: Any, head: Head | None, cache: KVPages, *, max_candidates: int
    ) -> None:
        self.head, self.cache = None if head is None else pack_head(head), cache
        self.device = cache.data.device
        packed = pack_layers(backbone)
        self.is_packed = packed is not None
        self._forward: Forward = packed or (lambda *given: run_backbone(backbone, *given))
        num_layers, _, _, _, *sizes = cache.data.shape
        most = cache.max_requests * max_candidates
        self._stash = build_zeros((num_layers, 2, most, *sizes), cache.data.dtype, self.device)
        self._work = Workspace()
        self._plan: TorchCandidates | None = None
        self._candidates: list[list[int]] = []

    def extend(self, requests: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        write_slots: list[int] = []
        segments = []
        for request_id, token_ids in requests:
            start = self.cache.length(request_id)
            end = start + len(token_ids)
            slots = torch.tensor(self.cache.slots(request_id, 0, start), dtype=torch.long)
            segments.append(Segment(len(tokens), start, len(token_ids), slots.to(self.device)))
            tokens += token_ids
            positions += range(start, end)
            write_slots += self.cache.slots(request_id, start, end)
        padding = [0] * (num_packed(len(tokens)) - len(tokens))
        tokens, positions = tokens + padding, positions + padding
        plan = TorchExtend(self.cache.data, self._tensor(write_slots), segments)
        hidden = self._forward(self._tensor(tokens), self._tensor(positions), plan)
        last = hidden[[s.offset + s.length - 1 for s in segments]]
        return last if self.head is None else self.head(last)

    def peek(
        self, request_ids: Sequence[str], candidates_RK: Tensor, num_candidates: int | None
    ) -> Tensor:
        candidates = candidates_RK.to(self.device)
        num_rows, width = candidates.shape
        given = candidates.view(-1) >= 0
        flat = _with_padding(given).nonzero().squeeze(-1)
        single = width == 1 and bool(given.all())
        rows = self.cache.rows(request_ids)
        lengths = self.cache.lengths(rows)
        plan = TorchCandidates(
            data=self.cache.data,
            flat=flat,
            width=width,
            next_slots=self._tensor(self.cache.next_slots(rows)) if single else None,
            stash=self._stash,
            groups=self._group(rows, lengths, flat, width, single),
        )
        positions = self._tensor(lengths).repeat_interleave(width)[flat]
        out = self._forward(candidates.view(-1)[flat].clamp(min=0), positions, plan)
        if self.head is not None:
            out = self.head(out)
        self._plan, self._candidates = plan, candidates.tolist()
        padded = out.new_zeros(candidates.numel(), out.shape[-1])
        padded[flat] = out.masked_fill_(~given[flat].unsqueeze(-1), 0)
        return padded.view(num_rows, width, -1)

    def _group(
        self, rows: Array, lengths: Array, flat: Tensor, width: int, single: bool
    ) -> list[RowGroup]:
        """The rows of a peek, those of about the same length together."""
        size = self.cache.page_size
        room = 0 if single else -(-width // size)
        pages = -(-(lengths + single) // size)
        at, columns = flat // width, flat % width
        groups = []
        for number, chosen in enumerate(split_rows(tuple(pages.tolist()), attention.GROUP_PAGES)):
            mine = list(chosen)
            place = torch.full((len(rows),), -1, device=self.device)
            place[mine] = torch.arange(len(mine), device=self.device)
            tokens = (place[at] >= 0).nonzero().squeeze(-1)
            table = self.cache.gather_table(rows[mine], int(lengths[mine].max()) + single)
            groups.append(
                RowGroup(
                    tokens=tokens,
                    page_table=F.pad(table, (0, room)).to(self.device),  # page 0 is written over
                    lengths=self._tensor(lengths[mine]),
                    flat=place[at[tokens]] * width + columns[tokens],
                    width=width,
                    is_single=single,
                    work=self._work,
                    name=str(number),
                )
            )
        return groups

    def keep(self, request_ids: Sequence[str], rows: Sequence[int], token_ids: Tensor) -> None:
        plan = self._plan
        assert plan is not None
        if plan.next_slots is not None:
            return
        columns = [
            self._candidates[row].index(token)
            for row, token in zip(rows, token_ids.tolist(), strict=True)
        ]
        at = self._tensor([r * plan.width + c for r, c in zip(rows, columns, strict=True)])
        packed = torch.searchsorted(plan.flat, at)
        slots = self._tensor(self.cache.next_slots(self.cache.rows(request_ids)))
        store = self.cache.data.flatten(2, 3)  # [L, 2, P * S, Hkv, D]
        store.index_copy_(2, slots, self._stash.index_select(2, packed))

    def warm_up(self, num_requests: int, num_candidates: int) -> None:
        return

    def find_defect(self) -> str | None:
        return None

    def _tensor(self, values: Sequence[int] | Array) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def num_packed(num_tokens: int) -> int:
    """Tokens that so many are padded to.

    oneDNN compiles its matrix products for every number of rows, and keeps them (1 to 2 MB of a
    small model's): without padding a server's memory would grow for as long as new numbers come."""
    step = 1 if num_tokens < 8 else 8 if num_tokens <= 128 else 64
    return -(-num_tokens // step) * step


def _with_padding(given: Tensor) -> Tensor:
    """The given cells, and as many of the first others as `num_packed` asks for: [R * K] bool."""
    num_given = int(given.sum())
    missing = num_packed(num_given) - num_given
    return given | ((~given).cumsum(0) <= missing) if missing else given
