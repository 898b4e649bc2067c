"""vLLM's penalties: repetition over prompt and output, frequency and presence over the output.

What a penalised request has seen is kept on the device, one row of the vocabulary for each; other
requests have no row. A row is penalised by its own numbers alone, whoever its batch-mates are.

Shape legend: R rows of a batch, P penalised ones among them, S seats, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lenvm.model.device import upload

ROWS_AT_ONCE = 64
"""Rows penalised together: what that takes for a moment is a few times these."""


class Penalised(Protocol):
    """What says how a request is penalised: its sampling parameters, its admission."""

    @property
    def frequency_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...


def has_penalties(request: Penalised) -> bool:
    """False where the penalties change nothing."""
    return bool(
        request.frequency_penalty or request.presence_penalty or request.repetition_penalty != 1
    )


def penalise(
    logits_RV: Tensor,
    seen_RV: Tensor,
    frequency_R1: Tensor | None,
    presence_R1: Tensor | None,
    repetition_R1: Tensor | None,
) -> Tensor:
    """Logits with vLLM's `apply_penalties`, in its order: [R, V].

    seen: twice how often a token was generated, and 1 more where the prompt has it. A penalty is
    None where no row has it; that changes no bit of the others' rows.
    """
    logits = logits_RV
    if repetition_R1 is not None:
        scale = torch.where(logits > 0, 1 / repetition_R1, repetition_R1)
        logits = torch.where(seen_RV > 0, logits * scale, logits)
    if frequency_R1 is not None:
        logits = logits - frequency_R1 * (seen_RV >> 1)
    if presence_R1 is not None:
        logits = logits - presence_R1 * (seen_RV > 1)
    return logits.to(logits_RV.dtype)


@dataclass
class _Request:
    penalties: Penalised
    prompt_token_ids: Sequence[int]
    generated_token_ids: Sequence[int]
    seat: int = -1
    """Its row of what was seen; -1 until it is first penalised."""


@dataclass
class _Rows:
    """The penalised rows of a batch, on the device; reused while the same requests step."""

    request_ids: list[str]
    places_2P: Tensor
    """Rows of the batch, seats."""
    numbers: list[Tensor | None]
    """Frequency, presence, repetition: [P, 1] each; None where no row has it."""


class Penalties:
    """The penalised requests of a batch. Nothing here waits for the device."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}
        self._seen_SV: Tensor | None = None
        self._free: list[int] = []
        self._rows: _Rows | None = None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def add(
        self,
        request_id: str,
        request: Penalised,
        prompt_token_ids: Sequence[int],
        generated_token_ids: Sequence[int] = (),
    ) -> None:
        """Follow a request, if it has penalties. generated: of a resumed one, so far."""
        if has_penalties(request):
            self._requests[request_id] = _Request(request, prompt_token_ids, generated_token_ids)
            self._rows = None

    def remove(self, request_id: str) -> None:
        """Forget a request; one that is not followed is passed over."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self._rows = None
        if request.seat >= 0:
            self._free.append(request.seat)
        if not self._requests:
            self._seen_SV, self._free = None, []

    def apply(self, request_ids: Sequence[str], logits_RV: Tensor) -> None:
        """Penalise the rows of these requests, in place; rows of requests without penalties stay
        bit for bit as they are."""
        if not self._requests:
            return
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None and request.seat < 0:
                self._take_seat(request, logits_RV)
        rows, seen_SV = self._find(request_ids), self._seen_SV
        if rows is None or seen_SV is None:
            return
        for at in range(0, rows.places_2P.shape[1], ROWS_AT_ONCE):
            part = slice(at, at + ROWS_AT_ONCE)
            places, seats = rows.places_2P[:, part]
            penalised = penalise(
                logits_RV.index_select(0, places),
                seen_SV.index_select(0, seats),
                *(None if numbers is None else numbers[part] for numbers in rows.numbers),
            )
            logits_RV.index_copy_(0, places, penalised)

    def count(self, request_ids: Sequence[str], tokens_R: Tensor) -> None:
        """The chosen tokens of these requests, int64, which `apply` has penalised before."""
        rows = self._find(request_ids) if self._requests else None
        if rows is None or self._seen_SV is None:
            return
        places, seats = rows.places_2P
        tokens = tokens_R.index_select(0, places)
        twice = torch.full_like(tokens, 2, dtype=torch.int32)
        self._seen_SV.index_put_((seats, tokens), twice, accumulate=True)

    # -- inside -----------------------------------------------------------------------------------

    def _take_seat(self, request: _Request, logits_RV: Tensor) -> None:
        device = logits_RV.device
        if not self._free:
            old = self._seen_SV
            taken = 0 if old is None else len(old)
            size = max(4, 2 * taken)
            self._seen_SV = logits_RV.new_zeros(size, logits_RV.shape[-1], dtype=torch.int32)
            if old is not None:
                self._seen_SV[:taken] = old
            self._free = list(range(size - 1, taken - 1, -1))
        assert self._seen_SV is not None
        request.seat = self._free.pop()
        seen_V = self._seen_SV[request.seat].zero_()
        if request.penalties.repetition_penalty != 1:
            prompt = upload(list(request.prompt_token_ids), torch.long, device)
            seen_V.index_fill_(0, prompt, 1)
        if len(request.generated_token_ids):
            generated = upload(list(request.generated_token_ids), torch.long, device)
            seen_V.index_add_(0, generated, torch.full_like(generated, 2, dtype=torch.int32))

    def _find(self, request_ids: Sequence[str]) -> _Rows | None:
        """The penalised ones among these; None where there is none."""
        if self._rows is not None and self._rows.request_ids == request_ids:
            return self._rows
        found = [
            (place, self._requests[request_id])
            for place, request_id in enumerate(request_ids)
            if request_id in self._requests
        ]
        if not found or self._seen_SV is None:
            return None
        device = self._seen_SV.device
        places = upload([[p for p, _ in found], [r.seat for _, r in found]], torch.long, device)
        penalties = [r.penalties for _, r in found]
        columns = (
            [p.frequency_penalty for p in penalties],
            [p.presence_penalty for p in penalties],
            # as small as 1e-6 is certain already, and no logit overflows there
            [max(p.repetition_penalty, 1e-6) for p in penalties],
        )
        uploaded = upload(columns, torch.float32, device).unsqueeze(-1)
        numbers = [
            column if any(value != neutral for value in values) else None
            for column, values, neutral in zip(uploaded, columns, (0, 0, 1), strict=True)
        ]
        self._rows = _Rows(list(request_ids), places, numbers)
        return self._rows
