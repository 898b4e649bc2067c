"""Several in-process engines, each in a process of its own, that answer one stream of requests.

One engine's step is bound by Python's bookkeeping of its rows, long before the GPU is: processes
share a GPU, or take one each. `EngineReplicas.generate` is `TransformersEngine.generate`.
"""

import multiprocessing
import queue
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lenvm.engines.request import Completion, Request
from lenvm.engines.transformers import TransformersEngine
from lenvm.errors import LenVMError
from lenvm.model.bundled import resolve_model
from lenvm.model.tokenization import find_eos_token_ids, load_tokenizer
from lenvm.model.value_model import LengthValueModel

STARTUP_S = 300.0


@dataclass(frozen=True)
class EngineSpec:
    """What a process needs to load its engine. `value_model`: arguments of
    `LengthValueModel.from_pretrained`, without dtype and device. `options`: of
    `TransformersEngine`; its budgets are those of one replica."""

    generator: str
    value_model: dict[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, device: str) -> TransformersEngine:
        """The engine, in this process."""
        value_model = None
        if self.value_model is not None:
            value_model = LengthValueModel.from_pretrained(
                **self.value_model, dtype=self.dtype, device=device
            )
            value_model.head.float()
        return TransformersEngine.load(
            self.generator, value_model, dtype=self.dtype, device=device, **self.options
        )


class EngineReplicas:
    """`len(devices)` engines. Not thread-safe. `close` ends the processes."""

    def __init__(self, spec: EngineSpec, devices: Sequence[str]) -> None:
        """devices: one replica for each, `["cuda:0"] * 3` for three on one GPU.

        Raises LenVMError where a replica cannot start."""
        path = resolve_model(spec.generator)  # converted once, here
        self.tokenizer = load_tokenizer(path)
        self.eos_token_ids = find_eos_token_ids(path, self.tokenizer)
        self.max_requests = int(spec.options["max_requests"])
        context = multiprocessing.get_context("spawn")
        self._answers: Any = context.Queue()
        self._inputs: list[Any] = [context.SimpleQueue() for _ in devices]
        self._processes = [
            context.Process(
                target=_serve, args=(i, spec, device, self._inputs[i], self._answers), daemon=True
            )
            for i, device in enumerate(devices)
        ]
        for process in self._processes:
            process.start()
        self._guidance_s = [0.0] * len(devices)
        facts = [self._receive(STARTUP_S)[1] for _ in devices]
        self.max_tokens, self.max_length = facts[0]["max_tokens"], facts[0]["max_length"]
        self.head: str | None = facts[0]["head"]

    @property
    def guidance_s(self) -> float:
        """Time spent in guidance, the mean over the replicas."""
        return sum(self._guidance_s) / len(self._guidance_s)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Run requests to their end; completions come in the order in which they finish.

        Requests are drawn from the iterable as room appears. Those with the prompt of the one
        before go to the same replica while it has room: it computes their prompt once."""
        source, exhausted = iter(requests), False
        load = [0] * len(self._inputs)
        where: dict[str, int] = {}
        last: tuple[tuple[int, ...], int] = ((), 0)
        while True:
            while not exhausted and min(load) < self.max_requests:
                request = next(source, None)
                if request is None:
                    exhausted = True
                    break
                prompt, index = last
                if prompt != request.prompt_token_ids or load[index] >= self.max_requests:
                    index = load.index(min(load))
                last = request.prompt_token_ids, index
                load[index] += 1
                where[request.id] = index
                self._inputs[index].put(request)
            if exhausted and not where:
                return
            _, completions = self._receive(None)
            for completion in completions:
                load[where.pop(completion.request.id)] -= 1
                yield completion

    def close(self) -> None:
        """End the processes; what they run is dropped."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def _receive(self, timeout_s: float | None) -> tuple[int, Any]:
        waited = 0.0
        while True:
            try:
                index, answer, guidance_s = self._answers.get(timeout=1.0)
                break
            except queue.Empty:
                waited += 1.0
            dead = [p for p in self._processes if p.exitcode is not None]
            if dead or (timeout_s is not None and waited > timeout_s):
                self.close()
                why = f"exit code {dead[0].exitcode}" if dead else f"no answer in {timeout_s:.0f} s"
                raise LenVMError(f"a replica of the engine ended: {why}; its log says more")
        if isinstance(answer, str):
            self.close()
            raise LenVMError(f"a replica of the engine failed: {answer}")
        self._guidance_s[index] = guidance_s
        return index, answer


def _serve(index: int, spec: EngineSpec, device: str, requests: Any, answers: Any) -> None:
    """A replica's process: takes requests, sends completions as they finish."""
    torch.set_num_threads(1)
    if ":" in device:
        torch.cuda.set_device(device)
    try:
        engine = spec.load(device)
        facts: dict[str, Any] = {"max_tokens": engine.max_tokens, "max_length": engine.max_length}
        facts["head"] = engine.head
        answers.put((index, facts, 0.0))
        while True:
            while not engine.num_unfinished or not requests.empty():
                engine.submit(requests.get())
            if done := [c for c in engine.step() if c.finish_reason is not None]:
                for completion in done:
                    completion.stream = None  # holds the tokenizer
                    if completion.error is not None:  # some errors do not travel
                        completion.error = LenVMError(str(completion.error))
                answers.put((index, done, engine.guidance_s))
    except Exception as error:  # the parent raises it
        answers.put((index, f"{type(error).__name__}: {error}", 0.0))
        raise
