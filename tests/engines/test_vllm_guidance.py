"""Guidance in vLLM's batch: exact distributions, exact tokens whatever the scheduler does, and
failures that stay alone. The machines play vLLM; a Markov generator makes the truth known."""

import json
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.machine import Job, V1Machine, V2Machine, penalise, truncated
from guidance.oracle import EOS, GAMMA, Markov, OracleScorer
from lenvm.engines.adapter import FollowingBatch, GuidedBatch
from lenvm.engines.sampling import draw
from lenvm.engines.settings import GuidanceSettings
from lenvm.errors import CapacityError, InputError
from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import GuidanceSession, Guided

SIZE, VOCAB = 6, 8
FAILED = VOCAB - 1
MARKOV = Markov(size=SIZE, seed=3, end=0.05)
LOGITS = torch.full((SIZE, VOCAB), -40.0)
LOGITS[:, :SIZE] = torch.stack([MARKOV.logits(token) for token in range(SIZE)])
STAND_IN = Path(__file__).parent / "stand_in"


def model(tokens) -> torch.Tensor:
    return LOGITS[tokens[-1]].clone()


def config(**changes) -> Any:
    values = {
        "model_config": SimpleNamespace(
            model="g",
            tokenizer="g",
            seed=0,
            skip_tokenizer_init=True,
            is_multimodal_model=False,
            logits_processors=None,
            get_vocab_size=lambda: VOCAB,
        ),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
        "scheduler_config": SimpleNamespace(max_num_seqs=64),
        "cache_config": SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=0.7),
        "speculative_config": None,
    }
    return SimpleNamespace(**values | changes)


@pytest.fixture(scope="module", autouse=True)
def vllm(tmp_path_factory):
    """The real vLLM of LENVM_TEST_VLLM, or the stand-in; lenvm's class is made on top of it."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(os.environ.get("LENVM_TEST_VLLM", str(STAND_IN)))
    folder = tmp_path_factory.mktemp("value")
    facts = {"gamma": GAMMA, "head": "distribution"}
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    (folder / "lenvm.json").write_text(json.dumps(facts))
    patch.setenv("LENVM_MODEL", str(folder))
    patch.setenv("LENVM_VLLM_SIGN", str(folder / "guides"))
    import vllm

    yield vllm
    patch.undo()
    for name in [m for m in sys.modules if m.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.pop("lenvm.engines.vllm.guidance", None)


class Faulty(OracleScorer):
    """Raises where `plan` says, {(call, number): error}, before or after the call's effect."""

    def __init__(self, plan=None, after=False) -> None:
        super().__init__(MARKOV)
        self.plan, self.after, self.counts = dict(plan or {}), after, {}

    def _go(self, name, call):
        number = self.counts[name] = self.counts.get(name, 0) + 1
        fault = self.plan.pop((name, number), None)
        if fault is not None and not self.after:
            raise fault
        result = call()
        if fault is not None:
            raise fault
        return result

    def add(self, requests):
        return self._go("add", lambda: super(Faulty, self).add(requests))

    def score(self, *args, **more):
        return self._go("score", lambda: super(Faulty, self).score(*args, **more))

    def commit(self, *args, **more):
        return self._go("commit", lambda: super(Faulty, self).commit(*args, **more))


def processor(scorer=None, states=None, **changes) -> Any:
    from lenvm.engines.vllm.guidance import LengthGuidance

    scorer = scorer or OracleScorer(MARKOV)
    with pytest.MonkeyPatch.context() as patch:
        session = GuidanceSession(scorer, eos_token_ids=())
        patch.setattr(GuidanceSettings, "load_session", lambda self, device, tokenizer: session)
        device = torch.device("cpu")
        built = LengthGuidance(config(**changes), *([states] if states else [device, False]))
    built.scorer = scorer
    return built


def params(control=None, *, eos=EOS, **more) -> Any:
    from vllm import SamplingParams

    extra = {} if control is None else {"extra_args": {"lenvm": json.dumps(control)}}
    made = SamplingParams(**{"max_tokens": 40, **more, **extra})
    made._eos_token_id = eos
    return made


def plain_loop(job: Job, control: dict) -> list[int]:
    """The request alone: its own session, its own random numbers, one token after another."""
    p = job.params
    guided = Guided(
        job.prompt,
        LengthControl.parse(control),
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        stop_token_ids=[EOS],
    )
    session = GuidanceSession(OracleScorer(MARKOV), eos_token_ids=())
    session.add({"r": guided})
    stream, alone = random.Random(f"seed/{p.seed}"), Job(p, job.prompt)
    while not alone.is_done:
        logits = model([*job.prompt, *alone.tokens])
        for token, bias in (p.logit_bias or {}).items():
            logits[token] += bias
        logits = penalise(logits, alone)
        logits[FAILED] = -math.inf
        found = session.step(["r"], logits.unsqueeze(0))
        cold = torch.tensor([p.temperature == 0])
        index = draw(found.log_probs, torch.tensor([stream.random()]), greedy_R=cold)
        token = int(found.ids[0, index])
        session.commit(["r"], [token])
        alone.take(token)
    return alone.tokens


CONTROLS = [
    {"equal_to": 12, "rule": "soft", "strength": 20.0},
    {"equal_to": 9},
    {"at_least": 8, "at_most": 14, "rule": "conditional"},
    {"tilt": 4.0, "top_k": 4},
    {"equal_to": 7, "rule": "hard", "top_k": 3},
    {"tilt": -3.0, "min_entropy": 1.2},
]
SAMPLINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 3, "min_p": 0.05},
    {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.3},
    {"logit_bias": {2: 1.5, 3: -2.0}, "temperature": 1.3},
]


def submit_one(machine, number: int, kind: int, chunks: int = 1):
    """A request of one of the kinds; every fourth has no control."""
    sampling = {"seed": number, **SAMPLINGS[kind % len(SAMPLINGS)]}
    control = None if kind % 4 == 3 else CONTROLS[(kind // 2) % len(CONTROLS)]
    job = machine.submit(params(control, **sampling), [1 + number % (SIZE - 1)], chunks)
    return job, control


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_tokens_do_not_depend_on_what_the_scheduler_does(is_async, data):
    guidance = processor()
    machine = V1Machine(guidance, model, seats=5, is_async=is_async)
    jobs, places = [], st.lists(st.integers(0, 9), max_size=2)
    for _ in range(data.draw(st.integers(5, 25), label="steps")):
        for _ in range(data.draw(st.integers(0, 2), label="new")):
            kind = data.draw(st.integers(0, 35), label="kind")
            jobs.append(submit_one(machine, len(jobs), kind, data.draw(st.integers(1, 3))))
        swaps = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2))
        machine.step(data.draw(places, label="preempt"), swaps)
    machine.run()
    for job, control in jobs:
        if control is not None:
            assert job.tokens == plain_loop(job, control)
    assert not guidance.scorer.requests
    assert not guidance._rows.batch._penalties


needs_stand_in = pytest.mark.skipif(
    "LENVM_TEST_VLLM" in os.environ, reason="the real runner needs a GPU: benchmarks/engines.py"
)


class HookedRunner:
    """0.25's V2 runner, with lenvm inside its sampler, as `V2Machine` calls a processor."""

    def __init__(self, states) -> None:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        from lenvm.engines.vllm.runner import hook

        assert hook()
        assert hook()
        self.runner = GPUModelRunner(config(), states)
        self.scorer = OracleScorer(MARKOV)
        session = GuidanceSession(self.scorer, eos_token_ids=())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GuidanceSettings, "load_session", lambda self, device, tokenizer: session)
            self.runner.load_model()

    @classmethod
    def validate_params(cls, params) -> None:
        from lenvm.engines.vllm.guidance import LengthGuidance

        LengthGuidance.validate_params(params)

    def add_request(self, index, params) -> None:
        self.runner.sampler.add_request(index, 3, params)

    def apply(self, logits, context):
        lengths = torch.from_numpy(context.seq_lens_upper_bound_np)
        step = SimpleNamespace(
            idx_mapping_np=context.idx_mapping_np, seq_lens_cpu_upper_bound=lengths
        )
        return self.runner.sampler(logits, step)


@pytest.mark.parametrize(
    "build",
    [lambda states: processor(states=states), pytest.param(HookedRunner, marks=needs_stand_in)],
    ids=["v2", "0.25"],
)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_the_v2_runner_gives_the_same_tokens(build, data):
    machine = V2Machine(build, model, seats=5)
    jobs, places = [], st.lists(st.integers(0, 9), max_size=2)
    for _ in range(data.draw(st.integers(5, 25), label="steps")):
        for _ in range(data.draw(st.integers(0, 2), label="new")):
            kind = data.draw(st.integers(0, 35), label="kind")
            jobs.append(submit_one(machine, len(jobs), kind, data.draw(st.integers(1, 3))))
        machine.step(data.draw(places, label="preempt"), data.draw(places, label="skip"))
    machine.run()
    for job, control in jobs:
        if control is not None:
            assert job.tokens == plain_loop(job, control)
    if isinstance(machine.processor, HookedRunner):
        assert not machine.processor.scorer.requests  # each is freed with its request


def chi_square(counts: dict[int, int], probs: dict[int, float]) -> float:
    """p-value; a token that cannot be is a failure at once."""
    total = sum(counts.values())
    assert not [t for t in counts if probs.get(t, 0.0) <= 0], (counts, probs)
    cells = [(counts.get(t, 0), p * total) for t, p in probs.items() if p * total >= 5]
    chi2 = sum((n - e) ** 2 / e for n, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, chi2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("sampling", SAMPLINGS[2:], ids=["t-p", "k-minp", "penalties", "bias"])
def test_the_distribution_is_the_rule_over_the_requests_own_truncation(sampling):
    """Second token of a tilted request: q(x) ~ p(x) exp(-s u(x)), by hand from vLLM's own order."""
    scale, number = 4.0, 1200
    machine = V1Machine(processor(), model, seats=64)
    control = {"tilt": scale, "top_k": 15, "top_p": 1.0}
    jobs = [
        machine.submit(params(control, max_tokens=2, **sampling), [3], 1) for _ in range(number)
    ]
    machine.run()
    first = max(range(1, SIZE), key=lambda t: sum(j.tokens[0] == t for j in jobs))
    drawn = [job for job in jobs if job.tokens[0] == first and len(job.tokens) == 2]
    counts = {t: sum(job.tokens[1] == t for job in drawn) for t in range(VOCAB)}
    counts = {t: n for t, n in counts.items() if n}
    alone = Job(params(None, **sampling), [3], tokens=[first])
    logits = model([first])
    for token, bias in (alone.params.logit_bias or {}).items():
        logits[token] += bias
    logits[FAILED] = -math.inf
    probs = truncated(penalise(logits, alone), alone.params)
    belief = OracleScorer(MARKOV).belief(torch.arange(VOCAB))
    u = torch.where(torch.arange(VOCAB) == EOS, 0.0, -belief.value().double())
    tilted = probs * torch.exp(-scale * u)
    tilted /= tilted.sum()
    expected = {t: p for t, p in enumerate(tilted.tolist()) if p > 0}
    assert chi_square(counts, expected) > 1e-3, (counts, expected)


def test_ten_thousand_mixed_requests_leave_nothing_behind():
    guidance = processor()
    machine = V1Machine(guidance, model, seats=64, is_async=True)
    machine.sample = lambda row, job: int(row.argmax())
    source, submitted, most = random.Random(0), 0, 0
    while submitted < 10_000 or not machine.is_idle:
        while submitted < 10_000 and len(machine.waiting) < 16:
            control = CONTROLS[1] if source.random() < 0.5 else None
            machine.submit(params(control, max_tokens=source.randrange(1, 6)), [2])
            submitted += 1
        machine.step([source.randrange(64)] if source.random() < 0.3 else ())
        most = max(most, len(guidance.scorer.requests))
    machine.step()
    assert 10 < most <= 64
    assert not guidance.scorer.requests
    assert not guidance._rows.batch._states


FAULTS = {
    "add": ("add", RuntimeError("boom")),
    "score": ("score", torch.OutOfMemoryError("no memory")),
    "commit": ("commit", torch.OutOfMemoryError("no memory")),
    "capacity": ("score", CapacityError("the KV store is full")),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_ends_one_request_and_no_other(name, after):
    call, error = FAULTS[name]
    scorer = Faulty({(call, number): error for number in (2, 7)}, after)
    machine = V1Machine(processor(scorer), model, seats=4)
    jobs = [submit_one(machine, number, 4 * number) for number in range(12)]
    machine.run()
    failed = [job for job, _ in jobs if job.stop_reason == FAILED]
    assert len(failed) <= 2
    assert failed or name == "capacity"  # a call that succeeds when repeated harms nobody
    for job, control in jobs:
        assert job.is_done
        if job not in failed and control is not None:
            assert job.tokens == plain_loop(job, control)
    assert not scorer.requests


def test_a_scorer_that_always_fails_ends_its_requests_and_not_the_engine():
    scorer = OracleScorer(MARKOV)
    scorer.score = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("always"))
    machine = V1Machine(processor(scorer), model, seats=4)
    jobs = [submit_one(machine, number, number) for number in range(12)]
    machine.run()
    for job, control in jobs:
        assert (job.stop_reason == FAILED) == (control is not None)


def test_tensor_parallel_ranks_agree_even_where_guidance_fails():
    wire: list[torch.Tensor] = []
    scorer = Faulty({("score", 3): RuntimeError("boom")})

    def send(tokens):
        wire.append(tokens.clone())
        return tokens

    def receive(tokens):
        assert len(tokens) == len(wire[0])
        return wire.pop(0)

    from lenvm.engines.vllm.rows import BatchRows

    first = processor(scorer)
    first._rows.batch.share = send
    setting = GuidanceSettings.from_env()
    follower = BatchRows(FollowingBatch(receive), setting)

    class Both(type(first)):
        def __init__(self):
            self.logits = None

        def update_state(self, update):
            first.update_state(update)
            if update is not None:
                follower.update(update)

        def apply(self, logits):
            other = logits.clone()
            first.apply(logits)
            follower.apply(other)
            assert torch.equal(logits, other)
            return logits

    machine = V1Machine(Both(), model, seats=4)
    jobs = [submit_one(machine, number, number) for number in range(10)]
    machine.run()
    assert sum(job.stop_reason == FAILED for job, _ in jobs) == 1
    assert not wire


def test_equal_seeds_give_equal_answers_and_no_seed_different_ones():
    machine = V1Machine(processor(), model, seats=8)
    same = [machine.submit(params(CONTROLS[0], seed=5), [3]) for _ in range(2)]
    free = [machine.submit(params(CONTROLS[0]), [3]) for _ in range(6)]
    machine.run()
    assert same[0].tokens == same[1].tokens
    assert len({tuple(job.tokens) for job in free}) > 1


@pytest.mark.parametrize(
    ("control", "more", "says"),
    [
        ({"equal_to": 0}, {}, "equal_to is 0"),
        ({"equal_to": 5, "colour": 1}, {}, "colour"),
        ("not json", {}, "JSON object"),
        ({"equal_to": 5, "top_k": 9}, {}, "top_k 8 is over the 4"),
        ({"equal_to": 5}, {"thinking_token_budget": 9}, "thinking_token_budget"),
    ],
)
def test_what_cannot_be_served_is_refused_before_admission(control, more, says, monkeypatch):
    guidance = processor()
    text = control if isinstance(control, str) else json.dumps(control)
    bad = params(**more)
    bad.extra_args = {"lenvm": text}
    monkeypatch.setenv("LENVM_MAX_CANDIDATES", "4")
    with pytest.raises(ValueError, match=says):
        type(guidance).validate_params(bad)


def test_a_control_without_a_value_model_is_refused_and_others_pass(monkeypatch):
    guidance = processor()
    monkeypatch.delenv("LENVM_MODEL")
    with pytest.raises(ValueError, match="no value model"):
        type(guidance).validate_params(params(CONTROLS[0]))
    type(guidance).validate_params(params())
    inert = type(guidance)(config(), torch.device("cpu"), False)
    logits = torch.randn(2, VOCAB)
    assert torch.equal(inert.apply(logits.clone()), logits)


def test_without_a_guiding_worker_a_control_is_refused(monkeypatch, tmp_path):
    guidance = processor()
    monkeypatch.setenv("LENVM_VLLM_SIGN", str(tmp_path / "nobody"))
    with pytest.raises(ValueError, match="speculative decoding"):
        type(guidance).validate_params(params(CONTROLS[0]))
    type(guidance).validate_params(params())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speculative_config": object()}, "speculative"),
        (
            {"parallel_config": SimpleNamespace(pipeline_parallel_size=2, tensor_parallel_size=1)},
            "pipeline",
        ),
        ({"scheduler_config": SimpleNamespace(max_num_seqs=1024)}, "max-num-seqs 256"),
        (
            {
                "cache_config": SimpleNamespace(
                    kv_cache_memory_bytes=None, gpu_memory_utilization=0.92
                )
            },
            "gpu-memory-utilization",
        ),
    ],
)
def test_a_configuration_in_which_guidance_would_be_wrong_does_not_start(changes, says):
    with pytest.raises(InputError, match=says):
        processor(**changes)


def test_an_untested_release_does_not_start(monkeypatch):
    monkeypatch.setattr("lenvm.engines.vllm.guidance.TESTED", ("9.9",))
    with pytest.raises(InputError, match=r"tested: 9\.9"):
        processor()
    monkeypatch.setenv("LENVM_UNTESTED_ENGINE", "1")
    processor()


def test_the_newest_of_a_batch_is_sacrificed_to_an_error_that_names_nobody():
    failed = []
    scorer = Faulty({("score", 1): RuntimeError("boom")})
    batch = GuidedBatch(
        GuidanceSession(scorer, eos_token_ids=[EOS]), on_failure=lambda r, why: failed.append(r)
    )
    from lenvm.engines.adapter import Admission

    control = LengthControl.parse(CONTROLS[0])
    for name in ("old", "new"):
        batch.add(name, Admission(Guided([1], control), failure_token_id=FAILED))
    logits = torch.stack([model([1])] * 3)
    untouched = logits[1].clone()
    batch.step(["new", "old"], [0, 2], logits)
    assert failed == ["new"]
    assert int(logits[0].argmax()) == FAILED
    assert torch.equal(logits[1], untouched)
    assert batch.failure("old") is None


@needs_stand_in
def test_the_hooked_runner_refuses_what_the_processor_refuses():
    machine = V2Machine(HookedRunner, model)
    assert machine.processor.runner.sampler.lenvm.guidance._slots is not None
    with pytest.raises(ValueError, match="equal_to"):
        machine.submit(params({"equal_to": 0}), [1, 2])
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    other = GPUModelRunner(config(), machine.states, is_last=False)
    other.load_model()
    assert other.sampler is None


@needs_stand_in
def test_a_vllm_without_the_hooks_keeps_its_v1_runner(monkeypatch):
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from lenvm.engines.vllm.runner import hook

    monkeypatch.delattr(Sampler, "add_request")
    assert not hook()
