"""The in-process engine answers an evaluation's requests as a server does."""

import pytest

from lenvm.cli._engine_generator import EngineGenerator
from lenvm.engines.transformers import TransformersEngine
from lenvm.evals.generator import GenerationRequest, Sampling
from lenvm.guidance.request import LengthControl
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer


@pytest.fixture(scope="module")
def generator() -> EngineGenerator:
    value_model = LengthValueModel.build(
        tiny_backbone(seed=1), LenVMConfig(gamma=0.98, head="scalar", eos_token_ids=[EOS])
    )
    engine = TransformersEngine(
        tiny_generator(), tiny_tokenizer(), value_model, eos_token_ids=[EOS], max_requests=4
    )
    return EngineGenerator(engine, "tiny")


def request(name: str, text: str = "w7 w8", **fields) -> GenerationRequest:
    values = {"max_tokens": 12, "sampling": Sampling(seed=1), **fields}
    return GenerationRequest(name, ({"role": "user", "content": text},), **values)


def answers(generator, *requests):
    found = {}
    generator.generate(requests, lambda r: found.setdefault(r.id, r))
    return found


def test_every_request_is_answered_once(generator):
    control = LengthControl.parse({"equal_to": 5, "rule": "hard"})
    found = answers(
        generator, *(request(str(i), control=control) for i in range(9)), request("free")
    )
    assert len(found) == 10
    for answer in found.values():
        assert answer.error is None
        assert 1 <= answer.num_tokens <= 12
        assert answer.finish_reason in ("stop", "length")
        assert answer.mean_log_prob < 0
        assert answer.num_prompt_tokens == 4


def test_a_seed_gives_the_same_answer_again(generator):
    one, two = (answers(generator, request("a"))["a"].text for _ in range(2))
    assert one == two


def test_what_can_never_run_is_a_failed_answer_and_the_others_go_on(generator):
    found = answers(generator, request("long", max_tokens=5000), request("fine"))
    assert "the limit is 512" in found["long"].error
    assert found["fine"].error is None


def test_an_answer_is_continued_after_its_prefix(generator):
    found = answers(generator, request("plain"), request("more", answer_prefix="w9 w10 w11"))
    assert found["more"].num_prompt_tokens == found["plain"].num_prompt_tokens + 3


def test_what_the_engine_lacks_is_said(generator):
    assert generator.lacks("control") is None
    assert "distribution head" in generator.lacks("conditional")
    assert generator.lacks("eos_bias") is None
    assert generator.lacks("count_tokens") is None
    assert generator.count_tokens("w7 w8 w9") == 3
    bare = EngineGenerator(TransformersEngine(tiny_generator(), tiny_tokenizer()), "bare")
    assert "no value model" in bare.lacks("control")


def test_penalties_act_as_in_a_server(generator):
    long = {"max_tokens": 40, "eos_bias": -50.0}
    cold = {"a": Sampling(temperature=0), "b": Sampling(temperature=0, frequency_penalty=2.0)}
    made = [request(name, sampling=sampling, **long) for name, sampling in cold.items()]
    found = answers(generator, *made)
    repeated, varied = (len(set(found[name].text.split())) for name in "ab")
    assert varied > repeated


def test_a_bias_on_the_ending_token_makes_answers_shorter_and_a_decay_ends_them(generator):
    names = [str(i) for i in range(8)]

    def total(**fields) -> int:
        made = [request(n, max_tokens=60, sampling=Sampling(seed=int(n)), **fields) for n in names]
        return sum(a.num_tokens for a in answers(generator, *made).values())

    plain = total()
    assert total(eos_bias=3.0) < plain
    assert total(eos_decay=(4, 3.0)) < plain
