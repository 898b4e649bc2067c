"""Trajectories as packed batches: token arrays, and batches without a padding token.

A batch is one row of N tokens: whole sequences (prompt and completion) side by side, positions
restarting, `cu_seqlens` at their borders. `labels` hold the remaining length n of the state after
each token where it counts in the loss (s_0 .. s_{L-1}: positions P-1 .. P+L-2), -100 elsewhere.

Shape legend: N tokens of a batch, S sequences.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError

IGNORED = -100
Censoring = Literal["drop", "one_sided"]


@dataclass
class TokenStore:
    """Sequences in flat arrays; `dropped` counts what was left out, by reason."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    """[S + 1] where each sequence starts in `tokens`."""
    prompt_lengths: np.ndarray[Any, np.dtype[np.int64]]
    complete: np.ndarray[Any, np.dtype[np.bool_]]
    domains: list[str]
    prompt_hashes: list[str]
    images: list[tuple[str, ...]]
    """Image files of each sequence's prompt."""
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def build(
        cls,
        trajectories: Iterable[Trajectory],
        *,
        max_tokens: int = 8192,
        censoring: Censoring = "drop",
        vocab_size: int | None = None,
    ) -> "TokenStore":
        """Sequences over `max_tokens` are dropped and counted, never cut; truncated completions are
        dropped and counted, or kept as censored. DataError for a token outside the vocabulary."""
        parts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        prompts, complete, domains, hashes, images = [], [], [], [], []
        dropped: Counter[str] = Counter()
        for t in trajectories:
            if not t.is_complete and censoring == "drop":
                dropped["truncated"] += 1
                continue
            ids = np.array([*t.prompt_token_ids, *t.completion_token_ids], dtype=np.int32)
            if len(ids) > max_tokens:
                dropped["too_long"] += 1
                continue
            if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
                raise DataError(
                    f"trajectory {t.id} has token {int(ids.max())}, outside the backbone's "
                    f"vocabulary of {vocab_size}: it was sampled with another tokenizer"
                )
            parts.append(ids)
            prompts.append(len(t.prompt_token_ids))
            complete.append(t.is_complete)
            domains.append(t.domain)
            hashes.append(t.prompt_hash)
            images.append(tuple(t.images))
        return cls(
            tokens=np.concatenate(parts) if parts else np.zeros(0, np.int32),
            offsets=np.cumsum([0, *(len(p) for p in parts)], dtype=np.int64),
            prompt_lengths=np.array(prompts, dtype=np.int64),
            complete=np.array(complete, dtype=np.bool_),
            domains=domains,
            prompt_hashes=hashes,
            images=images,
            dropped=dropped,
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[S] tokens of each sequence, prompt and completion."""
        return np.diff(self.offsets)

    @property
    def completion_lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[S] generated tokens of each sequence."""
        return self.lengths - self.prompt_lengths

    def sequence(self, index: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Token ids of one sequence."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def pack(store: TokenStore, indices: Sequence[int]) -> dict[str, Tensor]:
    """One packed batch: input_ids, position_ids, labels, is_complete [1, N]; cu_seqlens [S + 1].

    Where a completion is censored, its labels are lower bounds and `is_complete` is False.
    """
    lengths = store.lengths[list(indices)]
    total = int(lengths.sum())
    input_ids = torch.empty(total, dtype=torch.long)
    positions = torch.empty(total, dtype=torch.long)
    labels = torch.full((total,), IGNORED, dtype=torch.long)
    complete = torch.ones(total, dtype=torch.bool)
    start = 0
    for index, length in zip(indices, lengths.tolist(), strict=True):
        end, prompt = start + length, int(store.prompt_lengths[index])
        input_ids[start:end] = torch.from_numpy(store.sequence(index).astype(np.int64))
        positions[start:end] = torch.arange(length)
        answer = length - prompt
        labels[start + prompt - 1 : end - 1] = torch.arange(answer, 0, -1)
        complete[start:end] = bool(store.complete[index])
        start = end
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    return {
        "input_ids": input_ids.unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "labels": labels.unsqueeze(0),
        "shift_labels": labels.unsqueeze(0),
        "is_complete": complete.unsqueeze(0),
        "cu_seqlens": cu_seqlens,
    }


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, *, seed: int, grouped: Sequence[str] | None = None
) -> list[list[int]]:
    """Indices of each batch: shuffled sequences, packed in order up to `batch_tokens`.

    A pure function of its arguments. A longer sequence stands alone. `grouped` keeps the sequences
    of one group (a prompt's completions) together, the paper's ablation.
    """
    order = list(range(len(lengths)))
    generator = random.Random(seed)
    generator.shuffle(order)
    if grouped is not None:
        rank = {g: generator.random() for g in sorted(set(grouped))}
        order.sort(key=lambda i: rank[grouped[i]])
    batches: list[list[int]] = []
    used = batch_tokens
    for index in order:
        if used + lengths[index] > batch_tokens and (used or not batches):
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += lengths[index]
    return batches


AddImages = Callable[[Sequence[Sequence[int]], Sequence[Sequence[str]]], dict[str, Any]]
"""(token ids, image files) of a batch's sequences -> the entries that a VLM's batch has instead."""


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed batches of a store, one item each; `set_epoch` reshuffles."""

    def __init__(
        self,
        store: TokenStore,
        batch_tokens: int,
        *,
        seed: int = 0,
        grouped: bool = False,
        add_images: AddImages | None = None,
    ) -> None:
        self.store, self.batch_tokens, self.seed = store, batch_tokens, seed
        self.add_images = add_images
        self.groups = store.prompt_hashes if grouped else None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.batches = plan_batches(
            self.store.lengths.tolist(),
            self.batch_tokens,
            seed=self.seed + epoch,
            grouped=self.groups,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = self.batches[index]
        batch = pack(self.store, rows)
        if self.add_images is not None:
            ids = [self.store.sequence(row).tolist() for row in rows]
            batch |= self.add_images(ids, [self.store.images[row] for row in rows])
        return batch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))
