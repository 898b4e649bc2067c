"""Guidance in vLLM 0.25's V2 model runner, which takes no logits processor yet.

vLLM falls back to its slower V1 runner wherever a processor is declared, for unguided requests,
too. `hook` puts `LengthGuidance` where later releases call a processor themselves, and takes lenvm
off the list of what V2 does not support. Where vLLM runs V1 all the same (other processors, models
that need it, VLLM_USE_V2_MODEL_RUNNER=0, or tensor parallelism, which was run with V1 alone),
lenvm is its processor. Written against vLLM 0.25.0: `config/vllm.py`,
`v1/worker/gpu/model_runner.py`, `v1/worker/gpu/sample/sampler.py`. Facts that this file stands on:

* `VllmConfig.use_v2_model_runner` asks `_get_v2_model_runner_unsupported_features`, in every
  process, after the plugins are loaded. "custom logits processors" stands for entry points and
  for --logits-processors alike.
* `SamplingParams.verify` validates with the declared processors' classes, whatever runs.
* `GPUModelRunner.load_model` makes the sampler; another process' runner has none (`None`).
* `Sampler.add_request` is told the slot of every request that enters or comes back, and
  `RequestState.remove_request` gives the slot of one that ends or is preempted.
* `Sampler.__call__` gets the step's rows; `bad_words_state.apply_bad_words` is the last to change
  fp32 logits in place before temperature, after logit bias and penalties.
* `seq_lens_cpu_upper_bound` is exact without speculative decoding, which is refused.
"""

import functools
from importlib import import_module
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

from lenvm.engines.vllm import PROCESSOR

HOOKS = {
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"): ("load_model",),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler"): ("add_request", "__call__"),
    ("vllm.config.vllm", "VllmConfig"): ("_get_v2_model_runner_unsupported_features",),
    ("vllm.v1.worker.gpu.states", "RequestState"): ("remove_request",),
}
"""What is wrapped, by (module, class): of the classes, or of the one object that the worker has."""
PROCESSORS = "custom logits processors"
"""What vLLM says that V2 does not support where a processor is declared."""


def hook() -> bool:
    """Wrap the methods of HOOKS, once a process. False, and nothing is wrapped, where this vLLM
    lacks one: it runs V1 then."""
    classes: dict[str, Any] = {}
    for (module, name), methods in HOOKS.items():
        try:
            found = getattr(import_module(module), name)
        except Exception:  # moved, or not for this platform
            return False
        if not all(method in vars(found) for method in methods):
            return False
        classes[name] = found
    runner, sampler = classes["GPUModelRunner"], classes["Sampler"]
    if hasattr(runner.load_model, "__wrapped__"):
        return True
    _wrap(runner, "load_model", _after_load)
    features = classes["VllmConfig"]._get_v2_model_runner_unsupported_features

    @functools.wraps(features)
    def unsupported_features(self: Any) -> list[str]:
        found: list[str] = features(self)
        if PROCESSORS in found and _is_alone(self):
            found.remove(PROCESSORS)
        return found

    classes["VllmConfig"]._get_v2_model_runner_unsupported_features = unsupported_features
    call = sampler.__call__

    @functools.wraps(call)
    def remember_the_step(self: Any, logits: Any, input_batch: Any) -> Any:
        if (guide := getattr(self, "lenvm", None)) is not None:
            guide.step = input_batch
        return call(self, logits, input_batch)

    sampler.__call__ = remember_the_step
    return True


def _is_alone(vllm_config: Any) -> bool:
    """Whether lenvm is the only processor, in a configuration that it guides V2 in."""
    declared = entry_points(group="vllm.logits_processors")
    return (
        all(entry.value == PROCESSOR for entry in declared)
        and not vllm_config.model_config.logits_processors
        and vllm_config.parallel_config.tensor_parallel_size == 1
    )


def _wrap(cls: Any, name: str, after: Any) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **more: Any) -> Any:
        result = original(self, *args, **more)
        after(self, *args)
        return result

    setattr(cls, name, wrapped)


def _after_load(runner: Any, *_: Any) -> None:
    if getattr(runner, "sampler", None) is not None:
        runner.sampler.lenvm = SamplerGuide(runner)


class SamplerGuide:
    """Guidance of one runner, called from inside its sampler."""

    def __init__(self, runner: Any) -> None:
        from lenvm.engines.vllm.guidance import LengthGuidance

        self.guidance = LengthGuidance(runner.vllm_config, runner.req_states)
        self.step: Any = None
        """The InputBatch of the step that is being sampled."""
        sampler = runner.sampler
        add, bad_words = sampler.add_request, sampler.bad_words_state.apply_bad_words
        remove = runner.req_states.remove_request

        @functools.wraps(add)
        def add_request(index: int, prompt_len: int, params: Any) -> None:
            add(index, prompt_len, params)
            self.guidance.add_request(index, params)

        @functools.wraps(bad_words)
        def apply_bad_words(logits: Any, *args: Any, **more: Any) -> None:
            bad_words(logits, *args, **more)
            self._apply(logits)

        @functools.wraps(remove)
        def remove_request(request_id: str) -> int | None:
            index: int | None = remove(request_id)
            if index is not None:
                self.guidance.remove_request(index)
            return index

        runner.req_states.remove_request = remove_request
        sampler.add_request = add_request
        sampler.bad_words_state.apply_bad_words = apply_bad_words

    def _apply(self, logits_BV: Any) -> None:
        step = self.step
        lengths = step.seq_lens_cpu_upper_bound[: len(step.idx_mapping_np)].numpy()
        context = SimpleNamespace(
            idx_mapping_np=step.idx_mapping_np, seq_lens_upper_bound_np=lengths
        )
        self.guidance.apply(logits_BV, context)
