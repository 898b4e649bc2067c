"""Guided decoding in vLLM: a logits processor that maps vLLM's batch onto a `GuidedBatch`.

Written against vLLM 0.25.0: `vllm/v1/sample/logits_processor/interface.py` (the V1 interface),
`vllm/v1/worker/gpu_input_batch.py` and `gpu_model_runner.py` (who calls it, and when). Facts that
this file stands on:

* `update_state` runs once a step before the forward, `apply` after it, on all rows of the batch:
  after allowed_token_ids, bad_words, min_tokens, logit_bias and the grammar mask, before penalties,
  temperature, min_p, top-k and top-p. Penalties are therefore computed here.
* `output_token_ids` of a request is a live list. Under async scheduling it grows by -1, not by the
  token; a row whose token is thrown away (a chunk of a prompt) does not grow. Its length is all
  that is read of a running request.
* A preempted or unscheduled request leaves the batch and is added again with its real tokens.

With `--logits-processors` vLLM refuses speculative decoding and the V2 runner by itself.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)

from lenvm.engines.adapter import Admission, GuidedBatch, check_penalty
from lenvm.engines.settings import FIELD, GuidanceSettings, check_version, read_control
from lenvm.engines.vllm import TESTED
from lenvm.errors import InputError, LenVMError
from lenvm.guidance.session import Guided

log = logging.getLogger(__name__)


@dataclass
class _Row:
    request_id: str
    output_token_ids: list[int]
    """vLLM's own list; its length is what counts."""
    num_settled: int


class LengthGuidance(LogitsProcessor):
    """Length control for requests with `vllm_xargs: {"lenvm": "{...}"}`; inert for all others, and
    altogether where LENVM_MODEL is not set."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Runs in the front end, before admission: ValueError is HTTP 400.

        A guided request gets one more stop token, by which it ends if its guidance fails: its
        `stop_reason` then is that token's id.
        """
        try:
            settings = GuidanceSettings.from_env()
            admission = _read(sampling_params, settings, [0], [])
            if admission is None or settings is None:
                return
            settings.check(admission.guided)
        except LenVMError as error:
            raise ValueError(str(error)) from error
        stops = sampling_params.stop_token_ids or []
        if settings.failure_token_id not in stops:
            sampling_params.stop_token_ids = [*stops, settings.failure_token_id]

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.batch: GuidedBatch | None = None
        self._rows: dict[int, _Row] = {}
        self._num_added = 0
        settings = GuidanceSettings.from_env()
        if settings is None:
            return
        self._settings = settings
        check_version("vLLM", vllm.__version__, TESTED, untested=settings.untested_engine)
        check_config(vllm_config, settings)
        model = vllm_config.model_config
        session = settings.load_session(
            device, tokenizer=None if model.skip_tokenizer_init else model.tokenizer
        )
        tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
        self.batch = GuidedBatch(
            session, seed=model.seed or 0, agree=_agree if tensor_parallel > 1 else None
        )
        log.info("lenvm: length control by %s", settings.model)

    def is_argmax_invariant(self) -> bool:
        return False

    # -- vLLM's batch -----------------------------------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self.batch is None or batch_update is None:
            return
        for index, params, prompt, output in batch_update.added:
            self._leave(index)
            self._enter(index, params, prompt, output)
        for index in batch_update.removed:
            self._leave(index)
        for source, target, direction in batch_update.moved:
            first, second = self._rows.pop(source, None), self._rows.pop(target, None)
            if first is not None:
                self._rows[target] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = second
            elif second is not None:
                self.batch.remove(second.request_id)

    def apply(self, logits: Tensor) -> Tensor:
        if self.batch is None or not self._rows:
            return logits
        kept = []
        for row in self._rows.values():
            num_grown = len(row.output_token_ids) - row.num_settled
            if num_grown == 1:
                kept.append(row.request_id)
            elif num_grown:
                self.batch.fail(row.request_id, f"vLLM changed its tokens by {num_grown} at once")
            row.num_settled += num_grown
        self.batch.settle(kept)
        indices = sorted(self._rows)
        self.batch.step([self._rows[i].request_id for i in indices], indices, logits)
        return logits

    # -- inside -----------------------------------------------------------------------------------

    def _enter(
        self, index: int, params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> None:
        assert self.batch is not None
        if FIELD not in (params.extra_args or {}):
            return
        request_id = f"{index}#{self._num_added}"
        self._num_added += 1
        self._rows[index] = _Row(request_id, output, len(output))
        fault = None
        try:
            admission = _read(params, self._settings, prompt or [0], output)
            assert admission is not None
        except (
            LenVMError
        ) as error:  # checked before admission, so never, but never the engine's end
            admission, fault = Admission(Guided(prompt or [0])), str(error)
        if prompt is None:
            fault = "length control needs the prompt as tokens, not as embeddings"
        elif any(token < 0 for token in output):
            fault = "vLLM resumed it without its tokens"
        self.batch.add(request_id, admission)
        if fault is not None:
            self.batch.fail(request_id, fault)

    def _leave(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None and self.batch is not None:
            self.batch.remove(row.request_id)


def check_config(vllm_config: Any, settings: GuidanceSettings) -> None:
    """InputError for an engine configuration in which guidance would be wrong."""
    if vllm_config.speculative_config is not None:
        raise InputError("length control does not go with speculative decoding: turn one off")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise InputError(
            "length control does not go with pipeline parallelism: use tensor parallel"
        )
    seats = vllm_config.scheduler_config.max_num_seqs
    if seats > settings.max_requests:
        raise InputError(
            f"vLLM may run {seats} requests at a time, the value model {settings.max_requests}: "
            f"start with --max-num-seqs {settings.max_requests}, or LENVM_MAX_REQUESTS={seats}"
        )
    cache = vllm_config.cache_config
    share = cache.gpu_memory_utilization
    if cache.kv_cache_memory_bytes is None and share + settings.gpu_memory > 0.97:
        raise InputError(
            f"--gpu-memory-utilization {share} leaves no room for the value model's "
            f"{settings.gpu_memory} (LENVM_GPU_MEMORY): start with --gpu-memory-utilization "
            f"{max(0.05, 0.92 - settings.gpu_memory):.2f}"
        )


def _read(
    params: SamplingParams,
    settings: GuidanceSettings | None,
    prompt: list[int],
    output: list[int],
) -> Admission | None:
    """A request as guidance sees it; None without a control. LenVMError where it cannot be."""
    control = read_control(params.extra_args)
    if control is None:
        return None
    if settings is None:
        raise InputError(
            "this server has no value model: start it with LENVM_MODEL, or send no lenvm"
        )
    if params.thinking_token_budget is not None:
        raise InputError("length control does not go with thinking_token_budget")
    check_penalty("repetition_penalty", params.repetition_penalty)
    failure = settings.failure_token_id
    endings = {*(params.stop_token_ids or ()), params.eos_token_id} - {None, failure}
    return Admission(
        Guided(
            prompt_token_ids=prompt,
            control=control,
            temperature=params.temperature if params.temperature >= 1e-5 else 0.0,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            stop_token_ids=sorted(endings),
            generated_token_ids=tuple(output),
        ),
        seed=params.seed,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        failure_token_id=failure,
    )


def _agree(tokens: Tensor) -> Tensor:
    """Rank 0's tokens on every tensor-parallel rank."""
    from vllm.distributed import get_tp_group

    agreed: Tensor = get_tp_group().broadcast(tokens.contiguous(), src=0)
    return agreed
