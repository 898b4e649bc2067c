"""Guidance in vLLM 0.25's V2 model runner, which takes no logits processor yet.

vLLM falls back to its slower V1 runner wherever a processor is declared, for unguided requests,
too. With LENVM_VLLM_RUNNER=v2 none is declared; `hook` puts `LengthGuidance` where later releases
call a processor themselves. Written against vLLM 0.25.0: `v1/worker/gpu/model_runner.py`,
`v1/worker/gpu/sample/sampler.py`, `v1/engine/input_processor.py`. Facts that this file stands on:

* `GPUModelRunner.load_model` makes the sampler; another process' runner has none (`None`).
* `Sampler.add_request` is told the slot of every request that enters or comes back, and
  `RequestState.remove_request` gives the slot of one that ends or is preempted.
* `Sampler.__call__` gets the step's rows; `bad_words_state.apply_bad_words` is the last to change
  fp32 logits in place before temperature, after logit bias and penalties.
* `seq_lens_cpu_upper_bound` is exact without speculative decoding, which is refused.
* `InputProcessor._validate_params` sees the parameters of every request in the front end.

Where vLLM runs its V1 runner after all (its log says why), nothing here is called and no worker
shows its sign, so that a control is refused in the front end instead of being ignored.
"""

import functools
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from lenvm.errors import InputError

HOOKS = {
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"): ("load_model",),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler"): ("add_request", "__call__"),
    ("vllm.v1.engine.input_processor", "InputProcessor"): ("_validate_params",),
    ("vllm.v1.worker.gpu.states", "RequestState"): ("remove_request",),
}
"""What is wrapped, by (module, class): of the classes, or of the one object that the worker has."""


def hook() -> None:
    """Wrap the methods of HOOKS, once a process. InputError where this vLLM lacks one."""
    classes: dict[str, Any] = {}
    for (module, name), methods in HOOKS.items():
        found = getattr(import_module(module), name, None)
        missing = [m for m in methods if m not in vars(found or object)]
        if missing:
            raise InputError(
                f"this vLLM has no {module}.{name}.{missing[0]}: leave LENVM_VLLM_RUNNER=v2 out"
            )
        classes[name] = found
    runner, sampler = classes["GPUModelRunner"], classes["Sampler"]
    if hasattr(runner.load_model, "__wrapped__"):
        return
    _wrap(runner, "load_model", _after_load)
    _wrap(classes["InputProcessor"], "_validate_params", _after_validation)
    call = sampler.__call__

    @functools.wraps(call)
    def remember_the_step(self: Any, logits: Any, input_batch: Any) -> Any:
        if (guide := getattr(self, "lenvm", None)) is not None:
            guide.step = input_batch
        return call(self, logits, input_batch)

    sampler.__call__ = remember_the_step


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


def _after_validation(_: Any, params: Any, *__: Any) -> None:
    from vllm import SamplingParams

    from lenvm.engines.vllm.guidance import LengthGuidance

    if isinstance(params, SamplingParams):
        LengthGuidance.validate_params(params)


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
