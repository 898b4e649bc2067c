"""What passes between the host and the GPU in the steps of a CudaRunner, so that neither waits for
the other: the numbers that a step's kernels read, and what they found. Both lie in the host's
pinned memory, where kernels read and write them: no copy, and no event between two kernels."""

import time
import weakref
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
PATIENCE_S = 5.0
"""Then somebody asks the GPU whether it has failed."""
_PARKED: list[tuple[torch.device, Tensor, Tensor]] = []
"""Places of exchanges that are gone, which a kernel under way may still write to: torch would give
the memory to others at once."""


@dataclass
class _Step:
    number: int
    request_ids: list[str]
    num_slots: int
    """Slots of a peek whose candidates nobody had counted; else 0."""


class Exchange:
    """One step after the other: `begin`, `pack_candidates`, `launched`, and `keep_candidates` if
    somebody keeps. What a kernel tells is a word, step number x 2^32 + value: a word that is not
    from this step has not arrived."""

    def __init__(
        self, max_requests: int, device: torch.device, note_share: Callable[[float], None]
    ) -> None:
        """note_share: told what share of an uncounted step's slots was real."""
        given = pin(np.zeros((NUM_STEPS, 3, max_requests), np.int32), torch.int32, device)
        told = pin(np.zeros((NUM_STEPS, 4), np.int64), torch.int64, device)  # 16 bytes aligned
        self._given: tuple[Tensor, ...] = given.unbind(0)
        self._told: tuple[Tensor, ...] = told.unbind(0)
        self._given_here, self._told_here = given.numpy(), told.numpy()
        self._device = device
        if device.type == "cuda":
            while _PARKED:
                parked = _PARKED.pop()  # held until its GPU is done
                torch.cuda.synchronize(parked[0])
            weakref.finalize(self, _PARKED.append, (device, given, told)).atexit = False
        self._note_share = note_share
        self._steps: deque[_Step] = deque(maxlen=NUM_STEPS)
        """Those whose places are still theirs; the last `_num_unread` may not have told yet what
        they packed."""
        self._num_unread = 0
        self._defect: str | None = None
        self.number = 0
        """Of the last step that was launched; from 1."""

    def begin(self, numbers: Sequence[Any]) -> tuple[Tensor, Tensor, int]:
        """The next step's places and number. Its table rows, lengths and next slots, [3,
        max_requests] int32, where kernels read them; and `told` [4] int64: see
        `candidate_kernels`."""
        number = self.number + 1
        place = number % NUM_STEPS
        if len(self._steps) == NUM_STEPS:  # whose places these were
            self._wait_for(self._steps[1])  # it began when the first one's last kernel had ended
            self._read_packed()
            self._read_kept(self._steps.popleft())
            self._num_unread = min(self._num_unread, len(self._steps))
        self._given_here[place] = 0
        self._given_here[place, :, : len(numbers[0])] = numbers
        self._told_here[place] = 0
        return self._given[place], self._told[place], number

    def launched(self, request_ids: Sequence[str], num_slots: int = 0) -> None:
        """The kernel that reads what `begin` gave is on its way."""
        self.number += 1
        self._steps.append(_Step(self.number, list(request_ids), num_slots))
        self._num_unread += 1

    @property
    def told(self) -> Tensor:
        """Where kernels of the last step that was launched write."""
        return self._told[self.number % NUM_STEPS]

    def find_defect(self) -> str | None:
        """What a step not asked about yet did wrong, as far as it has arrived."""
        self._read_packed()
        if self._told_here[:, 2].any():
            for step in self._steps:
                self._read_kept(step)
        defect, self._defect = self._defect, None
        return defect

    def _find(self, step: _Step, which: int) -> int | None:
        """A value that the step has told, if it has arrived."""
        number, value = divmod(int(self._told_here[step.number % NUM_STEPS, which]), 2**32)
        return value if number == step.number else None

    def _wait_for(self, step: _Step) -> None:
        """Until it has told what it packed."""
        end = time.monotonic() + PATIENCE_S
        while self._find(step, 1) is None:
            if time.monotonic() > end:
                torch.cuda.synchronize(self._device)  # raises if it has failed
                break
            time.sleep(20e-6)

    def _read_packed(self) -> None:
        while self._num_unread and not self._defect:  # another one waits for the next call
            step = self._steps[-self._num_unread]
            total, row = self._find(step, 0), self._find(step, 1)
            if total is None or row is None:
                return
            self._num_unread -= 1
            if step.num_slots:
                self._note_share(total / step.num_slots)
            if row != NO_ROW:
                self._note(step, row, "a candidate is not a token, or is over num_candidates")

    def _read_kept(self, step: _Step) -> None:
        row = self._find(step, 2)
        if row is not None and not self._defect:
            self._told_here[step.number % NUM_STEPS, 2] = 0
            self._note(step, row, "the committed token is not among its peeked candidates")

    def _note(self, step: _Step, row: int, what: str) -> None:
        self._defect = f"request {step.request_ids[row]!r}: {what}"
