"""RaggedDecoder: random histories of every family against plain forwards; bad input; sharing."""

import copy
import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lenvm.errors import CapacityError, InputError
from lenvm.model import attention, packed_linear
from lenvm.model.ragged import RaggedDecoder
from model.families import FAMILIES, VOCAB, build, last_hidden
from model.ragged_machine import History, run_random_history

TOKEN = st.integers(0, VOCAB - 1)
BUDGET = {"max_tokens": 300, "max_requests": 5, "max_candidates": 6}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(attention, "GROUP_PAGES", attention.GROUP_PAGES)  # put back afterwards


class Machine(RuleBasedStateMachine):
    """hypothesis chooses the calls; `History` makes them and compares."""

    @initialize(family=st.sampled_from(FAMILIES), cost=st.sampled_from([0, 1, 8]))
    def start(self, family, cost):
        attention.GROUP_PAGES = cost  # 0: rows of every length read alone
        self.history = History(build(family), **BUDGET)
        self.history.decoder._chunk = 24  # prefill in several chunks

    def some(self, data: st.DataObject) -> list[str]:
        names = sorted(self.history.tokens)
        return data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))

    @rule(prompts=st.lists(st.lists(TOKEN, min_size=1, max_size=60), min_size=1, max_size=3))
    def add(self, prompts):
        self.history.add(prompts)

    @rule(prompt=st.lists(TOKEN, min_size=1, max_size=60))
    def add_the_same_prompt_twice(self, prompt):
        self.history.add([prompt, prompt])

    @precondition(lambda self: self.history.tokens)
    @rule(data=st.data())
    def fork(self, data):
        self.history.fork(self.some(data)[0])

    @precondition(lambda self: self.history.tokens)
    @rule(data=st.data(), most=st.sampled_from([1, 6]))
    def peek(self, data, most):
        token = st.integers(-1, VOCAB - 1) if most > 1 else TOKEN
        row = st.lists(token, min_size=1, max_size=most).filter(lambda r: max(r) >= 0)
        self.history.peek({name: data.draw(row) for name in self.some(data)})

    @precondition(lambda self: set(self.history.peeked) & set(self.history.tokens))
    @rule(data=st.data(), another=st.booleans())
    def commit(self, data, another):
        known = sorted(set(self.history.peeked) & set(self.history.tokens))
        chosen = {}
        for name in data.draw(st.lists(st.sampled_from(known), min_size=1, unique=True)):
            row = [t for t in self.history.peeked[name] if t >= 0]
            chosen[name] = data.draw(TOKEN if another else st.sampled_from(row))
        self.history.commit(chosen)

    @precondition(lambda self: self.history.tokens)
    @rule(data=st.data())
    def step(self, data):
        self.history.step({name: data.draw(TOKEN) for name in self.some(data)})

    @precondition(lambda self: self.history.tokens)
    @rule(data=st.data())
    def extend(self, data):
        tokens = st.lists(TOKEN, min_size=1, max_size=20)
        self.history.extend({name: data.draw(tokens) for name in self.some(data)})

    @precondition(lambda self: self.history.tokens)
    @rule(data=st.data())
    def preempt(self, data):
        self.history.preempt(self.some(data)[0])

    @precondition(lambda self: self.history.preempted)
    @rule(data=st.data())
    def resume(self, data):
        self.history.resume(data.draw(st.sampled_from(sorted(self.history.preempted))))

    @precondition(lambda self: self.history.tokens)
    @rule(data=st.data())
    def remove(self, data):
        self.history.remove(self.some(data))

    @invariant()
    def lengths_agree(self):
        self.history.check_lengths()


Machine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestHistories = Machine.TestCase


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_random_history_equals_plain_forwards(family, dtype):
    history = History(build(family, dtype=dtype), **BUDGET)
    history.decoder._chunk = 24
    run_random_history(history, 3, 40 if dtype == torch.float32 else 15, VOCAB)


def test_a_row_does_not_depend_on_its_batch_mates():
    model = build("mistral")
    decoder = RaggedDecoder(model, **BUDGET)
    decoder.add({"a": list(range(30))})
    alone = decoder.peek(["a"], [[5, 6, 7]])[0]
    decoder.add({"b": [9, 9], "c": list(range(90, 20, -1))})
    rows = torch.tensor([[1, 2, -1, 4], [5, 6, 7, -1], [-1, 8, -1, -1]])
    together = decoder.peek(["b", "a", "c"], rows)
    torch.testing.assert_close(together[1, :3], alone, atol=1e-5, rtol=1e-5)
    assert not together[1, 3].any()


def test_candidates_do_not_see_their_siblings():
    decoder = RaggedDecoder(build("qwen2"), **BUDGET)
    decoder.add({"a": [1, 2, 3]})
    one, other = decoder.peek(["a"], [[5, 6, 7]])[0, 0], decoder.peek(["a"], [[5, 90, 5]])[0]
    torch.testing.assert_close(one, other[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(one, other[2], atol=1e-6, rtol=1e-6)


def test_forwards_have_few_token_counts_whatever_is_asked_for():
    model, counts = build("llama"), set()
    hook = lambda _, inputs, __: counts.add(inputs[0].numel())  # noqa: E731
    handle = model.get_input_embeddings().register_forward_hook(hook)
    decoder = RaggedDecoder(model, max_tokens=2000, max_requests=12, max_candidates=16)
    for length in range(1, 161):
        decoder.add({"a": [length % VOCAB] * length})
        decoder.remove(["a"])
    decoder.add({f"r{i}": [i + 1] for i in range(12)})
    for number in range(12, 160):
        cells = torch.full((12, 16), -1).flatten()
        cells[torch.linspace(0, 191, number).long()] = 7
        decoder.peek([f"r{i}" for i in range(12)], cells.view(12, 16))
    handle.remove()
    assert counts == {*range(1, 8), *range(8, 129, 8), 192}


def test_padding_of_a_peek_harms_no_request():
    model = build("qwen2")
    decoder = RaggedDecoder(model, max_tokens=400, max_requests=12, max_candidates=6)
    names = [f"r{i}" for i in range(12)]
    prompts = {name: [i + 1] * (i + 3) for i, name in enumerate(names)}
    decoder.add(prompts)
    for rows in ([[5]] * 9 + [[-1]] * 3, [[5, -1]] * 9 + [[-1, -1]] * 3):
        out = decoder.peek(names, rows)
        assert not out[9:].any()
        torch.testing.assert_close(
            out[8, 0], last_hidden(model, [*prompts["r8"], 5]), atol=1e-4, rtol=1e-4
        )
        decoder.commit(names[:1], [5])
        prompts["r0"].append(5)
    out = decoder.step(names, [6] * 12)
    for row, name in zip(out, names, strict=True):
        torch.testing.assert_close(
            row, last_hidden(model, [*prompts[name], 6]), atol=1e-4, rtol=1e-4
        )


def test_what_was_peeked_is_not_computed_again():
    model = build("llama")
    decoder = RaggedDecoder(model, **BUDGET)
    decoder.add({"a": [1, 2, 3], "b": [4]})
    decoder.peek(["a", "b"], [[5, 6], [7, 8]])
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    decoder.commit(["b", "a"], [8, 5])
    handle.remove()
    assert not calls
    assert decoder.length("a") == 4
    torch.testing.assert_close(
        decoder.peek(["a"], [[9]])[0, 0], last_hidden(model, [1, 2, 3, 5, 9]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("most", [1, 6])
@pytest.mark.parametrize("cost", [0, 1, 8])
def test_rows_of_any_length_share_a_batch(monkeypatch, cost, most):
    monkeypatch.setattr(attention, "GROUP_PAGES", cost)
    model, lengths = build("qwen2"), [3, 120, 16, 64, 17]
    decoder = RaggedDecoder(model, max_tokens=400, max_requests=5, max_candidates=6)
    prompts = {str(i): [(7 * i + j) % VOCAB for j in range(n)] for i, n in enumerate(lengths)}
    decoder.add(prompts)
    rows = [[(i + j) % VOCAB if j <= i or most == 1 else -1 for j in range(most)] for i in range(5)]
    out = decoder.peek(list(prompts), rows)
    for i, (name, row) in enumerate(zip(prompts, rows, strict=True)):
        for j, token in enumerate(row):
            if token >= 0:
                expected = last_hidden(model, [*prompts[name], token])
                torch.testing.assert_close(out[i, j], expected, atol=1e-4, rtol=1e-4)


@given(pages=st.lists(st.integers(0, 40), min_size=1, max_size=7), cost=st.integers(0, 20))
def test_rows_are_split_as_cheaply_as_can_be(pages, cost):
    groups = attention.split_rows(tuple(pages), cost)
    assert sorted(row for group in groups for row in group) == list(range(len(pages)))
    assert all(list(group) == sorted(group) for group in groups)

    def price(split):
        return sum(len(g) * max(1, *(pages[r] for r in g), 0) + cost for g in split)

    order = sorted(range(len(pages)), key=lambda row: pages[row])
    cuts = [
        [i + 1 for i in range(len(order) - 1) if bits >> i & 1]
        for bits in range(2 ** (len(order) - 1))
    ]
    splits = ([order[a:b] for a, b in zip([0, *c], [*c, len(order)], strict=True)] for c in cuts)
    assert price(groups) == min(price(split) for split in splits)


def test_equal_prompts_and_forks_are_stored_once():
    decoder = RaggedDecoder(build("qwen2"), page_size=16, **BUDGET)
    prompt = list(range(64))
    outs = decoder.add({"a": prompt, "b": prompt, "c": prompt})
    assert decoder.num_tokens == 64
    assert torch.equal(outs[0], outs[2])
    decoder.step(["a", "b"], [1, 2])
    assert decoder.num_tokens == 66
    decoder.fork("a", "d")  # 65 tokens: four full pages shared, one token copied
    assert decoder.num_tokens == 67
    decoder.remove(["a", "c"])
    assert decoder.num_tokens == 66
    decoder.remove(["b", "d"])
    assert decoder.num_tokens == 0


def test_a_head_gives_its_outputs_instead_of_hidden_states():
    model = build("qwen2")
    head = torch.nn.Linear(64, 3)
    decoder = RaggedDecoder(model, head=head, **BUDGET)
    with torch.inference_mode():
        expected = head(last_hidden(model, [1, 2]))
    torch.testing.assert_close(decoder.add({"a": [1, 2]})[0], expected)
    out = decoder.peek(["a"], [[3, -1]])
    assert out.shape == (1, 2, 3)
    assert not out[0, 1].any()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda d: d.add({"a": [1]}), InputError, "'a' is already there"),
        (lambda d: d.add({"x": []}), InputError, "'x': no tokens"),
        (lambda d: d.add({"x": [VOCAB]}), InputError, "'x': token 96"),
        (lambda d: d.add({"x": [-1]}), InputError, "'x': token -1"),
        (lambda d: d.add({"x": [1] * 257}), CapacityError, "'x' would have 257"),
        (lambda d: d.add({"x": [1] * 250, "y": [2] * 60}), CapacityError, "KV budget of 300"),
        (lambda d: d.add({f"x{i}": [1] for i in range(4)}), CapacityError, "limit of 5"),
        (lambda d: d.extend({"x": [1]}), InputError, "no request 'x'"),
        (lambda d: d.extend({"a": [1], "b": [99]}), InputError, "'b': token 99"),
        (lambda d: d.extend({"a": [1] * 254}), CapacityError, "'a' would have 257"),
        (lambda d: d.peek(["a", "x"], [[1], [2]]), InputError, "no request 'x'"),
        (lambda d: d.peek(["a", "a"], [[1], [2]]), InputError, "once"),
        (lambda d: d.peek([], torch.empty(0, 1)), InputError, "at least one"),
        (lambda d: d.peek(["a", "b"], [[1]]), InputError, "must be [2, K]"),
        (lambda d: d.peek(["a", "b"], [[1, 2], [3, VOCAB]]), InputError, "'b': candidate 96"),
        (lambda d: d.peek(["a"], [[-2]]), InputError, "'a': candidate -2"),
        (lambda d: d.peek(["a"], [[-1]]), InputError, "at least one candidate"),
        (lambda d: d.peek(["a"], [[1] * 7]), CapacityError, "allowed are 1 to 6"),
        (lambda d: d.commit(["x"], [1]), InputError, "no request 'x'"),
        (lambda d: d.commit(["a", "b"], [1]), InputError, "one token for each"),
        (lambda d: d.commit(["a"], [VOCAB]), InputError, "'a': token 96"),
        (lambda d: d.step(["a"], [-1]), InputError, "at least one candidate"),
        (lambda d: d.step(["a", "b"], [1, VOCAB]), InputError, "'b': candidate 96"),
        (lambda d: d.fork("x", "y"), InputError, "no request 'x'"),
        (lambda d: d.fork("a", "b"), InputError, "'b' is already there"),
        (lambda d: d.remove(["a", "x"]), InputError, "no request 'x'"),
        (lambda d: d.length("x"), InputError, "no request 'x'"),
    ],
)
def test_a_bad_call_names_its_fault_and_harms_nobody(call, error, says):
    model = build("qwen2")
    decoder = RaggedDecoder(model, **BUDGET)
    decoder.add({"a": [1, 2, 3], "b": [4, 5]})
    decoder.peek(["a", "b"], [[6, 7], [8, -1]])
    with pytest.raises(error) as raised:
        call(decoder)
    assert says in str(raised.value)
    assert decoder.num_tokens == 5
    decoder.commit(["a", "b"], [7, 8])
    out = decoder.step(["b", "a"], [9, 10])
    for row, tokens in zip(out, ([4, 5, 8, 9], [1, 2, 3, 7, 10]), strict=True):
        torch.testing.assert_close(row, last_hidden(model, tokens), atol=1e-4, rtol=1e-4)


def test_a_removed_request_stepped_again_is_named():
    decoder = RaggedDecoder(build("qwen2"), **BUDGET)
    decoder.add({"a": [1], "b": [2]})
    decoder.peek(["a", "b"], [[3], [4]])
    decoder.remove(["a"])
    with pytest.raises(InputError, match="no request 'a'"):
        decoder.commit(["a"], [3])
    decoder.commit(["b"], [4])
    assert decoder.length("b") == 2


def test_a_full_budget_refuses_the_step_before_it_runs():
    decoder = RaggedDecoder(build("qwen2"), max_tokens=6, max_requests=3, max_candidates=2)
    decoder.add({"a": [1, 2, 3], "b": [4, 5]})
    decoder.step(["a"], [6])
    with pytest.raises(CapacityError, match="KV budget of 6"):
        decoder.step(["a"], [7])
    assert decoder.length("a") == 4
    decoder.remove(["b"])
    decoder.step(["a"], [7])


def test_the_budget_can_be_given_in_bytes():
    model = build("qwen2")
    decoder = RaggedDecoder(model, max_requests=2, kv_bytes=200_000)
    assert decoder.num_kv_bytes <= 200_000
    assert 128 <= decoder.max_tokens <= 400
    with pytest.raises(CapacityError, match="kv_bytes"):
        RaggedDecoder(model, max_requests=2, kv_bytes=1000)


@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "soft-capped"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("mistral", {"sliding_window": 1}, "window of one"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "type dynamic",
        ),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(family, overrides, says):
    model = build(family, **overrides)
    with pytest.raises(InputError, match=says) as raised:
        RaggedDecoder(model)
    assert model.config.model_type in str(raised.value)


def test_the_model_is_left_as_it_was():
    model = build("qwen2")
    before = model.config._attn_implementation
    decoder = RaggedDecoder(model, **BUDGET)
    decoder.add({"a": [1, 2]})
    assert model.config._attn_implementation == before


def live_bytes() -> int:
    """Memory of every tensor that anybody holds, each storage once."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu":
            try:
                storage = x.untyped_storage()
            except (NotImplementedError, RuntimeError):  # packed weights show no storage
                continue
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_steady_steps_allocate_no_memory_for_keys_and_values(family):
    decoder = RaggedDecoder(build(family), **BUDGET | {"max_tokens": 600})
    runner = decoder._runner
    ids = ["a", "b"]
    decoder.add({"a": [1, 2, 3], "b": [4]})
    pools, buffers, held = set(), set(), {}
    for i in range(200):
        decoder.peek(ids, [[i % VOCAB, 5, 6], [7, 8, -1]])
        decoder.commit(ids, [5, 8])
        pools.add((decoder._cache.data.data_ptr(), runner._stash.data_ptr()))
        buffers.add(tuple(x.data_ptr() for x in runner._work.buffers.values()))
        if i in (20, 199):
            held[i] = live_bytes() - sum(x.nbytes for x in runner._work.buffers.values())
    assert len(pools) == 1
    assert len(buffers) <= 4  # it doubles with the longest prefix
    # the masks and places of a step are as long as its prefix
    assert held[199] - held[20] <= 2 * 4 * 6 * 2 * 260
    assert decoder.length("a") == 203


def test_a_model_that_was_read_from_a_gguf_file_has_packed_layers_too():
    """transformers then forbids its `float`, though its weights are plain."""
    backbone = build("qwen2")
    backbone.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        backbone.float()
    assert RaggedDecoder(backbone, **BUDGET)._runner.is_packed


def test_packed_layers_run_on_the_cpu():
    for family in ("qwen2", "qwen3", "llama", "mistral"):
        assert RaggedDecoder(build(family), **BUDGET)._runner.is_packed
    assert not RaggedDecoder(build("gemma3"), **BUDGET)._runner.is_packed
    assert not RaggedDecoder(build("llama", dtype=torch.float16), **BUDGET)._runner.is_packed


def test_weights_changed_in_place_are_packed_anew():
    model = build("llama")
    decoder = RaggedDecoder(model, **BUDGET)
    decoder.add({"a": [1, 2]})
    before = decoder.peek(["a"], [[3]])
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(1.5)
    decoder.remove(["a"])
    decoder.add({"a": [1, 2]})
    after = decoder.peek(["a"], [[3]])[0, 0]
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, last_hidden(model, [1, 2, 3]), atol=1e-4, rtol=1e-4)


def test_bf16_is_no_further_from_fp32_than_a_plain_forward():
    """Over tokens of random histories; the plain forward rounds its residual stream, ours not."""
    model = build("llama", dtype=torch.bfloat16, num_hidden_layers=8)
    exact = copy.deepcopy(model).float()
    decoder = RaggedDecoder(model, **BUDGET | {"max_candidates": 9})
    generator = torch.Generator().manual_seed(3)
    ours, plain = [], []
    for length in (3, 20, 50):
        prompts = {
            r: torch.randint(VOCAB, (n,), generator=generator).tolist()
            for r, n in (("a", length), ("b", length + 9))
        }
        decoder.add(prompts)
        candidates = [list(range(width)) + [-1] * (9 - width) for width in (9, 4)]
        got = decoder.peek(list(prompts), candidates).float()
        for row, tokens in zip(got, prompts.values(), strict=True):
            for token, hidden in enumerate(row):
                if not hidden.any():
                    continue  # padding
                truth = last_hidden(exact, [*tokens, token])
                ours.append((hidden - truth).norm())
                plain.append((last_hidden(model, [*tokens, token]).float() - truth).norm())
        decoder.remove(["a", "b"])
    assert len(ours) == 3 * 13
    assert torch.stack(ours).mean() < torch.stack(plain).mean()


def test_a_model_too_large_for_a_second_copy_runs_its_own_code(monkeypatch, caplog):
    monkeypatch.setattr(packed_linear, "SHARE", 0.0)
    decoder = RaggedDecoder(build("llama"), **BUDGET)
    assert not decoder._runner.is_packed
    assert "not packed" in caplog.text
