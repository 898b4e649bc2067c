"""RaggedDecoder: one forward over many requests of any length, each with its own KV cache.

Runs any Hugging Face decoder through its own modelling code, generator and value model alike.
`peek` evaluates candidate tokens at every request's next position in one forward; `commit` keeps
the key and value of the chosen one, so nothing is computed twice. A request's numbers never depend
on its batch-mates beyond rounding. Checks run before anything is changed: a bad call harms nobody.

This file is the calls, their checks and the bookkeeping. The forwards are `torch_runner.py`'s, and
on CUDA `cuda_runner.py`'s (Triton kernels, CUDA graphs, no host sync in a step).

Shape legend: R requests of a call, K candidates each, E outputs: the hidden size, or the head's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lenvm.errors import CapacityError, InputError
from lenvm.model import attention
from lenvm.model.device import has_triton, with_fast_products
from lenvm.model.kv_pages import Array, KVPages
from lenvm.model.support import check_supported
from lenvm.model.torch_runner import Head, Runner, TorchRunner


@dataclass
class _Peek:
    """The last peek: what a commit can keep."""

    rows: dict[str, int]
    """Row of each request that nothing has happened to since."""
    candidates_RK: Tensor
    host: list[list[int]] | None = None
    """`candidates_RK` as lists, once read."""

    def holds(self, request_id: str, token: int) -> bool:
        if request_id not in self.rows:
            return False
        if self.host is None:
            self.host = self.candidates_RK.tolist()
        return token in self.host[self.rows[request_id]]


class RaggedDecoder:
    """KV caches of up to `max_requests` requests, `max_tokens` tokens in total."""

    def __init__(
        self,
        backbone: Any,
        *,
        max_tokens: int = 65_536,
        max_requests: int = 64,
        max_candidates: int = 16,
        kv_bytes: int | None = None,
        head: Head | None = None,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        cuda_graphs: bool = True,
        page_size: int | None = None,
    ) -> None:
        """backbone: a decoder without LM head (`AutoModel`).

        `kv_bytes` bounds the KV store in bytes and lowers `max_tokens` to what fits. `head` maps
        hidden states [N, H] to what the calls return (its fp32 products are TF32's where the
        backbone is in 16 bits on a GPU); without one they return hidden states.
        `kernels` "auto" is Triton on CUDA and torch elsewhere. Raises InputError where the model's
        attention is of a kind that cannot be served exactly; the message names it.
        """
        check_supported(backbone)
        attention.register()
        config = backbone.config.get_text_config()
        parameter = next(backbone.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.max_positions = int(config.max_position_embeddings)
        self.vocab_size = int(backbone.get_input_embeddings().num_embeddings)
        self.max_requests, self.max_candidates = max_requests, max_candidates
        triton = kernels == "triton" or (kernels == "auto" and self.device.type == "cuda")
        heads = config.num_attention_heads
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        shape = {
            "num_layers": int(config.num_hidden_layers),
            "num_kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
            "head_size": head_size,
            "page_size": page_size or (16 if not triton else 64 if head_size <= 128 else 32),
        }
        if kv_bytes is not None:
            max_tokens = min(max_tokens, _tokens_in(kv_bytes, max_requests, self.dtype, **shape))
        self.max_tokens = max_tokens
        self._cache = KVPages(
            max_tokens=max_tokens,
            max_requests=max_requests,
            max_length=self.max_positions,
            dtype=self.dtype,
            device=self.device,
            with_table=triton,
            **shape,
        )
        fast = None if head is None else with_fast_products(head, self.dtype, self.device)
        self._runner: Runner
        if triton:
            if not has_triton():
                raise InputError("the GPU path needs triton (pip install it), or kernels='torch'")
            from lenvm.model.cuda_runner import CudaRunner
            from lenvm.model.head_kernels import fuse_head

            fast = fuse_head(head, self.dtype) or fast
            self._runner = CudaRunner(
                backbone, fast, self._cache, max_candidates=max_candidates, graphs=cuda_graphs
            )
        else:
            self._runner = TorchRunner(backbone, fast, self._cache, max_candidates=max_candidates)
        self._chunk = 2048 if self.device.type == "cpu" else 8192
        self._peeked = _Peek({}, torch.empty(0, 0))

    # -- what is there ----------------------------------------------------------------------------

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._cache

    def length(self, request_id: str) -> int:
        """Tokens of the request whose keys and values are kept."""
        self._check_known([request_id])
        return self._cache.length(request_id)

    @property
    def num_tokens(self) -> int:
        """Tokens stored over all requests; what forks share is counted once."""
        return self._cache.num_tokens

    @property
    def num_kv_bytes(self) -> int:
        """Size of the KV store, all of it allocated at the start."""
        return self._cache.num_bytes

    def warm_up(self, num_requests: int, num_candidates: int = 1) -> None:
        """Compile and capture the step of so many requests with so many candidates each; else the
        first step of a new shape does it. Nothing to do on the CPU."""
        with torch.inference_mode():
            self._runner.warm_up(num_requests, num_candidates)

    # -- calls ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def add(self, requests: Mapping[str, Sequence[int]]) -> Tensor:
        """Prefill new requests: output after each last token, [R, E].

        Equal prompts are run and stored once. Raises InputError (id already there, empty prompt,
        token outside the vocabulary) or CapacityError (over `max_requests`, `max_tokens` or the
        model's positions) before it runs.
        """
        self._raise_defect()
        first: dict[tuple[int, ...], str] = {}
        twins: dict[str, str] = {}
        for request_id, token_ids in requests.items():
            if request_id in self._cache:
                raise InputError(f"request {request_id!r} is already there; remove it first")
            self._check_tokens(request_id, token_ids)
            prompt = tuple(token_ids)
            if first.setdefault(prompt, request_id) != request_id:
                twins[request_id] = first[prompt]
        need = {
            r: len(ids) % self._cache.page_size if r in twins else len(ids)
            for r, ids in requests.items()
        }
        self._check_room(need, {r: len(ids) for r, ids in requests.items()}, len(requests))
        done: dict[str, Tensor] = {}
        try:
            for request_id in first.values():
                self._cache.open(request_id)
            done = self._append({r: requests[r] for r in first.values()})
            for request_id, parent_id in twins.items():
                self._cache.fork(parent_id, request_id)
                done[request_id] = done[parent_id]
        except BaseException:
            for request_id in requests:
                if request_id in self._cache:
                    self._cache.close(request_id)
            raise
        return torch.stack([done[r] for r in requests])

    @torch.inference_mode()
    def extend(self, requests: Mapping[str, Sequence[int]]) -> Tensor:
        """Append tokens to known requests: output after each last token, [R, E]."""
        self._raise_defect()
        self._check_known(requests)
        for request_id, token_ids in requests.items():
            self._check_tokens(request_id, token_ids)
        self._check_growth({r: len(ids) for r, ids in requests.items()})
        done = self._append(requests)
        return torch.stack([done[r] for r in requests])

    @torch.inference_mode()
    def fork(self, parent_id: str, child_id: str) -> None:
        """A new request with the parent's prefix, whose full pages are shared, not copied."""
        self._check_known([parent_id])
        if child_id in self._cache:
            raise InputError(f"request {child_id!r} is already there; remove it first")
        self._check_room({child_id: self._cache.copied_by_fork(parent_id)}, {}, 1)
        self._cache.fork(parent_id, child_id)

    @torch.inference_mode()
    def peek(
        self,
        request_ids: Sequence[str],
        candidate_ids_RK: Tensor | Sequence[Sequence[int]],
        *,
        num_candidates: int | None = None,
    ) -> Tensor:
        """Output of every candidate at its request's next position: [R, K, E].

        candidate_ids_RK: [R, K] int64, -1 pads (its output is 0). Replaces an earlier peek. Where
        the ids are on a GPU, `num_candidates` (how many are not -1, if the caller knows) saves the
        work on padding. Raises InputError for an unknown request, a request named twice or a
        candidate outside the vocabulary; CapacityError over `max_candidates`, the KV budget or the
        model's positions. A bad id on a GPU counts as padding and raises at the next call instead.
        """
        self._raise_defect()
        candidates = torch.as_tensor(candidate_ids_RK, dtype=torch.long)
        rows = self._rows(request_ids)
        if not request_ids or len(set(request_ids)) != len(request_ids):
            raise InputError("a peek names each request once, and at least one")
        if candidates.ndim != 2 or candidates.shape[0] != len(request_ids):
            raise InputError(
                f"candidates must be [{len(request_ids)}, K]; got {list(candidates.shape)}"
            )
        width = candidates.shape[1]
        if not 1 <= width <= self.max_candidates:
            raise CapacityError(f"{width} candidates a row; allowed are 1 to {self.max_candidates}")
        if candidates.device.type == "cpu":
            self._check_candidates(request_ids, candidates)
            num_candidates = int((candidates >= 0).sum())
        self._check_next(request_ids, rows)
        self._cache.reserve_next(request_ids, rows)
        self._peeked = _Peek({}, candidates)
        if num_candidates == 0:
            raise InputError("a peek needs at least one candidate that is not padding")
        out = self._runner.peek(request_ids, candidates, num_candidates)
        self._peeked.rows = {r: i for i, r in enumerate(request_ids)}
        return out

    @torch.inference_mode()
    def commit(
        self,
        request_ids: Sequence[str],
        token_ids_R: Tensor | Sequence[int],
        *,
        peeked: bool = False,
    ) -> None:
        """Make one token of each request part of its prefix.

        A token that the last `peek` evaluated keeps its key and value; others are forwarded.
        `peeked` promises that every token was evaluated: then nothing is read back from a GPU, and
        a broken promise raises InputError at the next call.
        """
        self._raise_defect()
        rows = self._rows(request_ids)
        tokens = torch.as_tensor(token_ids_R, dtype=torch.long)
        if tokens.shape != (len(request_ids),) or len(set(request_ids)) != len(request_ids):
            raise InputError(
                f"a commit is one token for each request, named once; got {list(tokens.shape)} "
                f"tokens for {len(request_ids)} requests"
            )
        kept, others = list(range(len(request_ids))), dict[str, Sequence[int]]()
        if not (peeked and tokens.device.type != "cpu"):
            kept = []
            for i, (request_id, token) in enumerate(zip(request_ids, tokens.tolist(), strict=True)):
                if self._peeked.holds(request_id, token):
                    kept.append(i)
                else:
                    others[request_id] = (token,)
        elif missing := [r for r in request_ids if r not in self._peeked.rows]:
            raise InputError(f"request {missing[0]!r} has no peeked candidates to commit")
        for request_id, token_ids in others.items():
            self._check_tokens(request_id, token_ids)
        self._check_next(request_ids, rows)
        if kept:
            chosen = tokens if len(kept) == len(tokens) else tokens[kept]
            self._keep([request_ids[i] for i in kept], rows[kept], chosen)
        if others:
            self._append(others)

    @torch.inference_mode()
    def step(self, request_ids: Sequence[str], token_ids_R: Tensor | Sequence[int]) -> Tensor:
        """One token for each request, `peek` and `commit` in one: output after it, [R, E].

        What a generator decodes with. Nothing is read back from a GPU.
        """
        tokens = torch.as_tensor(token_ids_R, dtype=torch.long)
        out = self.peek(request_ids, tokens.unsqueeze(-1), num_candidates=len(request_ids))
        self._keep(request_ids, self._rows(request_ids), tokens)
        return out[:, 0]

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests and free their room. InputError for an unknown one, before any goes."""
        self._check_known(request_ids)
        for request_id in dict.fromkeys(request_ids):
            self._cache.close(request_id)
            self._peeked.rows.pop(request_id, None)

    # -- inside -----------------------------------------------------------------------------------

    def _keep(self, request_ids: Sequence[str], rows: Array, tokens_R: Tensor) -> None:
        """Tokens of the last peek become part of their requests."""
        self._runner.keep(request_ids, [self._peeked.rows[r] for r in request_ids], tokens_R)
        self._cache.advance_next(rows)
        for request_id in request_ids:
            del self._peeked.rows[request_id]

    def _append(self, requests: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Forward new tokens of known requests in packed chunks; output after each last token."""
        last: dict[str, Tensor] = {}
        for chunk in _chunks(requests, self._chunk):
            for request_id, token_ids in chunk:
                self._peeked.rows.pop(request_id, None)
                self._cache.reserve(request_id, len(token_ids))
            outs = self._runner.extend(chunk)
            for (request_id, token_ids), out in zip(chunk, outs, strict=True):
                self._cache.advance(request_id, len(token_ids))
                last[request_id] = out
        return last

    # -- checks -----------------------------------------------------------------------------------

    def _raise_defect(self) -> None:
        if defect := self._runner.find_defect():
            raise InputError(defect)

    def _rows(self, request_ids: Sequence[str]) -> Array:
        """Their rows in the cache. InputError for an unknown request."""
        try:
            return self._cache.rows(request_ids)
        except KeyError:
            self._check_known(request_ids)
            raise

    def _check_known(self, request_ids: Sequence[str] | Mapping[str, Any]) -> None:
        for request_id in request_ids:
            if request_id not in self._cache:
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

    def _check_candidates(self, request_ids: Sequence[str], candidates: Tensor) -> None:
        outside = (candidates >= self.vocab_size) | (candidates < -1)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise InputError(
                f"request {request_ids[row]!r}: candidate {int(candidates[row, column])} is not a "
                f"token; ids go from 0 to {self.vocab_size - 1}"
            )

    def _check_next(self, request_ids: Sequence[str], rows: Array) -> None:
        """CapacityError unless each of them has room for one more token."""
        is_long = self._cache.lengths(rows) >= self.max_positions
        if is_long.any() or self.num_tokens + len(rows) > self.max_tokens:
            self._check_growth(dict.fromkeys(request_ids, 1))

    def _check_growth(self, growth: Mapping[str, int]) -> None:
        lengths = {r: self._cache.length(r) + n for r, n in growth.items()}
        self._check_room(growth, lengths, 0)

    def _check_room(
        self, new_tokens: Mapping[str, int], lengths: Mapping[str, int], num_new: int
    ) -> None:
        """CapacityError unless `new_tokens` more, up to `lengths`, and `num_new` requests fit."""
        if len(self._cache) + num_new > self.max_requests:
            raise CapacityError(
                f"{len(self._cache)} + {num_new} requests are over the limit of {self.max_requests}"
            )
        for request_id, length in lengths.items():
            if length > self.max_positions:
                raise CapacityError(
                    f"request {request_id!r} would have {length} tokens; the model has "
                    f"{self.max_positions} positions"
                )
        total = self.num_tokens + sum(new_tokens.values())
        if total > self.max_tokens:
            largest = max(new_tokens, key=lambda r: new_tokens[r])
            raise CapacityError(
                f"{total} tokens over all requests exceed the KV budget of {self.max_tokens}; the "
                f"largest new part is {new_tokens[largest]} tokens of request {largest!r}. Remove "
                "requests, or give a larger budget"
            )


def _tokens_in(
    kv_bytes: int,
    max_requests: int,
    dtype: torch.dtype,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
) -> int:
    """Tokens that a KV store of so many bytes holds for certain."""
    page_bytes = num_layers * 2 * num_kv_heads * head_size * page_size * dtype.itemsize
    num_pages = kv_bytes // page_bytes - max_requests - 1
    if num_pages < 1:
        raise CapacityError(
            f"kv_bytes {kv_bytes} is under {(max_requests + 2) * page_bytes}, the least for "
            f"{max_requests} requests; give more, or lower max_requests"
        )
    return num_pages * page_size


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
