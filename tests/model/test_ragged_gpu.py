"""RaggedDecoder on a GPU: graphs, 16-bit types, no host sync in a step, late errors."""

import dataclasses
import warnings

import pytest
import torch

from lenvm.errors import InputError
from lenvm.model.hopper.runtime import is_supported
from lenvm.model.kernel_choices import PLAIN
from lenvm.model.ragged import RaggedDecoder
from model.families import FAMILIES, FUSED, HOPPER, HOPPER_SHAPE, VOCAB, build, last_hidden
from model.ragged_machine import History, run_random_history

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BUDGET = {"max_tokens": 1500, "max_requests": 8, "max_candidates": 9}


class DeviceHistory(History):
    def to_input(self, rows):
        return torch.tensor(rows, device=self.decoder.device)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_history_equals_plain_forwards(family, dtype):
    history = DeviceHistory(build(family, dtype=dtype, hidden_size=128).cuda(), **BUDGET)
    run_random_history(history, 5, 60, VOCAB)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("pdl", [False, True])
def test_fused_products(family, pdl):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor copy engine")
    model = build(family, dtype=torch.bfloat16, hidden_size=128).cuda()
    history = DeviceHistory(model, **BUDGET)
    runner = history.decoder._runner
    choices = dataclasses.replace(FUSED, pdl=pdl)
    assert runner._forward.can_run(choices, 64)
    runner.choose = lambda *_: choices
    run_random_history(history, 5, 60, VOCAB)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("graphs", [False, True])
def test_kernels_of_hopper(family, graphs):
    if not is_supported(torch.device("cuda")):
        pytest.skip("needs Hopper and cuda-bindings")
    model = build(family, dtype=torch.bfloat16, **HOPPER_SHAPE).cuda()
    history = DeviceHistory(model, cuda_graphs=graphs, **BUDGET)
    runner = history.decoder._runner
    assert runner._forward.can_run(HOPPER, 64)
    runner.choose = lambda *_: HOPPER
    run_random_history(history, 5, 60, VOCAB)


def test_without_graphs():
    model = build("qwen2", hidden_size=128).cuda()
    run_random_history(DeviceHistory(model, cuda_graphs=False, **BUDGET), 5, 40, VOCAB)


def test_chosen_tokens_may_be_a_column_of_the_candidates():
    model = build("qwen2", hidden_size=128).cuda()
    decoder = RaggedDecoder(model, **BUDGET)
    decoder.add({"a": [1, 2], "b": [3]})
    candidates = torch.tensor([[4, 5], [6, 7]], device="cuda")
    decoder.peek(["a", "b"], candidates)
    decoder.commit(["a", "b"], candidates[:, 1], peeked=True)
    expected = [last_hidden(model, [1, 2, 5, 8]), last_hidden(model, [3, 7, 8])]
    out = decoder.step(["a", "b"], [8, 8])
    torch.testing.assert_close(out, torch.stack(expected), atol=1e-3, rtol=1e-3)


def test_a_step_makes_no_host_sync():
    model = build("qwen2", dtype=torch.bfloat16, hidden_size=128).cuda()
    decoder = RaggedDecoder(model, **BUDGET)
    ids = ["a", "b", "c"]
    decoder.add({r: [1 + i] * (60 + i) for i, r in enumerate(ids)})  # page borders are crossed
    candidates = torch.randint(VOCAB, (3, 5), device="cuda")
    chosen = candidates[:, 2].clone()
    for _ in range(3):
        decoder.peek(ids, candidates, num_candidates=15)
        decoder.commit(ids, chosen, peeked=True)
        decoder.step(ids, chosen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(6):
                decoder.peek(ids, candidates, num_candidates=15)
                decoder.commit(ids, chosen, peeked=True)
                decoder.step(ids, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tokens = [1] * 60 + [int(chosen[0])] * 18
    out = decoder.peek(ids, candidates)[0, 0].float()
    expected = last_hidden(model, [*tokens, int(candidates[0, 0])]).float()
    assert (out - expected).norm() <= 4e-2 * expected.norm()


@pytest.mark.parametrize("pdl", [False, True])
def test_a_trimmed_step_equals_the_plain_one_without_a_host_sync(pdl):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor copy engine")
    model = build("qwen2", dtype=torch.bfloat16, hidden_size=128).cuda()
    decoder = RaggedDecoder(model, **BUDGET)
    runner = decoder._runner
    trimmed = dataclasses.replace(FUSED, pdl=pdl, trims=True)
    assert runner._forward.can_run(trimmed, 72)
    runner.choose = lambda _, trims: trimmed if trims else PLAIN
    ids = [f"r{i}" for i in range(8)]
    decoder.add({r: [1 + i] * (20 + i) for i, r in enumerate(ids)})
    decoder.warm_up(8, 9)
    assert runner.num_graphs == 2
    candidates = torch.randint(VOCAB, (8, 9), device="cuda")
    candidates[:, 3:] = -1  # 24 of 72: the second tile of 64 is padding
    plain = decoder.peek(ids, candidates).float()
    assert not runner._last.trims
    for _ in range(20):
        decoder.peek(ids, candidates)
        torch.cuda.synchronize()  # the test's own: the hint takes what has come by then
    decoder.peek(ids, candidates)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outs = [decoder.peek(ids, candidates) for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runner._last.trims
    assert runner.num_graphs == 2
    for out in outs:
        assert not out[:, 3:].any()
        assert (out.float() - plain).norm() <= 4e-2 * plain.norm()
    decoder.peek(ids, candidates, num_candidates=24)  # who counts needs no trimming
    assert not runner._last.trims


def test_steady_steps_allocate_no_device_memory():
    model = build("qwen2", dtype=torch.bfloat16, hidden_size=128).cuda()
    decoder = RaggedDecoder(model, **BUDGET)
    ids = ["a", "b", "c"]
    decoder.add({r: [1 + i] * (20 + i) for i, r in enumerate(ids)})
    candidates = torch.randint(VOCAB, (3, 5), device="cuda")
    chosen = candidates[:, 2].clone()

    def step() -> None:
        decoder.peek(ids, candidates, num_candidates=15)
        decoder.commit(ids, chosen, peeked=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    before, places = torch.cuda.memory_stats(), decoder._cache.data.data_ptr()
    for _ in range(200):  # page borders are crossed
        step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert decoder._cache.data.data_ptr() == places
    for name in ("num_device_alloc", "reserved_bytes.all.current"):
        assert after[name] == before[name], name
    assert after["active_bytes.all.current"] <= before["active_bytes.all.current"] + 2**16
    replayed = decoder._runner._steps[decoder._runner._last]
    for _ in range(50):
        replayed.run()
    torch.cuda.synchronize()
    name = "allocation.all.allocated"
    assert torch.cuda.memory_stats()[name] == after[name]


@pytest.mark.parametrize(
    ("bad", "says"), [(VOCAB, "'b': a candidate is not a token"), (-7, "'b': a candidate")]
)
def test_a_bad_candidate_on_the_device_is_named_at_the_next_call(bad, says):
    model = build("qwen2", hidden_size=128).cuda()
    decoder = RaggedDecoder(model, **BUDGET)
    decoder.add({"a": [1, 2], "b": [3]})
    out = decoder.peek(["a", "b"], torch.tensor([[4, 5], [6, bad]], device="cuda"))
    torch.testing.assert_close(out[0, 1], last_hidden(model, [1, 2, 5]), atol=1e-3, rtol=1e-3)
    torch.cuda.synchronize()
    with pytest.raises(InputError, match=says):
        decoder.commit(["a"], [5])
    decoder.commit(["a"], [5])
    torch.testing.assert_close(
        decoder.step(["a"], [7])[0], last_hidden(model, [1, 2, 5, 7]), atol=1e-3, rtol=1e-3
    )


def test_a_broken_promise_is_named_at_the_next_call():
    decoder = RaggedDecoder(build("qwen2", hidden_size=128).cuda(), **BUDGET)
    decoder.add({"a": [1, 2], "b": [3]})
    decoder.peek(["a", "b"], torch.tensor([[4, 5], [6, 7]], device="cuda"))
    decoder.commit(["a", "b"], torch.tensor([4, 9], device="cuda"), peeked=True)
    torch.cuda.synchronize()
    with pytest.raises(InputError, match="'b': the committed token is not among"):
        decoder.step(["a"], [1])
