"""Machines that play vLLM's workers: they call a logits processor as vLLM 0.25.0 (V1) and its main
branch (V2) do, step by step, and sample after it in vLLM's order.

What they play was read off `v1/worker/gpu_input_batch.py` (who takes which row, condense, swaps),
`gpu_model_runner.py` (when lists of tokens grow, and by what) and `v1/sample/sampler.py`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Model = Callable[[Sequence[int]], Tensor]


@dataclass
class Job:
    """A request, as its scheduler knows it."""

    params: Any
    prompt: list[int]
    num_chunks: int = 1
    """Steps that its prompt takes; all but the last draw a token that is thrown away."""
    tokens: list[int] = field(default_factory=list)
    stop_reason: int | None = None
    is_done: bool = False
    num_preempted: int = 0
    listed: list[int] = field(default_factory=list)
    """The list that the processor sees."""
    chunks_left: int = 0
    seed: random.Random = field(default_factory=lambda: random.Random(0))

    def take(self, token: int) -> None:
        self.tokens.append(token)
        stops = [*(self.params.stop_token_ids or ()), self.params.eos_token_id]
        if token in stops:
            self.stop_reason = token
        self.is_done = token in stops or len(self.tokens) >= self.params.max_tokens


class V1Machine:
    """The V1 runner's persistent batch. `is_async`: lists grow by -1, ends show a step late."""

    def __init__(
        self, processor: Any, model: Model, *, seats: int = 8, is_async: bool = False, seed: int = 0
    ) -> None:
        from vllm.v1.sample.logits_processor import interface

        self.interface, self.processor, self.model = interface, processor, model
        self.seats, self.is_async, self.random = seats, is_async, random.Random(seed)
        self.waiting: list[Job] = []
        self.rows: list[Job | None] = []
        self.sample = sample

    def submit(self, params: Any, prompt: list[int], num_chunks: int = 1) -> Job:
        """Through the front end: ValueError where the processor refuses."""
        type(self.processor).validate_params(params)
        job = Job(params, prompt, num_chunks)
        job.seed = random.Random(self.random.random())
        self.waiting.append(job)
        return job

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not any(self.rows)

    def run(self) -> None:
        while not self.is_idle:
            self.step()
        self.step()  # a last one, by which the processor hears who left

    def step(self, preempt: Sequence[int] = (), swaps: Sequence[tuple[int, int]] = ()) -> None:
        """preempt, swaps: places, taken modulo the batch's size."""
        update = self._schedule(preempt, swaps)
        self.processor.update_state(update)
        jobs = [job for job in self.rows if job is not None]
        if not jobs:
            return
        logits = torch.stack([self._logits(job) for job in jobs])
        before = logits.clone()
        after = self.processor.apply(logits)
        for row, job in enumerate(jobs):
            if "lenvm" not in (job.params.extra_args or {}):
                assert torch.equal(after[row], before[row]), "a row without control was touched"
        for row, job in enumerate(jobs):
            self._book(job, self.sample(after[row], job))

    def _logits(self, job: Job) -> Tensor:
        logits = self.model([*job.prompt, *job.tokens]).clone()
        for token, bias in (job.params.logit_bias or {}).items():
            logits[token] += bias
        return logits

    def _book(self, job: Job, token: int) -> None:
        if job.chunks_left > 1:
            job.chunks_left -= 1
            return
        job.listed.append(-1 if self.is_async else token)
        if not job.is_done:
            job.take(token)
        else:
            job.num_preempted = -1  # ran on after its end: it goes now

    def _schedule(self, preempt: Sequence[int], swaps: Sequence[tuple[int, int]]) -> Any:
        leaving = [
            i
            for i, job in enumerate(self.rows)
            if job is not None and job.is_done and (not self.is_async or job.num_preempted == -1)
        ]
        running = [i for i, job in enumerate(self.rows) if job is not None and not job.is_done]
        for place in preempt:
            if running and (i := running[place % len(running)]) not in leaving:
                job = self.rows[i]
                assert job is not None
                job.num_preempted += 1
                self.waiting.append(job)
                leaving.append(i)
        for i in leaving:
            self.rows[i] = None
        holes, added, moved = sorted(leaving), [], []
        while self.waiting and sum(job is not None for job in self.rows) < self.seats:
            job = self.waiting.pop(0)
            if self.is_async or not job.tokens:
                job.listed = list(job.tokens)
            job.chunks_left = job.num_chunks
            index = holes.pop(0) if holes else len(self.rows)
            self.rows[index : index + 1] = [job]
            added.append((index, job.params, job.prompt, job.listed))
        last = len(self.rows) - 1
        while holes:
            while last in holes:
                last -= 1
            if holes[0] >= last:
                break
            hole = holes.pop(0)
            self.rows[hole], self.rows[last] = self.rows[last], None
            moved.append((last, hole, self.interface.MoveDirectionality.UNIDIRECTIONAL))
            last -= 1
        while self.rows and self.rows[-1] is None:
            self.rows.pop()
        for first, second in swaps:
            i, j = first % max(1, len(self.rows)), second % max(1, len(self.rows))
            if self.rows and i != j:
                self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
                moved.append((i, j, self.interface.MoveDirectionality.SWAP))
        if not (holes or added or moved):
            return None
        return self.interface.BatchUpdate(len(self.rows), sorted(holes, reverse=True), added, moved)


class _Plain:
    """A tensor with the two faces of vLLM's buffers."""

    def __init__(self, *size: int) -> None:
        self.gpu = torch.zeros(*size, dtype=torch.long)
        self.np = self.gpu.numpy()


class V2Machine:
    """The V2 runner: slots, rows in any order, tokens on the device, penalties come first."""

    def __init__(
        self, build: Callable[[Any], Any], model: Model, *, seats: int = 8, seed: int = 0
    ) -> None:
        self.model, self.seats, self.random = model, seats, random.Random(seed)
        self.states = SimpleNamespace(
            device=torch.device("cpu"),
            all_token_ids=_Plain(seats, 512),
            prompt_len=_Plain(seats),
            prefill_len=_Plain(seats),
            remove_request=lambda index: index,
        )
        self.processor = build(self.states)
        self.free = list(range(seats))
        self.slots: dict[int, Job] = {}
        self.waiting: list[Job] = []

    def submit(self, params: Any, prompt: list[int], num_chunks: int = 1) -> Job:
        type(self.processor).validate_params(params)
        job = Job(params, prompt, num_chunks)
        job.seed = random.Random(self.random.random())
        self.waiting.append(job)
        return job

    def run(self) -> None:
        while self.waiting or self.slots:
            self.step()

    def step(self, preempt: Sequence[int] = (), skip: Sequence[int] = ()) -> None:
        """preempt, skip: places of requests that lose their slot, or this one step."""
        order = list(self.slots)
        for place in preempt:
            if order and (index := order[place % len(order)]) in self.slots:
                self.waiting.append(self.slots.pop(index))
                self.free.append(self.states.remove_request(index))
        while self.waiting and self.free:
            job, index = self.waiting.pop(0), self.free.pop()
            tokens = [*job.prompt, *job.tokens]
            self.slots[index], job.chunks_left = job, job.num_chunks
            self.states.all_token_ids.gpu[index, : len(tokens)] = torch.tensor(tokens)
            self.states.prompt_len.np[index] = len(job.prompt)
            self.states.prefill_len.np[index] = len(tokens)
            self.processor.add_request(index, job.params)
        out = {place % max(1, len(self.slots)) for place in skip}
        rows = [index for place, index in enumerate(self.slots) if place not in out]
        self.random.shuffle(rows)
        if not rows:
            return
        jobs = [self.slots[index] for index in rows]
        lengths = [
            len(j.prompt) + len(j.tokens) - (j.chunks_left > 1) * (j.chunks_left - 1) for j in jobs
        ]
        logits = torch.stack([self._logits(job) for job in jobs])
        before = logits.clone()
        context = SimpleNamespace(
            idx_mapping_np=np.array(rows), seq_lens_upper_bound_np=np.array(lengths)
        )
        after = self.processor.apply(logits, context)
        for row, (index, job) in enumerate(zip(rows, jobs, strict=True)):
            if "lenvm" not in (job.params.extra_args or {}):
                assert torch.equal(after[row], before[row])
            token = sample(after[row], job, with_penalties=False)
            if job.chunks_left > 1:
                job.chunks_left -= 1
                continue
            self.states.all_token_ids.gpu[index, lengths[row]] = token
            job.take(token)
            if job.is_done:
                del self.slots[index]
                self.free.append(self.states.remove_request(index))

    def _logits(self, job: Job) -> Tensor:
        logits = self.model([*job.prompt, *job.tokens]).clone()
        for token, bias in (job.params.logit_bias or {}).items():
            logits[token] += bias
        return penalise(logits, job)


def penalise(row: Tensor, job: Job) -> Tensor:
    """vLLM's penalties, token by token."""
    params, row = job.params, row.clone()
    for token in {*job.prompt, *job.tokens}:
        penalty = params.repetition_penalty
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in set(job.tokens):
        row[token] -= params.frequency_penalty * job.tokens.count(token) + params.presence_penalty
    return row


def sample(row: Tensor, job: Job, *, with_penalties: bool = True) -> int:
    """vLLM's sampler for one row: penalties, temperature, min_p, top-k, top-p, draw."""
    params = job.params
    if with_penalties:
        row = penalise(row, job)
    if params.temperature < 1e-5:
        return int(row.argmax())
    probs = truncated(row, params)
    return job.seed.choices(range(len(probs)), probs.tolist())[0]


def truncated(row: Tensor, params: Any) -> Tensor:
    """Probabilities that a row is drawn with after temperature and truncation."""
    probs = (row.double() / params.temperature).softmax(-1)
    probs[probs < params.min_p * probs.max()] = 0
    if 0 < params.top_k < len(probs):
        probs[probs < probs.topk(params.top_k).values[-1]] = 0
    probs /= probs.sum()
    values, order = probs.sort(descending=True)
    probs[order[values.cumsum(-1) - values >= params.top_p]] = 0
    return probs / probs.sum()
