"""vLLM's batch as the V2 model runner describes it: slots, and which of them step.

Written against the V2 base class of vLLM's main branch after 0.25,
`v1/worker/gpu/sample/logits_processor/interface.py`. Facts that this file stands on:

* `apply` runs after logit_bias, penalties, bad words and the grammar mask, before temperature,
  min_p, top-k and top-p: logits come with their penalties.
* A request keeps its slot. The interface does not say when it leaves (0.25's runner does, see
  runner.py); its slot is given to another one, or is seen no more. A preempted request comes back
  by `add_request` with what it has generated.
* Tokens stand on the device (`all_token_ids`): they are read once, at a request's first draw.
* `seq_lens_upper_bound_np` counts the tokens before the one to be drawn, on the host; below
  `prefill_len` the row is a chunk of a prompt and its token is thrown away.

A request's cache is freed when its slot is taken or was absent for MAX_ABSENT steps; one that comes
back after that is prefilled again.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lenvm.engines.adapter import Admission, Batch
from lenvm.engines.settings import FIELD, GuidanceSettings
from lenvm.engines.vllm.request import read_request
from lenvm.errors import LenVMError
from lenvm.guidance.params import Guided

MAX_ABSENT = 8


@dataclass
class _Slot:
    params: Any
    request_id: str | None = None
    """None: not in the batch of guidance yet, or no longer."""
    length: int = 0
    """Tokens before the last draw."""
    last_step: int = 0


class BatchSlots:
    """The guided slots of the V2 runner."""

    def __init__(self, batch: Batch, settings: GuidanceSettings, req_states: Any) -> None:
        self.batch, self.settings, self.req_states = batch, settings, req_states
        self._slots: dict[int, _Slot] = {}
        self._num_added = self._num_steps = 0

    def add(self, index: int, params: Any) -> bool:
        """A request takes a slot; whether it is guided."""
        self.remove(index)
        if FIELD not in (params.extra_args or {}):
            return False
        self._slots[index] = _Slot(params)
        return True

    def remove(self, index: int) -> None:
        """The request of a slot is over, or will come back anew."""
        old = self._slots.pop(index, None)
        if old is not None and old.request_id is not None:
            self.batch.remove(old.request_id)

    def apply(self, logits_BV: Tensor, context: Any) -> None:
        """Draw for the guided slots of this step, in place."""
        if not self._slots:
            return
        self._num_steps += 1
        # every token drawn here is kept, also of a request that now sits out a step
        self.batch.settle([s.request_id for s in self._slots.values() if s.request_id is not None])
        rows: list[tuple[int, _Slot]] = []
        for row, index in enumerate(context.idx_mapping_np.tolist()):
            slot = self._slots.get(index)
            length = int(context.seq_lens_upper_bound_np[row])
            if slot is None or length < int(self.req_states.prefill_len.np[index]):
                continue
            if slot.request_id is not None and length != slot.length + 1:
                self._drop(slot)  # not what was drawn here: its tokens are read anew
            if slot.request_id is None:
                self._enter(index, slot, length)
            slot.length, slot.last_step = length, self._num_steps
            rows.append((row, slot))
        for slot in self._slots.values():
            if slot.request_id is not None and self._num_steps - slot.last_step > MAX_ABSENT:
                self._drop(slot)
        ids = [slot.request_id for _, slot in rows if slot.request_id is not None]
        self.batch.step(ids, [row for row, _ in rows], logits_BV)

    def _enter(self, index: int, slot: _Slot, length: int) -> None:
        states = self.req_states
        tokens = states.all_token_ids.gpu[index, :length].tolist()
        num_prompt = int(states.prompt_len.np[index])
        prompt, output = tokens[:num_prompt], tokens[num_prompt:]
        slot.request_id = f"{index}#{self._num_added}"
        self._num_added += 1
        fault = None
        try:
            admission = read_request(slot.params, self.settings, prompt, output, is_penalised=True)
        except LenVMError as error:  # the front end has checked it; still never the engine's end
            admission, fault = None, str(error)
        ending = self.settings.failure_token_id
        self.batch.add(slot.request_id, admission or Admission(Guided(prompt), None, ending))
        if fault is not None:
            self.batch.fail(slot.request_id, fault)

    def _drop(self, slot: _Slot) -> None:
        assert slot.request_id is not None
        self.batch.remove(slot.request_id)
        slot.request_id = None
