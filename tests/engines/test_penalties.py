"""vLLM's penalties against its formula token by token, in any batch, free and under a control."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.machine import Job, penalise
from engines.test_transformers import PROMPT, build, request, run
from guidance.test_no_waiting import Transfers
from lenvm.engines import penalties
from lenvm.engines.penalties import Penalties
from lenvm.engines.sampling import SamplingParams, adjust, draw, truncate
from lenvm.errors import InputError
from lenvm.guidance.scorer import CandidateScorer
from lenvm.guidance.session import GuidanceSession
from tiny import EOS, VOCAB_SIZE, tiny_generator

PENALTIES = [
    {"frequency_penalty": 0.7},
    {"presence_penalty": 1.1},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "frequency_penalty": -0.5, "presence_penalty": 0.2},
]
CONTROLS = [
    {"equal_to": 12, "rule": "soft", "strength": 10.0},
    {"at_most": 9, "rule": "hard"},
    {"tilt": 5.0, "min_entropy": 0.5},
]
FIELDS = st.fixed_dictionaries(
    {
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.3, 2.0, -2.0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5, -1.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.5, 10.0]),
    }
)


@pytest.mark.parametrize("at_once", [2, 64])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_batch_is_penalised_as_vllm_does_it_and_its_rows_do_not_matter_to_each_other(
    at_once, data, seed
):
    """Requests come, resume, step in any order, and go; each row is that of its request alone."""
    generator, source, width = torch.Generator().manual_seed(seed), random.Random(seed), 11
    batch, jobs, alone = Penalties(), {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penalties, "ROWS_AT_ONCE", at_once)
        for step in range(data.draw(st.integers(1, 8), label="steps")):
            for k in range(data.draw(st.integers(0, 4), label="new")):
                name, params = f"{step}-{k}", SamplingParams(**data.draw(FIELDS))
                prompt = [source.randrange(width) for _ in range(3)]
                jobs[name] = Job(params, prompt, tokens=[source.randrange(width)] * (k % 3))
                alone[name] = Penalties()
                for each in (batch, alone[name]):
                    each.add(name, params, prompt, tuple(jobs[name].tokens))
            names = source.sample(sorted(jobs), source.randint(0, len(jobs)))
            logits = torch.randn(len(names), width, generator=generator) * 4
            logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
            found = logits.clone()
            batch.apply(names, found)
            tokens = torch.randint(width, (len(names),), generator=generator)
            batch.count(names, tokens)
            for row, name in enumerate(names):
                single = logits[row : row + 1].clone()
                alone[name].apply([name], single)
                alone[name].count([name], tokens[row : row + 1])
                assert torch.equal(single[0], found[row])
                expected = penalise(logits[row], jobs[name])
                torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
                if name not in batch:
                    assert torch.equal(found[row], logits[row])
                jobs[name].tokens.append(int(tokens[row]))
            for name in source.sample(sorted(jobs), len(jobs) // 3):
                del jobs[name], alone[name]
                batch.remove(name)
        for name in jobs:
            batch.remove(name)
    assert not batch
    assert batch._seen_SV is None


def test_a_step_of_the_same_requests_neither_reads_back_nor_transfers():
    batch, names = Penalties(), [str(i) for i in range(9)]
    for name in names[:6]:
        batch.add(name, SamplingParams(repetition_penalty=1.2, presence_penalty=1), PROMPT)

    def step() -> None:
        batch.apply(names, torch.empty(9, 50, device="meta"))
        batch.count(names, torch.empty(9, dtype=torch.long, device="meta"))

    step()
    with Transfers() as transfers:
        step()
        step()
    assert transfers.found == []


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e-9, 10.0])
def test_no_penalty_makes_a_logit_that_is_no_number(penalty):
    logits = torch.tensor([[30.0, -20.0, 0.0, -torch.inf]])
    batch = Penalties()
    batch.add("a", SamplingParams(repetition_penalty=penalty), [0, 1, 2, 3])
    batch.apply(["a"], logits)
    assert not logits.isnan().any()
    assert not (logits == torch.inf).any()
    assert int(logits.argmax()) == 0


# -- in the engine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    return build("distribution", max_candidates=16)


def plain_answer(engine, asked) -> list[int]:
    """The request alone, by a whole forward a token and the formula: the generator, a session of
    its own, one random number a token."""
    model, sampling = tiny_generator(), asked.sampling
    session = None
    if asked.control is not None:
        session = GuidanceSession(
            CandidateScorer(engine.value_model, max_candidates=16), eos_token_ids=[EOS]
        )
        session.add({"r": asked.to_guided()})
    stream, job = sampling.random_stream(asked.index), Job(sampling, list(asked.prompt_token_ids))
    cold = torch.tensor([sampling.temperature == 0])
    while len(job.tokens) < sampling.max_tokens:
        with torch.inference_mode():
            ids = torch.tensor([[*job.prompt, *job.tokens]])
            logits = model(ids).logits[0, -1].float()
        logits = logits.clone()
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        logits, uniform = penalise(logits, job)[None], torch.tensor([stream.random()])
        if session is None:
            token = int(draw(truncate(logits, [sampling]), uniform, greedy_R=cold))
        else:
            found = session.step(["r"], logits)
            token = int(found.ids[0, draw(found.log_probs, uniform, greedy_R=cold)])
            session.commit(["r"], [token])
        job.tokens.append(token)
        if token == EOS and not sampling.ignore_eos:
            break
    return job.tokens


def mixed(**fields):
    """Requests of every kind, with and without penalties."""
    sampling = [{}, {"temperature": 0}, {"top_k": 5}, {"logit_bias": {9: 1.0}, "top_p": 0.9}]
    requests = []
    for kind in range(12):
        control = CONTROLS[kind % 3] if kind % 2 else None
        values = {**sampling[kind % 4], **PENALTIES[(kind // 2) % 4], **fields}
        requests.append(request(str(kind), control=control, seed=kind, **values))
    free = [request(f"free{i}", seed=i, control=CONTROLS[i] if i else None) for i in range(3)]
    return [*requests, *free]


def test_free_and_guided_answers_are_those_of_the_formula_whoever_their_batch_mates_are(engine):
    requests = mixed()
    together = run(engine, *requests)
    assert {c.error for c in together.values()} == {None}
    for asked in requests:
        assert together[asked.id].token_ids == plain_answer(engine, asked), asked
        assert run(engine, asked)[asked.id].token_ids == together[asked.id].token_ids
    assert not engine._penalties


def test_penalties_change_answers(engine):
    plain = run(engine, request("a", temperature=0, max_tokens=30))["a"]
    less, more = (
        run(engine, request("a", temperature=0, max_tokens=30, **fields))["a"]
        for fields in ({"frequency_penalty": 2.0}, {"frequency_penalty": -2.0})
    )
    distinct = [len(set(c.token_ids)) for c in (more, plain, less)]
    assert distinct[0] <= distinct[1] < distinct[2]


@pytest.mark.parametrize("control", [None, CONTROLS[0]])
def test_log_probabilities_stay_the_generators_own(engine, control):
    fields = {"frequency_penalty": 2.0, "repetition_penalty": 2.0, "top_log_probs": 2}
    answer = run(engine, request("a", control=control, max_tokens=8, **fields))["a"]
    ids = torch.tensor([[*PROMPT, *answer.token_ids]])
    with torch.inference_mode():
        logits = tiny_generator()(ids).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    own = expected.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    assert answer.log_probs == pytest.approx(own.tolist(), abs=1e-4)
    for step, row in enumerate(answer.top_log_probs):
        assert [p for _, p in row] == pytest.approx(expected[step].topk(2)[0].tolist(), abs=1e-4)


def test_samples_of_one_prompt_have_counts_of_their_own_and_repeat(engine):
    many = [request(str(i), index=i, frequency_penalty=1.5) for i in range(4)]
    one, two = run(engine, *many), run(engine, *reversed(many))
    for asked in many:
        assert one[asked.id].token_ids == two[asked.id].token_ids == plain_answer(engine, asked)
    assert len({tuple(c.token_ids) for c in one.values()}) == 4


def test_a_request_without_penalties_has_no_counts_and_those_that_leave_free_theirs(engine):
    engine.submit(request("a"))
    engine.step()
    assert engine._penalties._seen_SV is None
    for name in "bcd":
        engine.submit(request(name, presence_penalty=1.0))
    engine.step()
    assert engine._penalties._seen_SV.shape[1] == VOCAB_SIZE
    assert len(engine._penalties) == 3
    engine.cancel("b")
    assert len(engine._penalties) == 2
    engine.abort(InputError("over"))
    assert not engine._penalties
    assert run(engine, request("b", presence_penalty=1.0))["b"].finish_reason == "length"


def test_stop_texts_and_endings_are_those_of_the_penalised_answer(engine):
    free = run(engine, request("a", frequency_penalty=1.0))["a"]
    word = free.text.split()[4]
    cut = run(engine, request("a", frequency_penalty=1.0, stop=[word]))["a"]
    assert cut.finish_reason == "stop"
    assert free.text.startswith(cut.text)
    assert word not in cut.text.split()


def test_adjust_leaves_the_logits_of_penalised_rows_to_the_caller_in_a_copy():
    logits = torch.randn(2, 5)
    params = [SamplingParams(), SamplingParams(presence_penalty=0.1)]
    copy = adjust(logits, params, [0, 0], [2])
    assert copy is not logits
    assert torch.equal(copy, logits)
    assert adjust(logits, params[:1] * 2, [0, 0], [2]) is logits


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1.* less than or equal to 2"),
        ({"frequency_penalty": -3}, "greater than or equal to -2"),
        ({"presence_penalty": 9}, "presence_penalty is 9.* less than or equal to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.* greater than 0"),
        ({"repetition_penalty": 11}, "less than or equal to 10"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ],
)
def test_a_penalty_out_of_range_is_named_with_what_is_allowed(fields, allowed):
    with pytest.raises(InputError, match=allowed):
        SamplingParams.parse(fields)


def test_manifests_of_runs_without_penalties_are_as_they_were_before():
    fields = {"temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop"}
    fields |= {"stop_token_ids", "ignore_eos", "logit_bias", "exponential_decay_length_penalty"}
    assert SamplingParams().to_json().keys() == fields
    more = SamplingParams(frequency_penalty=0.3).to_json()
    assert more.keys() - fields == {"frequency_penalty"}
