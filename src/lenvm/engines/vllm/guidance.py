"""Guided decoding in vLLM: the logits processor behind the entry point `vllm.logits_processors`.

One class serves both of vLLM's interfaces: the V1 batch processor (0.25) and, in releases that have
it, the V2 runner's base class, which takes no V1 processor. It is inert where LENVM_MODEL is not
set, and for every request without `vllm_xargs: {"lenvm": "{...}"}`.
"""

import logging
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor

from lenvm.engines.settings import GuidanceSettings, check_version, read_control
from lenvm.engines.vllm import TESTED, sees_sign, show_sign
from lenvm.engines.vllm.request import check_config, read_request
from lenvm.errors import InputError, LenVMError

if TYPE_CHECKING:
    from torch import Tensor

    from lenvm.engines.adapter import Batch
    from lenvm.engines.vllm.rows import BatchRows
    from lenvm.engines.vllm.slots import BatchSlots

V2_INTERFACE = "vllm.v1.worker.gpu.sample.logits_processor.interface"
log = logging.getLogger(__name__)


def _bases() -> tuple[type, ...]:
    """vLLM's base classes that this release has: V1's, and V2's where there is one."""
    try:
        has_v2 = find_spec(V2_INTERFACE) is not None
    except ModuleNotFoundError:
        has_v2 = False
    v2 = (import_module(V2_INTERFACE).LogitsProcessor,) if has_v2 else ()
    return (LogitsProcessor, *v2)


class LengthGuidance(*_bases()):  # type: ignore[misc]  # one class of one or two bases
    """Length control for requests that ask for it."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Runs in the front end, before admission: ValueError is HTTP 400.

        A guided request gets one more stop token, by which it ends if its guidance fails: its
        `stop_reason` then is that token's id.
        """
        try:
            if read_control(sampling_params.extra_args) is None:
                return
            settings = GuidanceSettings.from_env()
            admission = read_request(sampling_params, settings, [0], [])
            assert settings is not None
            assert admission is not None
            settings.check(admission.guided)
            if not sees_sign():
                raise InputError(
                    "no worker of this vLLM guides: speculative decoding turns logits processors "
                    "off, and VLLM_PLUGINS may leave lenvm out; start without the first, with the "
                    "second, or send no lenvm"
                )
        except LenVMError as error:
            raise ValueError(str(error)) from error
        stops = sampling_params.stop_token_ids or []
        if settings.failure_token_id not in stops:
            sampling_params.stop_token_ids = [*stops, settings.failure_token_id]

    def __init__(self, vllm_config: Any, *interface: Any) -> None:
        """V1 passes (device, is_pin_memory), V2 its view of the requests' states."""
        self._rows: BatchRows | None = None
        self._slots: BatchSlots | None = None
        settings = GuidanceSettings.from_env()
        if settings is None:
            return
        check_version("vLLM", version("vllm"), TESTED, untested=settings.untested_engine)
        check_config(vllm_config, settings)
        is_v2 = len(interface) == 1
        device = interface[0].device if is_v2 else interface[0]
        batch = _build_batch(vllm_config, settings, device)
        if is_v2:
            from lenvm.engines.vllm import slots

            self._slots = slots.BatchSlots(batch, settings, interface[0])
        else:
            from lenvm.engines.vllm import rows

            self._rows = rows.BatchRows(batch, settings)
        show_sign()
        log.info("lenvm: length control by %s", settings.model)

    def is_argmax_invariant(self) -> bool:
        """V1: a greedy row's token may change."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: rows that were added, removed and moved since the last step."""
        if self._rows is not None and batch_update is not None:
            self._rows.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes a slot; whether this processor has to do with it."""
        return self._slots is not None and self._slots.add(req_idx, sampling_params)

    def remove_request(self, req_idx: int) -> None:
        """V2, where the runner says so: the request of a slot has left."""
        if self._slots is not None:
            self._slots.remove(req_idx)

    def apply(self, logits: "Tensor", ctx: Any = None) -> "Tensor":
        """Guided rows get their token, the others stay bit for bit."""
        if self._rows is not None:
            self._rows.apply(logits)
        elif self._slots is not None:
            self._slots.apply(logits, ctx)
        return logits


def _build_batch(vllm_config: Any, settings: GuidanceSettings, device: Any) -> "Batch":
    """The batch of this tensor-parallel rank; rank 0 loads the value model."""
    from lenvm.engines.adapter import FollowingBatch, GuidedBatch

    model, share = vllm_config.model_config, None
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        from vllm.distributed import get_tp_group

        group = get_tp_group()

        def share(tokens: "Tensor") -> "Tensor":
            shared: Tensor = group.broadcast(tokens.contiguous(), src=0)
            return shared

        if group.rank_in_group != 0:
            return FollowingBatch(share)
    tokenizer = None if model.skip_tokenizer_init else model.tokenizer
    session = settings.load_session(device, tokenizer=tokenizer)
    return GuidedBatch(session, seed=model.seed or 0, share=share)
