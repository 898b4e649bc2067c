"""StepGraphs: guided steps replayed over static buffers equal plain ones, whatever happens between.

`MockRecorder` stands for CUDA graphs: a replay runs the function again and writes into the tensors
of its first run, as a graph does, and spoils what graphs recorded later left in the shared pool.
"""

import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guidance.oracle import EOS, Guided, Markov, OracleScorer
from guidance.test_no_waiting import META, MetaScorer, Transfers
from lenvm.engines.adapter import Admission, GuidedBatch, _draw_tokens
from lenvm.guidance import graphs as module
from lenvm.guidance import session as session_module
from lenvm.guidance.candidates import Truncation, search
from lenvm.guidance.graphs import CudaRecorder, Outputs, StepGraphs, bucket
from lenvm.guidance.params import RuleParams
from lenvm.guidance.request import LengthControl
from lenvm.guidance.scorer import CandidateScorer
from lenvm.guidance.session import GuidanceSession
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from model.families import VOCAB, build

SIZE = 40
GOALS: list[dict[str, Any]] = [
    {"tilt": 3.0},
    {"tilt": -2.0, "gamma": 0.9},
    {"tilt_logit": 0.5, "min_value": 0.1, "min_entropy": 0.2},
    {"expected_scale": 0.8, "expected_mode": "length_mul"},
    {"equal_to": 9, "rule": "hard"},
    {"at_most": 12, "rule": "soft", "token_temperature": {3: 2.0, 5: 0.5}},
    {"at_least": 5, "rule": "expected"},
    {"equal_to": 9, "tolerance": 0.3, "rule": "conditional"},
    {"equal_to": 20, "rule": "conditional", "focus": 3.0},
    {"price": 0.05},
    {"at_most": 12, "price": 0.2},
    {"tilt": 0.0},
]


class MockRecorder:
    def __init__(self, fails: bool = False) -> None:
        self.fails, self.recorded = fails, list[Outputs]()

    def can_record(self, x: Tensor) -> bool:
        return True

    def capture(self, fn: Callable[[], Outputs]) -> Callable[[], Outputs]:
        if self.fails:
            raise RuntimeError("out of luck")
        outputs, place = fn(), len(self.recorded)
        self.recorded.append(outputs)

        def replay() -> Outputs:
            for spoiled in self.recorded[place + 1 :]:
                for x in spoiled:
                    x.fill_(-77 if x.dtype.is_floating_point else 1)
            for x, new in zip(outputs, fn(), strict=True):
                x.copy_(new)
            return outputs

        return replay


class Pair:
    """The same requests in a session with graphs and in one without."""

    def __init__(
        self,
        scorer: Callable[[], Any],
        graphs: StepGraphs,
        device: str = "cpu",
        exact: bool = False,
    ) -> None:
        self.graphed = GuidanceSession(scorer(), eos_token_ids=[EOS], graphs=graphs)
        self.plain = GuidanceSession(scorer(), eos_token_ids=[EOS], graphs=False)
        self.device, self.exact = device, exact
        self.tolerance = 1e-5 if device == "cpu" else 1e-4
        self.vocab_size = self.plain.scorer.vocab_size
        self.handed: list[tuple[Any, Any]] = []

    def add(self, name: str, guided: Guided) -> None:
        for session in (self.graphed, self.plain):
            session.add({name: guided})

    def remove(self, names: Sequence[str]) -> None:
        for session in (self.graphed, self.plain):
            session.remove(names)

    def step(self, names: Sequence[str], logits: Tensor) -> Tensor:
        """Likeliest guided token of each row."""
        found, expected = (s.step(names, logits) for s in (self.graphed, self.plain))
        self.handed.append((found, expected))
        self.handed = self.handed[-3:]
        for one, other in self.handed:  # older ones too: nothing handed out is overwritten
            for field in dataclasses.fields(one):
                self.same(getattr(one, field.name), getattr(other, field.name))
        return expected.ids.gather(-1, expected.log_probs.argmax(-1, keepdim=True)).squeeze(-1)

    def commit(self, names: Sequence[str], tokens: Tensor) -> None:
        for session in (self.graphed, self.plain):
            session.commit(names, tokens)

    def check(self, names: Sequence[str]) -> None:
        for read in (GuidanceSession.values, GuidanceSession.remaining):
            self.same(*(torch.tensor(read(s, names)) for s in (self.graphed, self.plain)))

    def same(self, one: Tensor, other: Tensor) -> None:
        if self.exact or not one.dtype.is_floating_point:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=self.tolerance)


def live(pair: Pair, seed: int, num_steps: int, mixed: bool) -> None:
    """Requests come, step together or in parts, twice before a commit, and go."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    names: list[str] = []
    number = 0
    for _ in range(num_steps):
        while len(names) < rng.choice([1, 3, 5, 9]) or not names:
            goal = rng.choice(GOALS if mixed else GOALS[4:7:2])
            control = LengthControl.parse({**goal, "top_k": rng.choice([4, 8]) if mixed else 6})
            options = {"temperature": rng.choice([0.0, 0.7, 1.3])}
            if rng.random() < 0.3:
                options |= {"top_p": 0.8, "stop_token_ids": [7], "ignore_eos": rng.random() < 0.5}
            names.append(f"r{number}")
            number += 1
            pair.add(names[-1], Guided([1, 2], control, **options))
        for _ in range(rng.choice([1, 5])):
            some = names if rng.random() < 0.8 else rng.sample(names, rng.randint(1, len(names)))
            for _ in range(rng.choice([1, 1, 2])):
                logits = torch.randn(len(some), pair.vocab_size, generator=generator) * 3
                tokens = pair.step(some, logits.to(pair.device))
            kept = [i for i in range(len(some)) if rng.random() < 0.9]
            if kept:
                chosen = tokens if len(kept) == len(some) else tokens[kept]
                pair.commit([some[i] for i in kept], chosen)
        pair.check(names)
        gone = [n for n in names if rng.random() < 0.3]
        if gone:
            pair.remove(gone)
            names = [n for n in names if n not in gone]


def oracle(head: str) -> Callable[[], OracleScorer]:
    markov = Markov(SIZE, seed=3)

    def build_scorer() -> OracleScorer:
        scorer = OracleScorer(markov, head)
        scorer.vocab_size = SIZE
        return scorer

    return build_scorer


@given(seed=st.integers(0, 10**6), mixed=st.booleans())
@settings(max_examples=8)
def test_a_life_with_a_search_outside_of_graphs_equals_one_without(seed: int, mixed: bool):
    def search_plain(logits: Tensor, truncation: Truncation, params: RuleParams) -> Any:
        may_end, must_end = params.endings()
        return search(logits, truncation, may_end_R=may_end, must_end_R=must_end)

    live_searched(search_plain, seed, mixed)


def live_searched(search_fused: Callable[..., Any], seed: int, mixed: bool) -> None:
    """A life of a session whose candidates `search_fused` finds, beside one without."""
    pair = Pair(oracle("distribution"), graphs := StepGraphs(MockRecorder()))
    num_searches = 0

    def count(*given: Any) -> Any:
        nonlocal num_searches
        num_searches += 1
        return search_fused(*given)

    def find(*given: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:  # the other session searches as ever
            patch.setattr(session_module, "search_fused", count)
            return GuidanceSession._find(pair.graphed, *given)

    pair.graphed._find = find  # type: ignore[method-assign]
    live(pair, seed, 12, mixed)
    assert num_searches > 10
    assert graphs.num_replays
    assert not any("find_candidates" in str(key) for key in graphs._graphs), "logits were copied"


@pytest.mark.parametrize("padded", [False, True])
@given(seed=st.integers(0, 10**6), mixed=st.booleans())
@settings(max_examples=8)
def test_a_life_with_graphs_equals_one_without(padded: bool, seed: int, mixed: bool):
    """Bit for bit; where rows are padded the CPU's vector loops begin elsewhere and round so."""
    graphs = StepGraphs(MockRecorder())
    with pytest.MonkeyPatch.context() as patch:
        if not padded:
            patch.setattr(module, "bucket", lambda rows: rows)
        live(Pair(oracle("distribution"), graphs, exact=not padded), seed, 12, mixed)
    assert mixed or not padded or graphs.num_replays > 10


def test_the_scalar_head():
    pair = Pair(oracle("scalar"), graphs := StepGraphs(MockRecorder()))
    live(pair, 4, 20, mixed=False)
    assert graphs.num_replays > 20


def stepped(graphs: StepGraphs, num_rows: int, num_steps: int, goal: dict[str, Any]) -> Pair:
    pair = Pair(oracle("distribution"), graphs)
    names = [f"r{i}" for i in range(num_rows)]
    for name in names:
        pair.add(name, Guided([1, 2], LengthControl.parse(goal)))
    for i in range(num_steps):
        logits = torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(i))
        pair.commit(names, pair.step(names, logits))
    return pair


def test_a_shape_is_recorded_when_it_comes_the_third_time():
    for num_steps, num_replays in ((2, 0), (3, 3), (5, 9)):
        graphs = StepGraphs(MockRecorder())
        stepped(graphs, 3, num_steps, GOALS[0])
        assert graphs.num_replays == num_replays


def test_a_failed_capture_leaves_the_plain_way_and_one_warning(caplog):
    graphs = StepGraphs(MockRecorder(fails=True))
    with caplog.at_level(logging.WARNING):
        stepped(graphs, 3, 8, GOALS[7])
    assert graphs.num_replays == 0
    assert len(caplog.records) == 3  # the step's three parts, once each
    assert "out of luck" in caplog.text


def test_the_graph_not_used_for_longest_goes(monkeypatch):
    monkeypatch.setattr(module, "MAX_GRAPHS", 3)
    graphs = StepGraphs(MockRecorder())
    for num_rows in (1, 2, 4, 2):
        stepped(graphs, num_rows, 4, GOALS[0])
    assert len(graphs._graphs) == 3
    assert {key[1] for key in graphs._graphs} == {2}


def test_large_logits_share_a_buffer_or_run_plain(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 2 * SIZE)
    graphs = StepGraphs(MockRecorder())
    for num_rows in (8, 2, 4):
        stepped(graphs, num_rows, 5, GOALS[6])
    buffers = [g._given[0] for k, g in graphs._graphs.items() if "find_candidates" in k[0]]
    assert len(buffers) == 3
    assert len({b.untyped_storage().data_ptr() for b in buffers}) == 1
    monkeypatch.setattr(module, "MAX_NUMBERS", 8 * SIZE - 1)
    before = graphs.num_replays
    pair = stepped(graphs, 5, 5, GOALS[6])
    assert graphs.num_replays == before + 5, "what is read of the drawn tokens"
    pair.check([f"r{i}" for i in range(5)])


def test_a_users_own_rule_runs_plain(monkeypatch):
    calls = []

    def own(candidates, belief, params):
        calls.append(1)
        return candidates.log_probs - belief.length()

    for place in ("rules", "scoring"):
        monkeypatch.setattr(f"lenvm.guidance.{place}.find_rule", lambda name: own)
    graphs = StepGraphs(MockRecorder())
    pair = Pair(oracle("distribution"), graphs)
    control = LengthControl.parse({"at_most": 9, "rule": "soft"})
    pair.add("r", Guided([1], control.model_copy(update={"rule": "own"})))
    for _ in range(5):
        pair.commit(["r"], pair.step(["r"], torch.randn(1, SIZE)))
    assert len(calls) == 10
    assert graphs.num_replays == 3 + 3


def test_tokens_of_an_engines_batch():
    """Drawn from graphs too: greedy and sampled rows, requests that come and go, tokens that the
    engine throws away."""
    recorders = [MockRecorder(), None]
    batches = []
    for recorder in recorders:
        graphs = StepGraphs(recorder) if recorder else False
        session = GuidanceSession(oracle("distribution")(), eos_token_ids=[EOS], graphs=graphs)
        batches.append(GuidedBatch(session, seed=1))
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    names: list[str] = []
    for step in range(60):
        if step % 6 == 0:
            for name in names[:2]:
                for batch in batches:
                    batch.remove(name)
            names = [*names[2:], *(f"{step} {i}" for i in range(4 if step < 12 else 2))]
            for i, name in enumerate(n for n in names if n.startswith(f"{step} ")):
                control = LengthControl.parse({**GOALS[(step // 6 + i) % len(GOALS)], "top_k": 6})
                guided = Guided([1, 2], control, temperature=float(i % 2))
                for batch in batches:
                    batch.add(name, Admission(guided, failure_token_id=SIZE - 1))
        logits = torch.randn(len(names) + 1, SIZE, generator=generator) * 3
        forced = [logits.clone(), logits.clone()]
        kept = [n for n in names if rng.random() < 0.9]
        for batch, own in zip(batches, forced, strict=True):
            batch.step(names, range(1, len(names) + 1), own)
            batch.settle(kept)
            assert not any(batch.failure(n) for n in names)
        assert torch.equal(*forced)
    graphs = batches[0].session.graphs
    assert graphs is not None
    assert any(key[0][:2] == ("apply_rules", _draw_tokens) for key in graphs._graphs)


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 8, 9, 17, 24, 25, 33, 65, 97)] == [
        *(1, 2, 4, 8, 16, 24, 24, 32, 48, 96, 128)
    ]


def test_replayed_steps_neither_read_back_nor_transfer():
    graphs = StepGraphs(MockRecorder())
    session = GuidanceSession(MetaScorer(), eos_token_ids=[0, 7], graphs=graphs)
    goals = GOALS[:9]
    names = [f"r{i}" for i in range(len(goals))]
    session.add(
        {n: Guided([1, 2], LengthControl.parse(g)) for n, g in zip(names, goals, strict=True)}
    )
    tokens = torch.empty(len(goals), dtype=torch.int64, device=META)

    def step() -> None:
        session.step(names, torch.empty(len(goals), 64, device=META))
        session.commit(names, tokens)

    for _ in range(4):
        step()
    before = graphs.num_replays
    with Transfers() as transfers:
        step()
    assert graphs.num_replays == before + 3
    assert transfers.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head", ["scalar", "distribution"])
@pytest.mark.parametrize("fused", [True, False])
def test_real_graphs_equal_plain_steps(head: str, fused: bool, monkeypatch):
    if not fused:
        monkeypatch.setattr(session_module, "search_fused", lambda *_: None)
    torch.manual_seed(3)
    model = LengthValueModel.build(build("qwen2"), LenVMConfig(gamma=0.99, head=head)).eval().cuda()
    graphs = StepGraphs(CudaRecorder())

    def scorer() -> CandidateScorer:
        return CandidateScorer(model, max_tokens=4000, max_requests=16, max_candidates=8)

    monkeypatch.setattr(module, "LARGE", 4 * VOCAB)  # shared buffers as well
    for seed in range(3):
        pair = Pair(scorer, graphs, "cuda")
        live(pair, seed, 12, mixed=head == "distribution" and seed > 0)
    assert graphs.num_replays > 30
    assert not graphs._failed, "a capture failed: see the warnings"
    before = graphs.num_replays
    names = [f"s{i}" for i in range(5)]
    for name in names:
        pair.add(name, Guided([1, 2], LengthControl.parse({**GOALS[5], "top_k": 7})))
    logits = torch.randn(5, VOCAB, device="cuda")
    for _ in range(4):
        pair.graphed.commit(names, pair.graphed.step(names, logits).ids[:, 0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            pair.graphed.commit(names, pair.graphed.step(names, logits).ids[:, 0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphs.num_replays >= before + 6 * 3
