"""vLLM's requests and configuration as guidance sees them, and what is refused, with a reason."""

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from lenvm.engines.settings import GuidanceSettings, read_control
from lenvm.engines.vllm import PROCESSOR
from lenvm.errors import InputError

if TYPE_CHECKING:
    from lenvm.engines.adapter import Admission

GREEDY_BELOW = 1e-5
"""vLLM's `_SAMPLING_EPS`."""


def read_request(
    params: Any,
    settings: GuidanceSettings | None,
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    is_penalised: bool = False,
) -> "Admission | None":
    """A request as guidance sees it; None without a control. LenVMError where it cannot be.

    params: vLLM's SamplingParams. is_penalised: its penalties are in the logits already.
    """
    control = read_control(params.extra_args)
    if control is None:
        return None
    if settings is None:
        raise InputError(
            "this server has no value model: start it with LENVM_MODEL, or send no lenvm"
        )
    if params.thinking_token_budget is not None:
        raise InputError("length control does not go with thinking_token_budget: leave one out")
    if params.repetition_penalty <= 0:
        raise InputError(
            f"repetition_penalty is {params.repetition_penalty}; with a length control it must be "
            "over 0"
        )
    from lenvm.engines.adapter import Admission
    from lenvm.guidance.params import Guided

    failure = settings.failure_token_id
    endings = {*(params.stop_token_ids or ()), params.eos_token_id} - {None, failure}
    penalties = {
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "repetition_penalty": params.repetition_penalty,
    }
    return Admission(
        Guided(
            prompt_token_ids=prompt,
            control=control,
            temperature=params.temperature if params.temperature >= GREEDY_BELOW else 0.0,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            stop_token_ids=sorted(endings),
            generated_token_ids=tuple(output),
        ),
        seed=params.seed,
        failure_token_id=failure,
        **({} if is_penalised else penalties),
    )


def is_installed() -> bool:
    """Whether vLLM finds the processor by its entry point."""
    return any(e.value == PROCESSOR for e in entry_points(group="vllm.logits_processors"))


def check_config(vllm_config: Any, settings: GuidanceSettings) -> None:
    """InputError for an engine configuration in which guidance would be wrong."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise InputError("length control does not go with speculative decoding: turn one off")
    if PROCESSOR in (model.logits_processors or ()) and is_installed():
        raise InputError(
            "vLLM would load the value model twice, by lenvm's entry point and by "
            "--logits-processors: leave the flag out"
        )
    if parallel.pipeline_parallel_size > 1:
        raise InputError(
            "length control does not go with pipeline parallelism: use --tensor-parallel-size"
        )
    if model.is_multimodal_model and not model.multimodal_config.language_model_only:
        raise InputError(
            f"{model.model} takes images, which the value model does not get: start with "
            "--language-model-only"
        )
    if settings.failure_token_id >= model.get_vocab_size():
        raise InputError(
            f"the value model knows {settings.failure_token_id + 1} tokens, the generator "
            f"{model.get_vocab_size()}: they are not of one family"
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
