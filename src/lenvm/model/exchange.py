"""What passes between the host and the GPU in the steps of a CudaRunner, so that neither waits for
the other: the numbers that a step's kernels read, and what they found."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenvm.model.candidate_kernels import NO_ROW
from lenvm.model.device import pin

NUM_STEPS = 8
"""Steps that may be under way: each has places of its own."""


@dataclass
class _Watch:
    """What a step found, on its way to the host."""

    step: int
    kept: bool
    done: Any
    """An event, for when it has arrived."""
    found: Tensor
    """[3] int32, as in `Exchange`."""
    request_ids: list[str]
    num_slots: int
    """Slots of a peek whose candidates nobody had counted; else 0."""


class Exchange:
    """One step after the other: `begin`, the kernel that reads, `was_read`, and `watch` after each
    kernel that finds something. On a CPU (Triton's interpreter) nothing is watched."""

    def __init__(
        self, max_requests: int, device: torch.device, note_share: Callable[[float], None]
    ) -> None:
        """note_share: told what share of an uncounted step's slots was real."""
        given = np.zeros((NUM_STEPS, 3, max_requests), np.int32)
        self._given = pin(given, torch.int32, device)
        self._host = self._given.numpy()
        self._found = torch.full((NUM_STEPS, 3), NO_ROW, dtype=torch.int32, device=device)
        self._step = 0
        self._note_share = note_share
        self._watches: deque[_Watch] = deque()
        self._defect: str | None = None
        self._is_cuda = device.type == "cuda"
        if not self._is_cuda:
            return
        event: Any = torch.cuda.Event
        self._read = [event() for _ in range(NUM_STEPS)]
        self._done = [(event(), event()) for _ in range(NUM_STEPS)]
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        """Copies what was found to the host, so that the next kernels need not wait for it."""
        self._copies = pin(np.zeros((NUM_STEPS, 2, 3), np.int32), torch.int32, device)

    @property
    def found(self) -> Tensor:
        """[3] int32 on the device: candidates that the step packed, and the first row that
        `pack_candidates` and `keep_candidates` found something wrong with (NO_ROW: none)."""
        return self._found[self._step]

    def begin(self, numbers: Sequence[Any]) -> Tensor:
        """The next step: table rows, lengths and next slots of its requests, [3, max_requests]
        int32, where kernels read them."""
        self._step = (self._step + 1) % NUM_STEPS
        while self._watches and self._watches[0].step == self._step:
            self._watches[0].done.synchronize()
            self._read_watch()
        if self._is_cuda:  # the step that had these places is NUM_STEPS ago
            self._read[self._step].synchronize()
        self._host[self._step] = 0
        self._host[self._step, :, : len(numbers[0])] = numbers
        given: Tensor = self._given[self._step]
        return given

    def was_read(self) -> None:
        """The kernel that reads what `begin` gave has been launched."""
        if self._is_cuda:
            self._read[self._step].record()

    def watch(self, request_ids: Sequence[str], *, kept: bool, num_slots: int = 0) -> None:
        """Copy what the step has found so far to the host. kept: after `keep_candidates`, or else
        before."""
        if not self._is_cuda:
            return
        done, copy = self._done[self._step][kept], self._copies[self._step, int(kept)]
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            copy.copy_(self.found, non_blocking=True)
            done.record()
        self._watches.append(_Watch(self._step, kept, done, copy, list(request_ids), num_slots))

    def find_defect(self) -> str | None:
        """What the oldest step not asked about yet did wrong, as far as it has arrived."""
        while not self._defect and self._watches and self._watches[0].done.query():
            self._read_watch()
        defect, self._defect = self._defect, None
        return defect

    def _read_watch(self) -> None:
        """Of the oldest watch, which has arrived."""
        watch = self._watches.popleft()
        total, peeked, kept = watch.found.tolist()
        if watch.num_slots:
            self._note_share(total / watch.num_slots)
        row = kept if watch.kept else peeked
        if row < len(watch.request_ids) and not self._defect:
            what = "a candidate is not a token, or is over num_candidates"
            if watch.kept:
                what = "the committed token is not among its peeked candidates"
            self._defect = f"request {watch.request_ids[row]!r}: {what}"
