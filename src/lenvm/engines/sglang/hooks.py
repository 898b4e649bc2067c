"""The five hooks, registered with SGLang's own hook registry.

| target | what |
|---|---|
| TokenizerManager._create_tokenized_object | front end: checks controls (HTTP 400), names our processor, refuses pickles |
| ModelRunner.initialize | worker: loads the value model, refuses what would be wrong |
| ModelRunner.sample | worker: says which batch the coming logits are of |
| sampler.apply_custom_logit_processor | worker: guided rows get their token |
| CustomLogitProcessor.from_str | worker: our name is looked up, nothing is unpickled |
"""  # noqa: E501

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from lenvm.engines.settings import FIELD, GuidanceSettings
from lenvm.engines.sglang import PROCESSOR
from lenvm.errors import InputError, LenVMError

log = logging.getLogger(__name__)
TARGETS = {
    "create": "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
    "initialize": "sglang.srt.model_executor.model_runner.ModelRunner.initialize",
    "sample": "sglang.srt.model_executor.model_runner.ModelRunner.sample",
    "apply": "sglang.srt.layers.sampler.apply_custom_logit_processor",
    "from_str": "sglang.srt.sampling.custom_logit_processor.CustomLogitProcessor.from_str",
}


class Worker:
    """What a scheduler process knows: its guided requests, and the batch being sampled."""

    rows: Any = None
    forward_batch: Any = None


class NamedProcessor:
    """What SGLang keeps per batch in place of a processor: `apply` does the work."""

    def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
        return logits


NAMED = NamedProcessor()


def register() -> None:
    """Hand the hooks to SGLang. ImportError where a target is not there."""
    import pkgutil

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target in TARGETS.values():
        owner, _, name = target.rpartition(".")
        if not hasattr(pkgutil.resolve_name(owner), name):
            raise ImportError(f"this SGLang has no {target}")
    HookRegistry.register(TARGETS["create"], before_create, HookType.BEFORE)
    HookRegistry.register(TARGETS["initialize"], after_initialize, HookType.AFTER)
    HookRegistry.register(TARGETS["sample"], before_sample, HookType.BEFORE)
    HookRegistry.register(TARGETS["apply"], around_apply, HookType.AROUND)
    HookRegistry.register(TARGETS["from_str"], around_from_str, HookType.AROUND)


def before_create(manager: Any, obj: Any, *_rest: Any, **_more: Any) -> None:
    """A request on its way to the scheduler. ValueError is HTTP 400."""
    if not hasattr(obj, "custom_logit_processor"):  # not a request to generate
        return
    if obj.custom_logit_processor and obj.custom_logit_processor != PROCESSOR:
        raise ValueError(
            "this server takes no custom_logit_processor from requests: it would run their code"
        )
    settings = GuidanceSettings.from_env()
    assert settings is not None
    obj.custom_logit_processor = None
    try:
        from lenvm.engines.sglang.requests import check_sampling

        sampling = check_sampling(dict(obj.sampling_params or {}), settings)
        if sampling is None:
            return
        if not manager.server_args.enable_custom_logit_processor:
            raise InputError("start the server with --enable-custom-logit-processor")
        if getattr(obj, "input_embeds", None) is not None or getattr(obj, "image_data", None):
            raise InputError("length control needs the prompt as text or tokens")
    except LenVMError as error:
        raise ValueError(str(error)) from error
    obj.sampling_params, obj.custom_logit_processor = sampling, PROCESSOR


def after_initialize(_result: Any, runner: Any, *_rest: Any, **_more: Any) -> None:
    """The generator stands on the device: load the value model beside it."""
    if runner.is_draft_worker or not runner.is_generation:
        return
    settings = GuidanceSettings.from_env()
    assert settings is not None
    check_server(runner, settings)
    import torch

    from lenvm.engines.adapter import FollowingBatch, GuidedBatch
    from lenvm.engines.sglang.requests import RequestRows

    args, share = runner.server_args, None
    if runner.tp_size > 1:
        share = _build_share()
    if runner.tp_rank != 0:
        assert share is not None
        Worker.rows = RequestRows(FollowingBatch(share), settings)
        return
    is_cuda = runner.device == "cuda"
    device = torch.device(f"cuda:{runner.gpu_id}" if is_cuda else runner.device)
    tokenizer = None if args.skip_tokenizer_init else args.tokenizer_path
    session = settings.load_session(device, tokenizer=tokenizer)
    batch = GuidedBatch(session, seed=args.random_seed or 0, share=share)
    Worker.rows = RequestRows(batch, settings)
    if share is None:  # several ranks must not part; there a failed request ends by its token
        batch.on_failure = _abort
    log.info("lenvm: length control by %s", settings.model)


def check_server(runner: Any, settings: GuidanceSettings) -> None:
    """InputError for a server in which guidance would be wrong."""
    args = runner.server_args
    if args.speculative_algorithm:
        raise InputError("length control does not go with speculative decoding: turn one off")
    if runner.pp_size > 1 or args.enable_dp_attention:
        raise InputError(
            "length control does not go with pipeline parallelism or data-parallel attention: "
            "use --tp-size alone"
        )
    if args.disaggregation_mode != "null":
        raise InputError("length control does not go with disaggregated prefill")
    if not args.enable_custom_logit_processor:
        raise InputError(
            "length control needs --enable-custom-logit-processor (requests still bring no code)"
        )
    seats = args.max_running_requests
    if seats is None or seats > settings.max_requests:
        raise InputError(
            f"SGLang may run {seats or 'any number of'} requests at a time, the value model "
            f"{settings.max_requests}: start with --max-running-requests {settings.max_requests}"
        )


def before_sample(runner: Any, _logits_output: Any, forward_batch: Any) -> None:
    """The logits that come next are of this batch."""
    if Worker.rows is not None and not runner.is_draft_worker:
        Worker.forward_batch = forward_batch
        if not forward_batch.sampling_info.has_custom_logit_processor:
            Worker.rows.sweep()


def around_apply(
    original: Callable[..., None], logits: Any, sampling_info: Any, *rest: Any, **more: Any
) -> None:
    """Guided rows get their token, in place; nothing waits for the device."""
    forward_batch, Worker.forward_batch = Worker.forward_batch, None
    if Worker.rows is None or forward_batch is None:
        return original(logits, sampling_info, *rest, **more)
    rows = [
        (row, params["__req__"])
        for row, params in enumerate(sampling_info.custom_params)
        if params is not None and params.get(FIELD) is not None
    ]
    lengths = forward_batch.seq_lens_cpu
    Worker.rows.apply(logits, rows, lengths.tolist())
    return None


def around_from_str(original: Callable[..., Any], _cls: Any, text: str) -> Any:
    """Our processor by its name. The front end lets no other text through."""
    return NAMED if text == PROCESSOR else original(_cls, text)


def _abort(request_id: str, reason: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    message = f"length control failed: {reason}"
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    Worker.rows.abort(request_id, lambda: FINISH_ABORT(message, status, "InternalServerError"))


def _build_share() -> Callable[[Any], Any]:
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return lambda tokens: group.broadcast(tokens.contiguous(), src=0)
