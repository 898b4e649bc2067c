"""vLLM's batch as the V1 model runner describes it: rows that requests enter, leave and change.

Written against vLLM 0.25.0, `v1/worker/gpu_input_batch.py` and `gpu_model_runner.py`. Facts that
this file stands on:

* `update_state` runs once a step before the forward, `apply` after it, on all rows of the batch:
  after allowed_token_ids, bad_words, min_tokens, logit_bias and the grammar mask, before penalties,
  temperature, min_p, top-k and top-p. Penalties are therefore computed by the `GuidedBatch`.
* `output_token_ids` of a request is a live list. Under async scheduling it may grow by -1, not by
  the token; a row whose token is thrown away (a chunk of a prompt) does not grow. Its length is all
  that is read of a running request.
* A preempted request leaves the batch and is added again with its real tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lenvm.engines.adapter import Admission, Batch
from lenvm.engines.settings import FIELD, GuidanceSettings
from lenvm.engines.vllm.request import read_request
from lenvm.errors import LenVMError
from lenvm.guidance.params import Guided


@dataclass
class _Row:
    request_id: str
    output_token_ids: list[int]
    """vLLM's own list; its length is what counts."""
    num_settled: int


class BatchRows:
    """The guided rows of vLLM's persistent batch."""

    def __init__(self, batch: Batch, settings: GuidanceSettings) -> None:
        self.batch, self.settings = batch, settings
        self._rows: dict[int, _Row] = {}
        self._num_added = 0

    def update(self, update: Any) -> None:
        """Follow vLLM's BatchUpdate: added, removed, moved."""
        for index, params, prompt, output in update.added:
            self._leave(index)
            self._enter(index, params, prompt, output)
        for index in update.removed:
            self._leave(index)
        for source, target, direction in update.moved:
            first, second = self._rows.pop(source, None), self._rows.pop(target, None)
            if first is not None:
                self._rows[target] = first
            if second is not None and direction.name == "SWAP":
                self._rows[source] = second
            elif second is not None:
                self.batch.remove(second.request_id)

    def apply(self, logits_BV: Tensor) -> None:
        """Draw for the guided rows, in place."""
        if not self._rows:
            return
        kept = []
        for row in self._rows.values():
            num_tokens, before = len(row.output_token_ids), row.num_settled
            row.num_settled = num_tokens
            if num_tokens == before + 1:
                kept.append(row.request_id)
            elif num_tokens != before:
                reason = f"vLLM changed its tokens by {num_tokens - before} at once"
                self.batch.fail(row.request_id, reason)
        self.batch.settle(kept)
        indices = sorted(self._rows)
        self.batch.step([self._rows[i].request_id for i in indices], indices, logits_BV)

    def _enter(self, index: int, params: Any, prompt: list[int] | None, output: list[int]) -> None:
        if FIELD not in (params.extra_args or {}):
            return
        request_id = f"{index}#{self._num_added}"
        self._num_added += 1
        self._rows[index] = _Row(request_id, output, len(output))
        fault = None
        try:
            admission = read_request(params, self.settings, prompt or [0], output)
        except LenVMError as error:  # the front end has checked it; still never the engine's end
            admission, fault = None, str(error)
        if prompt is None:
            fault = "length control needs the prompt as tokens, not as embeddings"
        elif any(token < 0 for token in output):
            fault = "vLLM resumed it without its tokens"
        ending = self.settings.failure_token_id
        self.batch.add(
            request_id, admission or Admission(Guided(prompt or [0]), failure_token_id=ending)
        )
        if fault is not None:
            self.batch.fail(request_id, fault)

    def _leave(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            self.batch.remove(row.request_id)
