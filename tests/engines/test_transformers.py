"""The engine's batch: who joins, who leaves, who fails, and that nobody notices the others."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm.engines.sampling import SamplingParams, adjust
from lenvm.engines.transformers import Request, TransformersEngine
from lenvm.errors import CapacityError, ControlError, InputError, RequestError
from lenvm.guidance.request import LengthControl
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_generator, tiny_pair, tiny_tokenizer

PROMPT = (4, 9, 17, 5)


def build(head="scalar", **options) -> TransformersEngine:
    value_model = LengthValueModel.build(
        tiny_backbone(seed=1), LenVMConfig(gamma=0.98, head=head, eos_token_ids=[EOS])
    )
    values = {"max_requests": 8, "max_tokens": 4096, **options}
    return TransformersEngine(
        tiny_generator(), tiny_tokenizer(), value_model, eos_token_ids=[EOS], **values
    )


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return build()


def request(name: str, *, prompt=PROMPT, control=None, **sampling) -> Request:
    names = ("track", "predict", "index", "top_log_probs")
    extra = {k: sampling.pop(k) for k in names if k in sampling}
    values = {"max_tokens": 20, "seed": 5, "ignore_eos": True, **sampling}
    parsed = LengthControl.parse(control) if control else None
    return Request(name, prompt, SamplingParams.parse(values), parsed, **extra)


def run(engine, *requests):
    return {c.request.id: c for c in engine.generate(requests)}


def test_a_seeded_answer_does_not_depend_on_its_batch_mates(engine):
    target = request("a", control={"equal_to": 12, "rule": "soft"})
    alone = run(engine, target)["a"]
    others = [request(f"b{i}", prompt=(7, 8 + i), seed=i, max_tokens=5 + i) for i in range(6)]
    together = run(engine, *others, target)["a"]
    assert together.token_ids == alone.token_ids
    assert together.remaining == pytest.approx(alone.remaining, abs=1e-2)


def test_samples_of_one_prompt_share_its_keys_and_values(engine):
    prompt = tuple(range(3, 51))  # three pages of 16
    for i in range(4):
        engine.submit(request(str(i), prompt=prompt, index=i, max_tokens=4))
    engine.step()
    assert engine.decoder.num_tokens == len(prompt)
    while engine.num_unfinished:
        engine.step()
    assert engine.decoder.num_tokens == 0


def test_log_probabilities_are_the_generators_own(engine):
    fields = {"top_log_probs": 3, "temperature": 0.2, "top_k": 2, "logit_bias": {9: 50.0}}
    answer = run(engine, request("a", max_tokens=6, **fields))["a"]
    assert set(answer.token_ids) == {9}
    ids = torch.tensor([[*PROMPT, *answer.token_ids]])
    with torch.inference_mode():
        logits = tiny_generator()(ids).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert answer.log_probs == pytest.approx(expected[:, 9].tolist(), abs=1e-4)
    top = expected.topk(3)
    for step, row in enumerate(answer.top_log_probs):
        assert [p for _, p in row] == pytest.approx(top.values[step].tolist(), abs=1e-4)


def test_a_length_penalty_acts_after_its_start(engine):
    logits = torch.zeros(3, 8)
    logits[:, 2] = -2.0
    params = [SamplingParams(exponential_decay_length_penalty=(4, 1.5))] * 3
    changed = adjust(logits, params, [4, 5, 7], [2])
    assert changed[:, 2].tolist() == pytest.approx([-2.0, -1.0, -2 + 2 * (1.5**3 - 1)])
    assert adjust(logits, [SamplingParams()] * 3, [9] * 3, [2]) is logits
    ended = run(
        engine,
        request("a", exponential_decay_length_penalty=(5, 3.0), ignore_eos=False, max_tokens=60),
    )["a"]
    assert ended.finish_reason == "stop"
    assert len(ended.token_ids) < 30


def test_stop_texts_end_an_answer_before_them(engine):
    free = run(engine, request("a"))["a"]
    words = free.text.split()
    cut = run(engine, request("b", stop=[f"{words[4]}"]))["b"]
    at = words.index(words[4])
    assert cut.finish_reason == "stop"
    assert cut.text.split() == words[:at]


def test_a_request_that_fails_in_a_step_leaves_the_others_as_they_are(engine, monkeypatch):
    control = {"equal_to": 9, "rule": "soft"}
    expected = run(engine, request("good", control=control))["good"]
    step = engine.session.step
    calls = []

    def fail_once(ids, logits):
        calls.append(ids)
        if "bad" in ids and len(calls) > 3:
            raise RequestError(["bad"], InputError("no more room"))
        return step(ids, logits)

    monkeypatch.setattr(engine.session, "step", fail_once)
    done = run(engine, request("good", control=control), request("bad", control=control))
    assert done["bad"].finish_reason == "error"
    assert "no more room" in str(done["bad"].error)
    assert done["good"].token_ids == expected.token_ids
    assert engine.decoder.num_tokens == engine.session.scorer.decoder.num_tokens == 0


@pytest.mark.parametrize("call", ["add", "commit"])
def test_failures_of_other_calls_are_laid_on_their_requests(engine, monkeypatch, call):
    real = getattr(engine.session, call)

    def fail(requests, *rest):
        if "bad" in requests:
            raise RequestError(["bad"], InputError("told to"))
        return real(requests, *rest)

    monkeypatch.setattr(engine.session, call, fail)
    done = run(engine, request("bad", track=True), request("good", track=True), request("free"))
    assert {n: c.finish_reason for n, c in done.items()} == {
        "bad": "error",
        "good": "length",
        "free": "length",
    }
    assert engine.num_unfinished == 0


def test_a_cancelled_request_frees_its_room_at_once(engine):
    for name in ("a", "b"):
        engine.submit(request(name, control={"equal_to": 9}))
    engine.step()
    engine.cancel("a")
    assert "a" not in engine.decoder
    assert engine.num_unfinished == 1
    engine.cancel("b")
    assert engine.decoder.num_tokens == engine.session.scorer.decoder.num_tokens == 0


def test_an_abort_leaves_an_engine_that_works(engine):
    for i in range(9):
        engine.submit(request(str(i), track=i % 2 == 0))
    engine.step()
    ended = engine.abort(InputError("defect"))
    assert {c.finish_reason for c in ended} == {"error"}
    assert len(ended) == 9
    assert engine.decoder.num_tokens == 0
    assert run(engine, request("0"))["0"].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"control": {"equal_to": 5, "top_k": 40}}, "top_k"),
        ({"control": {"equal_to": 5, "rule": "conditional"}}, "rule"),
        ({"control": {"equal_to": 5, "gamma": 0.5}}, "gamma"),
        ({"control": {"equal_to": 5, "token_temperature": {"900": 2.0}}}, "token_temperature"),
    ],
)
def test_a_control_that_cannot_be_served_is_refused_before_it_runs(engine, fields, named):
    with pytest.raises(ControlError) as caught:
        engine.submit(request("a", **fields))
    assert caught.value.field == named
    assert engine.num_unfinished == 0


def test_what_can_never_run_is_refused(engine):
    with pytest.raises(CapacityError, match="limit of 512"):
        engine.submit(request("a", max_tokens=600))
    with pytest.raises(InputError, match="token 64"):
        engine.submit(request("a", prompt=(64,)))
    with pytest.raises(InputError, match="logit_bias"):
        engine.submit(request("a", logit_bias={99: 1.0}))


def test_values_and_remaining_agree_and_the_prediction_is_that_of_the_prompt(engine):
    answer = run(engine, request("a", track=True))["a"]
    assert len(answer.values) == len(answer.remaining) == len(answer.token_ids)
    assert all(-1 < v < 0 for v in answer.values)
    (raw,) = engine.value_model.read([list(PROMPT)])
    expected = float(engine.value_model.belief(raw[-1:]).length())
    assert answer.predicted_length == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's maps")
def test_weights_are_in_memory_once_they_were_read(tmp_path, monkeypatch):
    for module in ("packed_linear", "packed_layers"):  # packing reads what it copies
        monkeypatch.setattr(f"lenvm.model.{module}.can_pack", lambda *_: False)
    tiny_generator(vocab_size=100_000).save_pretrained(tmp_path)
    generator = AutoModelForCausalLM.from_pretrained(tmp_path)
    engine = TransformersEngine(generator, tiny_tokenizer(), eos_token_ids=[EOS])

    def read_kb() -> tuple[int, int]:
        """Size and resident part of the mapped weights."""
        text = Path("/proc/self/smaps").read_text().partition(str(tmp_path))[2]
        numbers = dict(line.split(":") for line in text.splitlines()[1:8])
        return tuple(int(numbers[name].split()[0]) for name in ("Size", "Rss"))

    size, before = read_kb()
    assert before < size / 2
    engine.read_weights()
    assert read_kb()[1] > 0.99 * size


def build_pair(**options) -> TransformersEngine:
    return TransformersEngine(
        tiny_generator(), tiny_tokenizer(), tiny_pair(), eos_token_ids=[EOS], **options
    )


def test_a_guide_steers_as_it_would_alone_and_the_model_predicts_where_asked(monkeypatch):
    pair = build_pair()
    model = pair.value_model
    control = {"equal_to": 12, "tolerance": 0.3}
    requests = [
        request("plain", control=control),
        *(request(f"n{i}", control=control, index=i, predict=True) for i in range(3)),
        request("other", prompt=(8, 9), track=True),
    ]
    alone = TransformersEngine(tiny_generator(), tiny_tokenizer(), model.guide, eos_token_ids=[EOS])
    expected = run(alone, *requests)
    calls = []
    predictor = pair.session.predictor
    read = predictor.read_ends
    monkeypatch.setattr(predictor, "read_ends", lambda ids: calls.append(len(ids)) or read(ids))
    found = run(pair, *requests)
    for name, completion in found.items():
        assert completion.token_ids == expected[name].token_ids
        assert completion.remaining == expected[name].remaining
    assert calls == [2]  # one forward over the two prompts that somebody asked for
    assert found["plain"].predicted_length is None
    lengths = model.read_ends([PROMPT, (8, 9)]).length().tolist()
    predicted = [found[f"n{i}"].predicted_length for i in range(3)]
    assert predicted == pytest.approx([lengths[0]] * 3, rel=1e-4)
    assert found["other"].predicted_length == pytest.approx(lengths[1], rel=1e-4)
    assert expected["n0"].predicted_length != pytest.approx(lengths[0], rel=1e-2)


def test_no_prediction_is_read_where_nobody_asks(monkeypatch):
    pair = build_pair()
    monkeypatch.setattr(pair.session.predictor, "read_ends", None)
    goal = {"equal_to": 9}
    done = run(pair, *(request(str(i), control=goal, index=i, ignore_eos=False) for i in range(4)))
    assert all(len(c.token_ids) == 9 for c in done.values())


def test_a_prompt_that_cannot_be_predicted_fails_alone(monkeypatch):
    pair = build_pair()
    read = pair.session.predictor.read_ends

    def failing(sequences):
        if any(tuple(ids) == (8, 9) for ids in sequences):
            raise InputError("cannot be read")
        return read(sequences)

    monkeypatch.setattr(pair.session.predictor, "read_ends", failing)
    fields = {"control": {"equal_to": 6}, "predict": True, "ignore_eos": False}
    done = run(pair, request("good", **fields), request("bad", prompt=(8, 9), **fields))
    assert done["bad"].finish_reason == "error"
    assert "cannot be read" in str(done["bad"].error)
    assert done["good"].predicted_length > 0
    assert len(done["good"].token_ids) == 6
    assert pair.decoder.num_tokens == pair.session.scorer.decoder.num_tokens == 0
