"""Which sequences go into which batch, and a batch's tensors.

`BatchPlan` is a pure function of the sequences, a seed and the number of processes: the sequences
of an optimizer step never depend on the number of processes, only how they are shared out does (nor
do its micro batches, where that number divides theirs). A
`PackedBatch` holds whole sequences side by side, positions restarting, without a padding token.
With shared prompts, a prompt stands once and its completions after it, each attending to the prompt
and itself.

Shape legend: N tokens of a batch, C completions, K keys (each completion's prompt and itself),
M states s_0 .. s_L of all completions (L + 1 each).
"""

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lenvm.data.dataset import Array, Sequences

MicroBatches = list[list[Array]]
"""[rank][micro batch] -> sequence numbers; every rank has as many, some may be empty."""
AddImages = Callable[[Sequence[Sequence[int]], Sequence[Sequence[str]]], dict[str, Any]]
"""(token ids, image files) of a batch's sequences -> the fields that a VLM's batch has instead."""


class Packing(NamedTuple):
    """What attention needs to know: segments of queries and of the keys that each attends to.

    Segment j has queries `cu_queries[j] : cu_queries[j+1]` and keys `cu_keys[j] : cu_keys[j+1]` of
    `keys[key_index]` (None: of `keys`); causal, the last query sees the last key.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    key_index: Tensor | None
    max_queries: int
    max_keys: int


@dataclass
class PackedBatch:
    """Tensors of one micro batch (B = 1; a padded one has B rows)."""

    input_ids: Tensor
    """[B, T]; empty where `inputs_embeds` stands for it."""
    position_ids: Tensor
    """[B, T], or [3, B, T] where positions have three axes (M-RoPE)."""
    packing: Packing | None
    """None: padded rows, each a sequence."""
    state_index: Tensor
    """[M] where each state's hidden state stands among the B * T."""
    state_offsets: Tensor
    """[C + 1] borders of the completions' states."""
    lengths: Tensor
    """[C] of the completions."""
    complete: Tensor
    """[C] bool; False: the length is a lower bound."""
    is_endless: Tensor
    """[C] bool: counts as never ending; not complete."""
    domain: Tensor
    """[C]"""
    groups: Tensor
    """[C] the prompt, as a number."""
    sequences: Tensor
    """[C] sequence numbers."""
    num_tokens: int
    """Tokens of the sequences, each completion's prompt counted once for it."""
    longest: int
    """The longest completion (known here: asking the device would wait for it)."""
    any_cut: bool
    """Whether a completion is not complete."""
    counts: bool = True
    """False: a stand-in that keeps the processes in step and adds nothing."""
    inputs_embeds: Tensor | None = None
    """[B, T, H] in place of input_ids."""
    image_inputs: dict[str, Tensor] | None = None
    """What the images are read from (`ImageReader.arrange`); None: text alone."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """The batch with `function` applied to every tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, Packing):
                return Packing(*(apply(v) for v in value))
            if isinstance(value, dict):
                return {k: apply(v) for k, v in value.items()}
            return value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str) -> "PackedBatch":
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        return self.map(lambda t: t.contiguous().pin_memory())


@dataclass(frozen=True)
class BatchPlan:
    """What every optimizer step of every epoch reads."""

    sequences: Sequences
    batch_tokens: int
    """Tokens of one micro batch on one process, at most."""
    step_sequences: int | None = None
    """Sequences of an optimizer step over all processes; else `step_tokens` decides."""
    step_tokens: int | None = None
    """Tokens of an optimizer step over all processes, at most; None: `batch_tokens`."""
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    grouped: bool = False
    """Completions of a prompt stay together (the ablation; also what sharing prompts needs)."""
    share_prompts: bool = False
    weights: Array | None = None
    """[files] how often an epoch sees each (`mixing_weights`)."""

    def order(self, epoch: int) -> Array:
        """Sequence numbers in the order of an epoch."""
        rows = np.arange(len(self.sequences))
        if not self.shuffle:
            return rows
        random = np.random.default_rng([self.seed, epoch])
        if self.weights is not None:
            parts = []
            for source, weight in enumerate(self.weights):
                own = rows[self.sequences.source == source]
                extra = round((weight % 1) * len(own))
                parts += [own] * int(weight) + [random.permutation(own)[:extra]]
            rows = np.concatenate(parts)
        rows = random.permutation(rows)
        if self.grouped:
            names, which = np.unique(self.sequences.groups[rows], return_inverse=True)
            rows = rows[np.argsort(random.permutation(len(names))[which], kind="stable")]
        return rows

    @functools.cached_property
    def _cache(self) -> dict[int, tuple[Array, Array]]:
        return {}

    def _steps(self, epoch: int) -> tuple[Array, Array]:
        """(order, borders of the steps) of an epoch; the last one asked for is kept."""
        if epoch not in self._cache:
            self._cache.clear()
            order = self.order(epoch)
            self._cache[epoch] = order, self._borders(order)
        return self._cache[epoch]

    def _borders(self, order: Array) -> Array:
        if self.step_sequences is not None:
            return np.append(np.arange(0, len(order), self.step_sequences), len(order))
        ends = np.concatenate([[0], np.cumsum(self.sequences.totals[order])])
        borders, limit = [0], self.step_tokens or self.batch_tokens
        while (first := borders[-1]) < len(order):
            last = int(np.searchsorted(ends, ends[first] + limit, side="right")) - 1
            last = max(last, first + 1)
            while last - first > 1 and not self._fits(order[first:last], limit):
                last -= 1 + (last - first) // 64
            borders.append(last)
        return np.array(borders)

    def _fits(self, rows: Array, limit: int) -> bool:
        """Whether as many micro batches as `limit` tokens would fill hold these. A step filled to
        the last token needs one more: emptier ones, other ones for every number of processes."""
        count = max(1, limit // self.batch_tokens)
        return len(balance(self._units(rows)[1], 1, self.batch_tokens)[0]) <= count

    def num_steps(self, epoch: int = 0) -> int:
        return len(self._steps(epoch)[1]) - 1

    def step(self, epoch: int, number: int) -> Array:
        """Sequence numbers of one optimizer step, over all processes."""
        order, borders = self._steps(epoch)
        rows: Array = order[borders[number] : borders[number + 1]]
        return rows

    def micro_batches(self, rows: Array) -> MicroBatches:
        """Share a step out: balanced, within the token budget, the same number for every rank."""
        units, costs = self._units(rows)
        bins = balance(costs, self.world_size, self.batch_tokens)
        return [
            [np.concatenate([units[u] for u in b]) if b else rows[:0] for b in rank]
            for rank in bins
        ]

    def _units(self, rows: Array) -> tuple[list[Array], Array]:
        """What must stay together, and its tokens."""
        totals = self.sequences.totals
        if not self.share_prompts:
            return [rows[i : i + 1] for i in range(len(rows))], totals[rows]
        units: list[list[int]] = []
        costs: list[int] = []
        open_unit: dict[int, int] = {}
        for row in rows:
            group, length = int(self.sequences.groups[row]), int(self.sequences.lengths[row])
            unit = open_unit.get(group)
            if unit is not None and costs[unit] + length <= self.batch_tokens:
                units[unit].append(row)
                costs[unit] += length
            else:
                open_unit[group] = len(units)
                units.append([row])
                costs.append(int(totals[row]))
        return [np.array(u) for u in units], np.array(costs)


def balance(costs: Array, world_size: int, budget: int) -> list[list[list[int]]]:
    """[rank][micro batch] -> numbers of the items, so that the largest bin is small.

    Longest first onto the emptiest bin, with as few bins a rank as the budget allows; then bins
    are dealt to the ranks in turn, there and back. An item over the budget stands alone.
    """
    order = np.argsort(-costs, kind="stable")
    per_rank = max(1, math.ceil(int(costs.sum()) / (budget * world_size)))
    while True:
        loads = [(0, b) for b in range(per_rank * world_size)]
        bins: list[list[int]] = [[] for _ in loads]
        for item in order:
            load, b = loads[0]
            heapq.heapreplace(loads, (load + int(costs[item]), b))
            bins[b].append(int(item))
        if all(load <= budget or len(bins[b]) == 1 for load, b in loads):
            break
        per_rank += 1
    by_load = [bins[b] for _, b in sorted(loads, reverse=True)]
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    for turn in range(per_rank):
        hand = by_load[turn * world_size : (turn + 1) * world_size]
        for rank, items in enumerate(hand if turn % 2 == 0 else hand[::-1]):
            ranks[rank].append(items)
    return ranks


def pack(
    sequences: Sequences,
    rows: Sequence[int] | Array,
    *,
    share_prompts: bool = False,
    hidden: "Hidden | None" = None,
    add_images: AddImages | None = None,
) -> PackedBatch:
    """The packed batch of sequences `rows`; with `hidden`, kept hidden states stand for tokens.

    `add_images` brings a VLM's images and positions (prompts must not be shared then). An empty
    `rows` gives the stand-in batch that does not count.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if not len(rows):
        shortest = int(np.argmin(sequences.totals))
        batch = pack(sequences, [shortest], hidden=hidden, add_images=add_images)
        return replace(batch, counts=False, num_tokens=0)
    pieces = _lay_out(sequences, rows, share_prompts)
    parts = [(hidden or sequences).tokens(row)[first:end] for row, first, end in pieces.parts]
    content = torch.from_numpy(np.concatenate(parts))
    prompts, lengths = sequences.prompt_lengths[rows], sequences.lengths[rows]
    counts = lengths + 1
    inside = _aranges(counts)
    state_index = np.where(
        inside == 0,
        np.repeat(pieces.boundary, counts),
        np.repeat(pieces.first, counts) + inside - 1,
    )
    batch = PackedBatch(
        input_ids=(content if hidden is None else content[:0, 0]).long().unsqueeze(0),
        position_ids=torch.from_numpy(pieces.positions).unsqueeze(0),
        packing=pieces.packing(),
        state_index=torch.from_numpy(state_index),
        **_describe(sequences, rows),
        num_tokens=int((prompts + lengths).sum()),
        inputs_embeds=None if hidden is None else hidden.decode(content).unsqueeze(0),
    )
    if add_images is None:
        return batch
    ids = [sequences.tokens(row).tolist() for row in rows]
    return replace(batch, **add_images(ids, [sequences.images(row) for row in rows]))


def pad(sequences: Sequences, rows: Sequence[int] | Array, pad_id: int = 0) -> PackedBatch:
    """The padded batch of the same sequences, a row each: what packing is compared with."""
    rows = np.asarray(rows, dtype=np.int64)
    totals = sequences.totals[rows]
    width = int(totals.max())
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : totals[at]] = sequences.tokens(row)
    counts = sequences.lengths[rows] + 1
    first_state = np.arange(len(rows)) * width + sequences.prompt_lengths[rows] - 1
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(width).expand(len(rows), -1),
        packing=None,
        state_index=torch.from_numpy(np.repeat(first_state, counts) + _aranges(counts)),
        **_describe(sequences, rows),
        num_tokens=int(totals.sum()),
    )


class Hidden:
    """Kept hidden states of every token of a split: [tokens, H] bf16 in numpy's uint16."""

    def __init__(self, values: Array, sequences: Sequences) -> None:
        self.values = values
        self.offsets = np.concatenate([[0], np.cumsum(sequences.totals)])

    def tokens(self, i: int) -> Array:
        """[tokens of sequence i, H]."""
        rows: Array = self.values[self.offsets[i] : self.offsets[i + 1]]
        return rows

    @staticmethod
    def decode(content: Tensor) -> Tensor:
        return content.view(torch.bfloat16)


def _describe(sequences: Sequences, rows: Array) -> dict[str, Any]:
    lengths = sequences.lengths[rows]
    return {
        "longest": int(lengths.max()),
        "any_cut": not bool(sequences.complete[rows].all()),
        "state_offsets": torch.from_numpy(np.concatenate([[0], np.cumsum(lengths + 1)])),
        "lengths": torch.from_numpy(lengths),
        "complete": torch.from_numpy(sequences.complete[rows].copy()),
        "is_endless": torch.from_numpy(sequences.is_endless[rows].copy()),
        "domain": torch.from_numpy(sequences.domain[rows]),
        "groups": torch.from_numpy(sequences.groups[rows].copy()),
        "sequences": torch.from_numpy(rows),
    }


@dataclass
class _Layout:
    parts: list[tuple[int, int, int]]
    """(sequence, first token, end) in the order in which they stand in the batch."""
    positions: Array
    boundary: Array
    """[C] place of each completion's last prompt token."""
    first: Array
    """[C] place of its first own token."""
    queries: Array
    keys: Array
    """[segments] lengths."""
    key_index: Array | None

    def packing(self) -> Packing:
        cu = [
            torch.from_numpy(np.concatenate([[0], np.cumsum(x)]).astype(np.int32))
            for x in (self.queries, self.keys)
        ]
        return Packing(
            cu[0],
            cu[1],
            None if self.key_index is None else torch.from_numpy(self.key_index),
            int(self.queries.max()),
            int(self.keys.max()),
        )


def _lay_out(sequences: Sequences, rows: Array, share_prompts: bool) -> _Layout:
    prompts, lengths = sequences.prompt_lengths[rows], sequences.lengths[rows]
    if not share_prompts:
        totals = prompts + lengths
        starts = np.cumsum(totals) - totals
        return _Layout(
            parts=[(int(r), 0, int(n)) for r, n in zip(rows, totals, strict=True)],
            positions=_aranges(totals),
            boundary=starts + prompts - 1,
            first=starts + prompts,
            queries=totals,
            keys=totals,
            key_index=None,
        )
    return _lay_out_shared(sequences, rows)


def _lay_out_shared(sequences: Sequences, rows: Array) -> _Layout:
    """Prompts once: a segment for the prompt, then one for each of its completions."""
    families: dict[bytes, list[int]] = {}
    for at, row in enumerate(rows):
        prompt = sequences.tokens(row)[: sequences.prompt_lengths[row]]
        families.setdefault(np.asarray(prompt).tobytes(), []).append(at)
    parts: list[tuple[int, int, int]] = []
    positions, queries, keys, key_index = [], [], [], []
    boundary, first = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    place = 0
    for members in families.values():
        row = int(rows[members[0]])
        prompt_length = int(sequences.prompt_lengths[row])
        prompt = np.arange(place, place + prompt_length)
        parts.append((row, 0, prompt_length))
        positions.append(np.arange(prompt_length))
        queries.append(prompt_length)
        keys.append(prompt_length)
        key_index.append(prompt)
        place += prompt_length
        for at in members:
            length = int(sequences.lengths[rows[at]])
            boundary[at], first[at] = prompt[-1], place
            parts.append((int(rows[at]), prompt_length, prompt_length + length))
            positions.append(np.arange(prompt_length, prompt_length + length))
            queries.append(length)
            keys.append(prompt_length + length)
            key_index += [prompt, np.arange(place, place + length)]
            place += length
    return _Layout(
        parts,
        np.concatenate(positions),
        boundary,
        first,
        np.array(queries),
        np.array(keys),
        np.concatenate(key_index),
    )


def _aranges(counts: Array) -> Array:
    """0 .. n-1 for each n, one after another."""
    ends = np.cumsum(counts)
    result: Array = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
    return result
