"""SGLang's batch mapped onto a `GuidedBatch`, and its requests as guidance sees them.

Written against SGLang 0.5.15: `managers/schedule_batch.py` (Req), `model_executor/model_runner.py`
(`sample`), `layers/sampler.py`. Facts that this file stands on:

* Logits come with penalties, grammar mask and logit_bias, before temperature and truncation.
* With overlap scheduling a request's `output_ids` lag behind by a token; the batch's `seq_lens_cpu`
  do not. They count the tokens before the one to be drawn, cached prefixes included, so neither
  the radix cache nor chunks of a prompt change them.
* A row with fewer tokens than the request has is a chunk of its prompt: its token is thrown away.
* A retracted request loses what is in flight and comes back as a prefill of what it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lenvm.engines.adapter import Admission, Batch
from lenvm.engines.settings import FIELD, GuidanceSettings, read_control
from lenvm.errors import InputError, LenVMError
from lenvm.guidance.params import Guided

TOP_K_ALL = 1 << 30
"""SGLang's "no limit"."""


@dataclass
class _Known:
    req: Any
    request_id: str
    length: int
    """Tokens before the last draw."""


class RequestRows:
    """The guided requests of one scheduler process."""

    def __init__(self, batch: Batch, settings: GuidanceSettings) -> None:
        self.batch, self.settings = batch, settings
        self._known: dict[str, _Known] = {}
        self._num_added = 0

    def sweep(self) -> None:
        """Free the cache of requests that ended or were retracted. Runs at every step."""
        gone = [r for r, k in self._known.items() if k.req.finished() or k.req.is_retracted]
        for rid in gone:
            self.batch.remove(self._known.pop(rid).request_id)

    def apply(
        self, logits_BV: Tensor, rows: Sequence[tuple[int, Any]], lengths: Sequence[int]
    ) -> None:
        """Draw for these rows (row, Req) in place. lengths [B]: tokens before the draw."""
        self.sweep()
        self.batch.settle([known.request_id for known in self._known.values()])
        drawing: list[tuple[int, str]] = []
        for row, req in rows:
            known = self._known.get(req.rid)
            num_tokens = len(req.origin_input_ids) + len(req.output_ids)
            if known is not None and lengths[row] == known.length + 1:
                known.length += 1
            elif lengths[row] < num_tokens:
                continue
            else:
                known = self._enter(req, lengths[row], num_tokens)
            drawing.append((row, known.request_id))
        self.batch.step([name for _, name in drawing], [row for row, _ in drawing], logits_BV)

    def abort(self, request_id: str, make: Any) -> None:
        """End a request in SGLang too: `make()` is its reason to finish."""
        for known in self._known.values():
            if known.request_id == request_id:
                known.req.to_finish = make()

    def _enter(self, req: Any, length: int, num_tokens: int) -> _Known:
        if req.rid in self._known:
            self.batch.remove(self._known.pop(req.rid).request_id)
        known = self._known[req.rid] = _Known(req, f"{req.rid}#{self._num_added}", length)
        self._num_added += 1
        fault = None
        try:
            admission = read_request(req, self.settings)
        except LenVMError as error:  # the front end has checked it; still never the engine's end
            admission, fault = Admission(Guided(list(req.origin_input_ids))), str(error)
        if length != num_tokens:
            fault = f"SGLang resumed it at {length} tokens, with {num_tokens} at hand"
        self.batch.add(known.request_id, admission)
        if fault is not None:
            self.batch.fail(known.request_id, fault)
        return known


def read_request(req: Any, settings: GuidanceSettings) -> Admission:
    """A request (SGLang's Req) as guidance sees it. LenVMError where it cannot be.

    SGLang writes temperature 0 as top_k 1, and so is top_k 1 read here.
    """
    params = req.sampling_params
    control = read_control(params.custom_params)
    failure = settings.failure_token_id
    endings: set[int] = set()
    if not params.ignore_eos:
        endings |= set(params.stop_token_ids or ()) | set(req.eos_token_ids or ())
        if req.tokenizer is not None:
            endings |= {req.tokenizer.eos_token_id} - {None}
            endings |= set(getattr(req.tokenizer, "additional_stop_token_ids", None) or ())
    is_greedy = params.top_k == 1
    return Admission(
        Guided(
            prompt_token_ids=list(req.origin_input_ids),
            control=control,
            temperature=0.0 if is_greedy else params.temperature,
            top_k=0 if is_greedy or params.top_k >= TOP_K_ALL else params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            stop_token_ids=sorted(endings - {failure}),
            generated_token_ids=tuple(req.output_ids),
        ),
        seed=params.sampling_seed,
        failure_token_id=failure,
    )


def check_sampling(sampling: dict[str, Any], settings: GuidanceSettings) -> dict[str, Any] | None:
    """The request's sampling parameters as they go to the scheduler, None where it has no control.

    Runs in the front end, before admission. The control goes on as JSON text (SGLang's wire takes
    no nested objects), and the failure token is one more stop token. LenVMError is HTTP 400.
    """
    custom = sampling.get("custom_params")
    control = read_control(custom if isinstance(custom, dict) else None)
    if control is None or not isinstance(custom, dict):
        return None
    top_k = sampling.get("top_k") or 0
    settings.check(
        Guided(
            [0],
            control=control,
            top_k=top_k if 1 < top_k < TOP_K_ALL else 0,
            top_p=sampling.get("top_p") or 1.0,
            min_p=sampling.get("min_p") or 0.0,
        )
    )
    if sampling.get("custom_logit_processor"):
        raise InputError("length control does not go with a processor of the request's own")
    stops = [*(sampling.get("stop_token_ids") or ()), settings.failure_token_id]
    text = control.model_dump_json(exclude_defaults=True)
    return {**sampling, "custom_params": {**custom, FIELD: text}, "stop_token_ids": stops}
