"""CudaRunner: the forwards of a RaggedDecoder on the GPU, from CUDA graphs and without host syncs.

A step is: one kernel that reads rows, lengths and slots from the host's memory and packs the
candidates, one graph, one kernel that gathers. Whatever changes between steps is read from device
memory, so a graph serves every batch of its bucket (rows, packed candidates, candidates a row);
graphs are captured when a bucket is first met, or by `warm_up`. Where nobody counted the
candidates, a bucket has room for all slots; once steps gone by say that few of them are real,
kernels are chosen that end where the packed candidates do (`TrimHint`).

Shape legend: R requests of a call, K candidates each, N packed tokens, H hidden size, E outputs.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lenvm.model import kernels
from lenvm.model.attention_kernels import CAUSAL_BLOCK, count_size
from lenvm.model.backbone import run_backbone
from lenvm.model.candidate_kernels import keep_candidates, pack_candidates
from lenvm.model.cuda_plans import CudaCandidates, CudaExtend
from lenvm.model.device import upload
from lenvm.model.exchange import Exchange
from lenvm.model.fused_layers import FusedLayers, fuse_layers
from lenvm.model.head_kernels import FusedHead
from lenvm.model.hopper.attention import can_attend, num_multiprocessors, plan_units
from lenvm.model.kernel_choices import PLAIN, Choices, TrimHint
from lenvm.model.kv_pages import KVPages
from lenvm.model.products import Rows
from lenvm.model.torch_runner import Head


@dataclass(frozen=True)
class Bucket:
    """Static shape of a step: what a graph is captured for."""

    num_rows: int
    num_tokens: int
    width: int
    single: bool
    """One candidate a row: its key and value go to the store at once."""
    trims: bool
    """Kernels end where the packed candidates do, if such are known for the bucket."""


@dataclass(eq=False)
class _Step:
    out: Tensor
    """As a `FusedHead` builds it, else [N + 1, E], whose last row is 0 and stands for padding."""
    run: Callable[[], None]


class CudaRunner:
    """Runner over Triton kernels. `graphs` False runs them one by one."""

    def __init__(
        self, backbone: Any, head: Head | None, cache: KVPages, *, max_candidates: int, graphs: bool
    ) -> None:
        self.head, self.cache = head, cache
        self._read: Callable[[Tensor, Tensor], Tensor] = (
            head.read if isinstance(head, FusedHead) else lambda out, at: out[at]
        )
        self.device = cache.data.device
        self.graphs = graphs and self.device.type == "cuda"
        config = backbone.config.get_text_config()
        self._group = int(config.num_attention_heads) // cache.data.shape[4]
        self.vocab_size = int(backbone.get_input_embeddings().num_embeddings)
        self._forward: Callable[[Tensor, Tensor, Any], Tensor]
        fused = fuse_layers(backbone)
        self.is_fused = fused is not None
        self.choose: Callable[[int, bool], Choices] = fused.choose if fused else lambda *_: PLAIN
        """Kernels for a bucket of so many packed tokens, trimmed or not."""
        self.hint = TrimHint()
        self._forward = fused or (lambda *args: run_backbone(backbone, *args))
        most = cache.max_requests * max_candidates
        num_layers, _, _, _, num_kv, head_size = cache.data.shape
        self._tokens, self._positions, self._slots, self._packed = torch.zeros(
            4, most, dtype=torch.long, device=self.device
        )
        self._places = torch.arange(most, device=self.device)
        self._meta = torch.zeros(  # table rows, lengths, next slots
            3, cache.max_requests, dtype=torch.int32, device=self.device
        )
        self._order = torch.arange(cache.max_requests, dtype=torch.int32, device=self.device)
        self._first = self._meta.new_zeros(cache.max_requests + 1)
        me = weakref.ref(self)  # a runner that is dropped frees its memory at once
        self._exchange = Exchange(
            cache.max_requests, self.device, lambda share: _alive(me).hint.note(share)
        )
        shape = (num_layers, 2, most if max_candidates > 1 else 1, num_kv, head_size)
        self._stash = torch.zeros(shape, dtype=cache.data.dtype, device=self.device)
        most_queries = kernels.next_power_of_2(max_candidates) * self._group
        counters = count_size(cache.max_requests, num_kv, most_queries, 16)
        self._count = self._meta.new_zeros(counters)
        self._steps: dict[Bucket, _Step] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self.graphs else None
        self._last: Bucket | None = None
        self._num_units = _count_units(self.device)

    # -- the runner's calls -----------------------------------------------------------------------

    def extend(self, requests: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        blocks: list[tuple[int, int, int, int]] = []
        last = []
        for request_id, token_ids in requests:
            start, row = self.cache.length(request_id), self.cache.row(request_id)
            count = len(token_ids)
            for i in range(0, count, CAUSAL_BLOCK):
                blocks.append((row, len(tokens) + i, start + i, min(CAUSAL_BLOCK, count - i)))
            tokens += token_ids
            positions += range(start, start + count)
            slots += self.cache.slots(request_id, start, start + count)
            last.append(len(tokens) - 1)
        numbers = self._upload([tokens, positions, slots], torch.long)
        plan = CudaExtend(
            self.cache.data, numbers[2], self.cache.table(), self._upload(blocks, torch.int32)
        )
        hidden = self._forward(numbers[0], numbers[1], plan)
        ends = hidden.index_select(0, self._upload(last, torch.long))
        return ends if self.head is None else self.head(ends)

    def peek(
        self, request_ids: Sequence[str], candidates_RK: Tensor, num_candidates: int | None
    ) -> Tensor:
        num_rows, width = candidates_RK.shape
        count = num_candidates or num_rows * width
        trims = num_candidates is None and self.hint.trims
        bucket = self._bucket(num_rows, min(count, num_rows * width), width, trims)
        rows = self.cache.rows(request_ids)
        numbers = rows, self.cache.lengths(rows), self.cache.next_slots(rows)
        given, told, number = self._exchange.begin(numbers)
        self.cache.table()
        candidates = candidates_RK
        if candidates_RK.device.type != self.device.type:
            candidates = self._upload(candidates_RK, torch.long)
        packed_RK = self._packed[: num_rows * width].view(num_rows, width)
        pack_candidates(
            candidates,
            given,
            self._meta,
            self._tokens[: bucket.num_tokens],
            self._positions,
            self._slots,
            self._first,
            packed_RK,
            told,
            number,
            vocab_size=self.vocab_size,
        )
        self._exchange.launched(request_ids, num_rows * width if num_candidates is None else 0)
        step = self._step(bucket)
        step.run()
        self._last = bucket
        return self._read(step.out, packed_RK)

    def keep(self, request_ids: Sequence[str], rows: Sequence[int], token_ids: Tensor) -> None:
        bucket = self._last
        assert bucket is not None
        if bucket.single:
            return
        rows_R, slots_R = self._order[: len(rows)], self._meta[2, : len(rows)]
        if list(rows) != list(range(len(rows))):
            rows_R = self._upload(rows, torch.int32)
            slots_R = self._meta[2].index_select(0, rows_R)
        if token_ids.device.type != self.device.type:
            token_ids = self._upload(token_ids, torch.long)
        keep_candidates(
            self._stash,
            self.cache.data,
            token_ids.contiguous(),
            rows_R,
            slots_R,
            self._tokens,
            self._first,
            self._exchange.told,
            self._exchange.number,
            max_candidates=bucket.width,
        )

    def find_defect(self) -> str | None:
        return self._exchange.find_defect()

    # -- buckets and graphs -----------------------------------------------------------------------

    def warm_up(self, num_requests: int, num_candidates: int) -> None:
        """Capture the graphs of that many requests with that many candidates each."""
        self.cache.table()
        num_slots = num_requests * num_candidates
        for trims in (False, True):
            self._step(self._bucket(num_requests, num_slots, num_candidates, trims))

    @property
    def num_graphs(self) -> int:
        return len(set(self._steps.values()))

    def _bucket(self, num_rows: int, num_tokens: int, width: int, trims: bool) -> Bucket:
        most = self._tokens.shape[0]
        return Bucket(
            num_rows=min(kernels.next_power_of_2(num_rows), self.cache.max_requests),
            num_tokens=min(round_up(num_tokens), most),
            width=kernels.next_power_of_2(width),
            single=width == 1,
            trims=trims,
        )

    def _step(self, bucket: Bucket) -> _Step:
        if bucket not in self._steps:
            self._steps[bucket] = self._build_step(bucket)
        return self._steps[bucket]

    def _build_step(self, bucket: Bucket) -> _Step:
        choices = self.choose(bucket.num_tokens, bucket.trims)
        if bucket.trims and not choices.trims:
            return self._step(replace(bucket, trims=False))
        outs: list[Tensor] = []
        me = weakref.ref(self)

        def run() -> None:
            outs[:] = [_alive(me)._run_packed(bucket, choices, *outs)]

        run()  # compiles the kernels; what it keeps is what the step would keep
        if self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
            return _Step(outs[0], graph.replay)
        return _Step(outs[0], run)

    def _run_packed(self, bucket: Bucket, choices: Choices, out: Tensor | None = None) -> Tensor:
        """Outputs of the packed candidates in the static buffers, as `_read` takes them: in `out`,
        or in a tensor of its own."""
        plan, head, forward = self._build_plan(bucket, choices), self.head, self._forward
        given = self._tokens[: bucket.num_tokens], self._positions[: bucket.num_tokens], plan
        if isinstance(head, FusedHead):
            if isinstance(forward, FusedLayers):
                rows, eps = forward.run(*given)[0], forward.eps
            else:
                rows, eps = Rows(forward(*given)), 0.0
            if out is None:
                out = head.build(bucket.num_tokens)
            head.write(rows, eps, out, pdl=choices.pdl, total=plan.total)
            return out
        hidden = forward(*given)
        packed = hidden if head is None else head(hidden)
        if out is None:
            out = packed.new_zeros(bucket.num_tokens + 1, packed.shape[1])
        out[:-1].copy_(packed)
        return out

    def _build_plan(self, bucket: Bucket, choices: Choices) -> CudaCandidates:
        count, cache = bucket.num_tokens, self.cache
        num_kv, head_size = cache.data.shape[4:]
        num_splits = choices.attention.count_splits(
            bucket.num_rows * num_kv, self._num_units, cache.max_columns
        )
        rows = self._meta[0, : bucket.num_rows]
        first = self._first[: bucket.num_rows + 1]
        units = None
        num_heads = self._group * num_kv
        if choices.attention.hopper and can_attend(num_heads, cache.data[0, 0]):
            units = plan_units(
                cache.table(),
                rows,
                self._meta[1],
                first,
                num_tokens=count,
                num_heads=num_heads,
                num_kv=num_kv,
                head_size=head_size,
                max_candidates=bucket.width,
                num_splits=num_splits,
            )
        return CudaCandidates(
            data=cache.data,
            table=cache.table(),
            rows=rows,
            lengths=self._meta[1],
            first=first,
            index=(self._slots if bucket.single else self._places)[:count],
            stash=None if bucket.single else self._stash,
            max_candidates=bucket.width,
            num_splits=num_splits,
            count=self._count,
            units=units,
            choices=choices,
            total=self._first[-1:] if choices.trims else None,
        )

    # -- host and device --------------------------------------------------------------------------

    def _upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        numbers: Tensor = upload(values, dtype, self.device)
        return numbers


def _alive(runner: "weakref.ref[CudaRunner]") -> CudaRunner:
    found = runner()
    assert found is not None
    return found


def round_up(n: int) -> int:
    """The least of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ... that is at least n."""
    power = kernels.next_power_of_2(n)
    return power * 3 // 4 if n <= power * 3 // 4 and power >= 32 else power


def _count_units(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    return num_multiprocessors(device) if device.type == "cuda" else 4
