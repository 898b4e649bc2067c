"""RaggedDecoder: one forward over many requests of any length, each with its own KV cache.

Runs any Hugging Face decoder through its own modelling code, generator and value model alike.
`peek` evaluates candidate tokens at every request's next position in one forward; `commit` keeps
the key and value of the chosen one, so nothing is computed twice. A request's numbers never depend
on its batch-mates beyond rounding. Checks run before anything is changed: a bad call harms nobody.

Shape legend: R requests of a call, K candidates each, N packed tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lenvm.errors import CapacityError, InputError
from lenvm.model import attention
from lenvm.model.attention import CandidatePlan, ExtendPlan, KVStore, Segment

CHUNK = 2048
"""Tokens of one prefill forward: longer prompts are cut into chunks."""


class RaggedDecoder:
    """KV caches of up to `max_requests` requests, `max_tokens` tokens in total."""

    def __init__(
        self,
        backbone: Any,
        *,
        max_tokens: int = 65_536,
        max_requests: int = 64,
        max_candidates: int = 16,
    ) -> None:
        """backbone: a decoder without LM head (`AutoModel`). Raises InputError where its attention
        is of a kind that cannot be served exactly; the message names it."""
        self.backbone = backbone
        self.config = backbone.config.get_text_config()
        _refuse_unsupported(self.config)
        attention.register()
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self.max_candidates = max_candidates
        self.max_positions = int(self.config.max_position_embeddings)
        parameter = next(backbone.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        if self.device.type == "cuda":  # cuDNN attention plans anew, 60 ms, for every prompt length
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.vocab_size = int(backbone.get_input_embeddings().num_embeddings)
        heads = self.config.num_attention_heads
        self._shape = (
            int(getattr(self.config, "num_key_value_heads", None) or heads),
            int(getattr(self.config, "head_dim", None) or self.config.hidden_size // heads),
        )
        self._store = KVStore(self._allocate(0, 0))
        self._slots: dict[str, int] = {}
        self._lengths: dict[str, int] = {}
        self._free: list[int] = []
        self._peeked: tuple[dict[str, int], Tensor, CandidatePlan] | None = None

    # -- what is there ----------------------------------------------------------------------------

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def length(self, request_id: str) -> int:
        """Tokens of the request whose keys and values are kept."""
        self._check_known([request_id])
        return self._lengths[request_id]

    @property
    def num_tokens(self) -> int:
        """Tokens kept over all requests."""
        return sum(self._lengths.values())

    # -- calls ------------------------------------------------------------------------------------

    def add(self, requests: Mapping[str, Sequence[int]]) -> Tensor:
        """Prefill new requests: hidden state of each last token, [R, H].

        Raises InputError (id already there, empty prompt, token outside the vocabulary) or
        CapacityError (over `max_requests`, `max_tokens` or the model's positions) before it runs.
        """
        for request_id, token_ids in requests.items():
            if request_id in self._slots:
                raise InputError(f"request {request_id!r} is already there; remove it first")
            self._check_tokens(request_id, token_ids)
        self._check_room(requests)
        for request_id in requests:
            self._slots[request_id] = self._take_slot()
            self._lengths[request_id] = 0
        try:
            return self._append(requests)
        except BaseException:
            self.remove(list(requests))
            raise

    def extend(self, requests: Mapping[str, Sequence[int]]) -> Tensor:
        """Append tokens to known requests: hidden state of each last token, [R, H]."""
        self._check_known(requests)
        for request_id, token_ids in requests.items():
            self._check_tokens(request_id, token_ids)
        self._check_room(requests)
        return self._append(requests)

    def fork(self, parent_id: str, child_id: str) -> None:
        """A new request with the parent's prefix."""
        self._check_known([parent_id])
        if child_id in self._slots:
            raise InputError(f"request {child_id!r} is already there; remove it first")
        length = self._lengths[parent_id]
        self._check_room({child_id: range(length)})
        slot, source = self._take_slot(), self._slots[parent_id]
        data = self._store.data
        data[:, :, slot, :, :length] = data[:, :, source, :, :length]
        self._slots[child_id], self._lengths[child_id] = slot, length

    def peek(
        self, request_ids: Sequence[str], candidate_ids_RK: Tensor | Sequence[Sequence[int]]
    ) -> Tensor:
        """Hidden state of every candidate at its request's next position: [R, K, H].

        candidate_ids_RK: [R, K] int64, -1 pads (its hidden state is 0). Replaces an earlier peek.
        Raises InputError for an unknown request, a request named twice or a candidate outside the
        vocabulary; CapacityError over `max_candidates`, the KV budget or the model's positions.
        """
        candidates = torch.as_tensor(candidate_ids_RK, dtype=torch.long, device=self.device)
        self._check_known(request_ids)
        if len(set(request_ids)) != len(request_ids):
            raise InputError("a request is named twice in one peek")
        if candidates.ndim != 2 or candidates.shape[0] != len(request_ids):
            raise InputError(
                f"candidates must be [{len(request_ids)}, K]; got {list(candidates.shape)}"
            )
        width = candidates.shape[1]
        if not 1 <= width <= self.max_candidates:
            raise CapacityError(f"{width} candidates a row; allowed are 1 to {self.max_candidates}")
        outside = (candidates >= self.vocab_size) | (candidates < -1)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise InputError(
                f"request {request_ids[row]!r}: candidate {int(candidates[row, column])} is not a "
                f"token; ids go from 0 to {self.vocab_size - 1}"
            )
        self._check_room(dict.fromkeys(request_ids, (0,)))
        flat = (candidates.view(-1) >= 0).nonzero().squeeze(-1)
        lengths = [self._lengths[r] for r in request_ids]
        slots = [self._slots[r] for r in request_ids]
        plan = CandidatePlan(
            store=self._store,
            slots=torch.tensor(slots, device=self.device),
            lengths=torch.tensor(lengths, device=self.device),
            flat=flat,
            num_candidates=width,
            single=width == 1 and flat.numel() == len(request_ids),
            num_slots=max(slots) + 1,
            max_length=max(lengths),
        )
        positions = plan.lengths.repeat_interleave(width)[flat]
        hidden = self._forward(candidates.view(-1)[flat], positions, plan)
        self._peeked = ({r: i for i, r in enumerate(request_ids)}, candidates, plan)
        padded = hidden.new_zeros(candidates.numel(), hidden.shape[-1])
        padded[flat] = hidden
        return padded.view(*candidates.shape, -1)

    def commit(self, request_ids: Sequence[str], token_ids_R: Tensor | Sequence[int]) -> None:
        """Make one token of each request part of its prefix.

        A token that the last `peek` evaluated keeps its key and value; others are forwarded.
        """
        self._check_known(request_ids)
        tokens = torch.as_tensor(token_ids_R, device=self.device)
        flat = self._find_peeked(request_ids, tokens)
        others = {
            r: (t,)
            for r, t, at in zip(request_ids, tokens.tolist(), flat, strict=True)
            if at is None
        }
        for request_id, token_ids in others.items():
            self._check_tokens(request_id, token_ids)
        self._check_room(dict.fromkeys(request_ids, (0,)))
        kept = [(r, at) for r, at in zip(request_ids, flat, strict=True) if at is not None]
        if kept and self._peeked is not None:
            index, _, plan = self._peeked
            if not plan.single:
                self._keep(plan, [index[r] for r, _ in kept], [at for _, at in kept])
            for request_id, _ in kept:
                self._lengths[request_id] += 1
                del index[request_id]
        if others:
            self._append(others)

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests and free their room. InputError for an unknown one, before any goes."""
        self._check_known(request_ids)
        for request_id in request_ids:
            self._free.append(self._slots.pop(request_id))
            del self._lengths[request_id]
            if self._peeked is not None:
                self._peeked[0].pop(request_id, None)
        self._free.sort(reverse=True)  # low slots first: reading stays dense

    # -- inside -----------------------------------------------------------------------------------

    def _append(self, requests: Mapping[str, Sequence[int]]) -> Tensor:
        """Forward new tokens of known requests in packed chunks; hidden of each last token."""
        for request_id in requests:
            if self._peeked is not None:
                self._peeked[0].pop(request_id, None)
        last: dict[str, Tensor] = {}
        for chunk in _chunks(requests, CHUNK):
            segments: list[Segment] = []
            tokens: list[int] = []
            positions: list[int] = []
            for request_id, token_ids in chunk:
                start = self._lengths[request_id]
                segments.append(
                    Segment(self._slots[request_id], start, len(token_ids), len(tokens))
                )
                tokens.extend(token_ids)
                positions.extend(range(start, start + len(token_ids)))
            self._grow(max(s.start + s.length for s in segments))
            hidden = self._forward(
                torch.tensor(tokens, device=self.device),
                torch.tensor(positions, device=self.device),
                ExtendPlan(self._store, segments),
            )
            for (request_id, token_ids), segment in zip(chunk, segments, strict=True):
                self._lengths[request_id] += len(token_ids)
                last[request_id] = hidden[segment.offset + segment.length - 1]
        return torch.stack([last[r] for r in requests])

    @torch.inference_mode()
    def _forward(
        self, tokens_N: Tensor, positions_N: Tensor, plan: ExtendPlan | CandidatePlan
    ) -> Tensor:
        """Hidden states of packed tokens: [N, H]."""
        with _ragged_attention(self.backbone):
            out = self.backbone(
                input_ids=tokens_N.unsqueeze(0),
                position_ids=positions_N.unsqueeze(0),
                use_cache=False,
                plan=plan,
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _find_peeked(self, request_ids: Sequence[str], tokens_R: Tensor) -> list[int | None]:
        """Place of each token among the packed candidates of the last peek; None: not there."""
        if self._peeked is None:
            return [None] * len(request_ids)
        index, candidates, plan = self._peeked
        rows = [index.get(r) for r in request_ids]
        at = torch.tensor([row or 0 for row in rows], device=self.device)
        match = candidates[at] == tokens_R.unsqueeze(-1)
        padded = at * plan.num_candidates + match.int().argmax(-1)
        place = torch.where(match.any(-1), torch.searchsorted(plan.flat, padded), -1).tolist()
        return [
            None if row is None or flat < 0 else flat for row, flat in zip(rows, place, strict=True)
        ]

    def _keep(self, plan: CandidatePlan, rows: list[int], flat: list[int]) -> None:
        """Copy chosen candidates from the stash into the store."""
        slots, lengths = plan.slots[rows], plan.lengths[rows]
        chosen = torch.stack([layer[:, flat] for layer in plan.stash])  # [L, 2, R, Hkv, D]
        self._store.data[:, :, slots, :, lengths] = chosen.permute(2, 0, 1, 3, 4)

    def _allocate(self, num_slots: int, capacity: int) -> Tensor:
        num_kv, size = self._shape
        shape = (self.config.num_hidden_layers, 2, num_slots, num_kv, capacity, size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _take_slot(self) -> int:
        if not self._free:
            data = self._store.data
            old, new = data.shape[2], min(self.max_requests, max(4, data.shape[2] * 2))
            self._store.data = self._allocate(new, self._store.capacity)
            self._store.data[:, :, :old] = data
            self._free = list(range(new - 1, old - 1, -1))
        return self._free.pop()

    def _grow(self, length: int) -> None:
        """Room for `length` tokens in every slot."""
        if length <= self._store.capacity:
            return
        data = self._store.data
        capacity = min(self.max_positions, max(length, 2 * data.shape[4], 128))
        self._store.data = self._allocate(data.shape[2], capacity)
        self._store.data[:, :, :, :, : data.shape[4]] = data

    def _check_known(self, request_ids: Sequence[str] | Mapping[str, Any]) -> None:
        for request_id in request_ids:
            if request_id not in self._slots:
                raise InputError(f"no request {request_id!r}: never added, or removed")

    def _check_tokens(self, request_id: str, token_ids: Sequence[int]) -> None:
        if not len(token_ids):
            raise InputError(f"request {request_id!r}: no tokens")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"request {request_id!r}: token {low if low < 0 else high} is not in the "
                f"vocabulary; ids go from 0 to {self.vocab_size - 1}"
            )

    def _check_room(self, requests: Mapping[str, Sequence[int]]) -> None:
        num_new = sum(r not in self._slots for r in requests)
        if len(self._slots) + num_new > self.max_requests:
            raise CapacityError(
                f"{len(self._slots)} + {num_new} requests are over the limit of {self.max_requests}"
            )
        total = self.num_tokens + sum(len(ids) for ids in requests.values())
        if total > self.max_tokens:
            raise CapacityError(
                f"{total} tokens over all requests exceed the KV budget of {self.max_tokens}"
            )
        for request_id, token_ids in requests.items():
            length = self._lengths.get(request_id, 0) + len(token_ids)
            if length > self.max_positions:
                raise CapacityError(
                    f"request {request_id!r} would have {length} tokens; the model has "
                    f"{self.max_positions} positions"
                )
            if request_id in self._slots:
                self._grow(length)


def _chunks(
    requests: Mapping[str, Sequence[int]], size: int
) -> Iterator[list[tuple[str, Sequence[int]]]]:
    """Requests cut and packed into lists of at most `size` tokens; a request once per list."""
    chunk: list[tuple[str, Sequence[int]]] = []
    room = size
    for request_id, token_ids in requests.items():
        for start in range(0, len(token_ids), size):
            part = token_ids[start : start + size]
            if chunk and (len(part) > room or chunk[-1][0] == request_id):
                yield chunk
                chunk, room = [], size
            chunk.append((request_id, part))
            room -= len(part)
    if chunk:
        yield chunk


@contextmanager
def _ragged_attention(backbone: Any) -> Iterator[None]:
    """The backbone with our attention, for one forward; it is left as it was."""
    configs = {id(c): c for c in (backbone.config, backbone.config.get_text_config())}.values()
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = attention.NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _refuse_unsupported(config: Any) -> None:
    name = config.model_type
    if getattr(config, "attn_logit_softcapping", None):
        raise InputError(f"{name}: attention with soft-capped logits is not supported")
    kinds = set(getattr(config, "layer_types", None) or []) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise InputError(f"{name}: layers of type {', '.join(sorted(kinds))} are not supported")
    if name in {"gpt_oss", "mamba", "mamba2", "rwkv", "jamba", "t5", "bart"}:
        raise InputError(f"{name}: this kind of attention (sinks, state space) is not supported")
