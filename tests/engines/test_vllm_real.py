"""The same tokens through vLLM's own InputBatch and Sampler, where vLLM can be imported (also
without a GPU): LENVM_TEST_VLLM=FOLDER-OF-IT, and its small dependencies on the path."""

import os
import random

import pytest
import torch

from engines.machine import Job
from engines.test_vllm_guidance import (
    VOCAB,
    model,
    plain_loop,
    processor,
    submit_one,
)
from engines.test_vllm_guidance import vllm as vllm

pytestmark = pytest.mark.skipif(
    "LENVM_TEST_VLLM" not in os.environ, reason="LENVM_TEST_VLLM names no vLLM"
)


class RealBatch:
    """vLLM's InputBatch around a processor, stepped as `GPUModelRunner` does."""

    def __init__(self, guidance, *, seats: int, is_async: bool) -> None:
        from vllm.utils import torch_utils
        from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor
        from vllm.v1.sample.logits_processor.state import LogitsProcessors
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.worker import gpu_input_batch
        from vllm.v1.worker.gpu_input_batch import InputBatch

        torch_utils.PIN_MEMORY = gpu_input_batch.PIN_MEMORY = torch.cuda.is_available()
        device = torch.device("cpu")
        bias = LogitBiasLogitsProcessor(None, device, False)
        self.processor, self.seats, self.is_async = guidance, seats, is_async
        self.batch = InputBatch(
            max_num_reqs=seats,
            max_model_len=256,
            max_num_batched_tokens=256,
            device=device,
            vocab_size=VOCAB,
            block_sizes=[16],
            kernel_block_sizes=[16],
            logitsprocs=LogitsProcessors([bias, guidance]),
        )
        self.sampler = Sampler()
        self.jobs: dict[str, Job] = {}
        self.states = {}
        self.waiting: list[Job] = []
        self.late: set[str] = set()
        self.num = 0

    def submit(self, params, prompt, num_chunks=1) -> Job:
        type(self.processor).validate_params(params)
        self.waiting.append(Job(params, prompt, num_chunks))
        return self.waiting[-1]

    def step(self, preempt=(), swaps=()) -> None:
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        leaving = [
            r for r, j in self.jobs.items() if j.is_done and (not self.is_async or r in self.late)
        ]
        running = [r for r, j in self.jobs.items() if not j.is_done]
        again = {running[p % len(running)] for p in preempt if running}
        for name in (*leaving, *again):
            self.batch.remove_request(name)
            job = self.jobs.pop(name)
            if name in again:
                self.waiting.append(job)
        while self.waiting and len(self.jobs) < self.seats:
            job, name = self.waiting.pop(0), f"r{self.num}"
            self.num += 1
            job.chunks_left = job.num_chunks
            self.states[name] = CachedRequestState(
                req_id=name,
                prompt_token_ids=job.prompt,
                mm_features=[],
                sampling_params=job.params,
                generator=None,
                block_ids=([0],),
                num_computed_tokens=0,
                output_token_ids=list(job.tokens),
            )
            self.jobs[name] = job
            self.batch.add_request(self.states[name])
        self.batch.condense()
        for first, second in swaps:
            n = max(1, self.batch.num_reqs)
            if first % n != second % n:
                self.batch.swap_states(first % n, second % n)
        self.batch.refresh_metadata()
        if not self.jobs:
            return
        names = list(self.batch.req_ids)
        logits = torch.stack(
            [model([*self.jobs[n].prompt, *self.jobs[n].tokens]).clone() for n in names]
        )
        sampled = self.sampler(logits, self.batch.sampling_metadata).sampled_token_ids
        for row, name in enumerate(names):
            job, token = self.jobs[name], int(sampled[row, 0])
            if job.chunks_left > 1:
                job.chunks_left -= 1
                continue
            self.states[name].output_token_ids.append(-1 if self.is_async else token)
            self.batch.num_tokens_no_spec[row] += 1
            if job.is_done:
                self.late.add(name)
            else:
                job.take(token)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_vllms_own_batch_and_sampler_give_the_plain_loops_tokens(seed, is_async):
    source = random.Random(seed)
    guidance = processor()
    machine = RealBatch(guidance, seats=5, is_async=is_async)
    jobs = []
    for _ in range(60):
        if len(jobs) < 24 and source.random() < 0.5:
            kind = source.choice([k for k in range(36) if k % 6 != 4])  # its penalties need CUDA
            jobs.append(submit_one(machine, len(jobs), kind, source.randrange(1, 4)))
        preempt = [source.randrange(9)] if source.random() < 0.2 else []
        machine.step(preempt, [(source.randrange(9), source.randrange(9))])
    while machine.waiting or machine.jobs:
        machine.step()
    machine.step()
    for job, control in jobs:
        if control is not None:
            assert job.tokens == plain_loop(job, control)
    assert not guidance.scorer.requests


def test_the_pooling_models_head_gives_our_values_for_every_token_of_a_chunked_prompt(monkeypatch):
    """vLLM's own registry and pooler classes; the backbone needs a GPU."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.pooler.tokwise import TokenPooler, methods
    from vllm.model_executor.models.registry import _ModelInfo

    from lenvm.engines.vllm.values import ChunkPool, ValuePoolerHead, VllmLengthValueModel
    from lenvm.model.head import LengthBins, build_head

    info = _ModelInfo.from_model_cls(VllmLengthValueModel)
    assert info.is_pooling_model
    assert info.default_tok_pooling_type == "ALL"
    scheduler = SimpleNamespace(enable_chunked_prefill=True)
    monkeypatch.setattr(
        methods,
        "get_current_vllm_config",
        lambda: SimpleNamespace(scheduler_config=scheduler),
    )
    head = build_head("scalar", 32, LengthBins(200, 1.5))
    pooler = TokenPooler(pooling=ChunkPool(), head=ValuePoolerHead(head, 0.98))
    assert pooler.get_supported_tasks() == {"token_classify"}
    hidden, state = torch.randn(7, 32), SimpleNamespace(hidden_states_cache=[])
    buffer = torch.empty(4, 32)  # a CUDA graph's output: every step writes it
    state.clean = state.hidden_states_cache.clear
    found = None
    for first, last in ((0, 4), (4, 7)):

        def cursor(last=last, first=first):
            return SimpleNamespace(
                num_scheduled_tokens_cpu=torch.tensor([last - first]),
                is_finished=lambda: [last == 7],
            )

        metadata = SimpleNamespace(
            pooling_params=[None], pooling_states=[state], get_pooling_cursor=cursor
        )
        assert found is None
        buffer[: last - first] = hidden[first:last]
        (found,) = pooler(buffer[: last - first], metadata)
    belief = head.belief(head(hidden), 0.98)
    assert torch.allclose(found[:, 0], belief.value())
    assert torch.allclose(found[:, 1], belief.length())
