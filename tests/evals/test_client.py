"""The HTTP generator and the probe against a real local server."""

import socket

import pytest

from evals.stub import Stub, find_control, running, say
from lenvm.errors import EndpointError, InputError
from lenvm.evals.client import connect
from lenvm.evals.generator import GenerationRequest, Sampling
from lenvm.evals.probe import describe, probe
from lenvm.evals.wire import build_body, parse_completion, reports_generator
from lenvm.guidance.request import LengthControl


def request(name: str = "a", **fields) -> GenerationRequest:
    return GenerationRequest(name, ({"role": "user", "content": "Hi"},), 64, **fields)


def answers(generator, requests):
    found = {}
    generator.generate(requests, lambda r: found.setdefault(r.id, r))
    return found


@pytest.mark.parametrize("engine", ["lenvm", "vllm", "sglang"])
def test_a_server_with_the_plugin_is_found_by_its_wire_form(engine):
    with running(Stub(plugin=engine)) as stub:
        generator = connect(stub.url)
        control = LengthControl.parse({"equal_to": 5, "rule": "soft"})
        found = answers(generator, [request(control=control)])["a"]
    assert generator.endpoint.engine == engine
    assert generator.lacks("control") is None
    assert (found.num_tokens, found.finish_reason) == (5, "stop")
    assert find_control(stub.bodies[-1]) == {"equal_to": 5, "rule": "soft"}


def test_a_server_without_the_plugin_is_told_from_one_with_it():
    with running(Stub(plugin=None, owner="vllm")) as stub:
        generator = connect(stub.url)
    assert generator.endpoint.engine == "vllm"
    assert "no lenvm plugin" in generator.lacks("control")
    assert "no lenvm plugin" in generator.lacks("conditional")
    assert "no exponential_decay" in generator.lacks("eos_decay")
    assert "no length control" in describe(generator.endpoint)


def test_a_scalar_head_is_known_to_lack_the_conditional_rule():
    with running(Stub(distribution=False, decay=True)) as stub:
        generator = connect(stub.url)
    assert generator.lacks("control") is None
    assert "distribution head" in generator.lacks("conditional")
    assert generator.lacks("eos_decay") is None


def test_an_answer_carries_tokens_and_the_mean_log_probability():
    def answer(body):
        reply = say("one two.", 3)
        reply["choices"][0]["logprobs"]["content"] = [{"logprob": v} for v in (-1, -2, -6)]
        return reply

    with running(Stub(answer=answer)) as stub:
        found = answers(connect(stub.url), [request()])["a"]
    assert (found.text, found.num_tokens, found.num_prompt_tokens) == ("one two.", 3, 7)
    assert found.mean_log_prob == pytest.approx(-3)
    assert found.last_log_prob == -6
    assert found.latency_s > 0


def test_log_probabilities_of_a_changed_distribution_are_not_taken_for_the_generators():
    control = LengthControl.parse({"equal_to": 5})
    changed = [request("a", control=control), request("b", sampling=Sampling(temperature=0.5))]
    with running(Stub(plugin="sglang")) as stub:
        generator = connect(stub.url)
        found = answers(generator, [*changed, request("c")])
    assert [found[name].mean_log_prob for name in "abc"] == [None, None, -1.0]
    assert [found[name].last_log_prob for name in "abc"] == [None, None, -1.0]
    with running(Stub(plugin="vllm")) as stub:
        generator = connect(stub.url)
        found = answers(generator, changed)
    assert [found[name].mean_log_prob for name in "ab"] == [-1.0, -1.0]


def test_a_failing_request_is_retried_then_an_answer_with_an_error():
    tries = []

    def fail(body):
        tries.append(body)
        return 500 if body["max_tokens"] == 63 else None

    with running(Stub(fail=fail)) as stub:
        generator = connect(stub.url, max_retries=1)
        bad = GenerationRequest("bad", ({"role": "user", "content": "Hi"},), 63)
        found = answers(generator, [request("good"), bad])
    assert found["good"].error is None
    assert found["bad"].error.startswith("HTTP 500")
    assert len([b for b in tries if b["max_tokens"] == 63]) == 2


def test_an_answer_that_is_no_completion_is_an_error():
    with running(Stub(answer=lambda body: {"choices": []})) as stub:
        found = answers(connect(stub.url), [request()])["a"]
    assert "not a chat completion" in found.error


def test_a_dead_server_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="does not answer"):
            probe(url)


def test_a_server_that_dies_ends_the_run():
    with running(Stub()) as stub:
        generator = connect(stub.url, concurrency=2, max_retries=0)
    with pytest.raises(EndpointError, match="stopped answering"):
        answers(generator, (request(str(i)) for i in range(100)))


def test_what_keeping_an_answer_raises_ends_the_run():
    def keep(response):
        raise OSError(28, "No space left on device")

    with running(Stub()) as stub, pytest.raises(OSError, match="No space"):
        connect(stub.url).generate([request(str(i)) for i in range(5)], keep)


def test_several_models_need_a_choice():
    with running(Stub(models=("one", "two"))) as stub:
        with pytest.raises(EndpointError, match="one, two"):
            probe(stub.url)
        with pytest.raises(EndpointError, match="not 'three'"):
            probe(stub.url, model="three")
        assert probe(stub.url, model="two").model == "two"


@pytest.mark.parametrize(
    ("url", "engine"), [("localhost:8000", "auto"), ("http://localhost/v1", "tgi")]
)
def test_bad_addresses_and_engines_are_refused(url, engine):
    with pytest.raises(InputError):
        probe(url, engine=engine)


def test_concurrency_is_used_and_bounded():
    running_now, most = [0], [0]

    def delay(body):
        running_now[0] += 1
        most[0] = max(most[0], running_now[0])
        return 0.05

    def answer(body):
        running_now[0] -= 1
        return say("x.", 2)

    with running(Stub(delay_s=delay, answer=answer)) as stub:
        generator = connect(stub.url, concurrency=4)
        running_now[0] = 0
        most[0] = 0
        assert len(answers(generator, (request(str(i)) for i in range(20)))) == 20
    assert most[0] == 4


def test_bodies_hold_what_was_asked_for_and_nothing_else():
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=15, min_p=0.01, seed=3)
    plain = build_body(request(), "openai", "m", ())
    assert plain == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 64,
        "temperature": 1.0,
        "top_p": 1.0,
        "logprobs": True,
    }
    full = build_body(
        request(sampling=sampling, eos_bias=2.5, eos_decay=(10, 1.1), answer_prefix="So"),
        "vllm",
        "m",
        (2, 5),
    )
    assert full["logit_bias"] == {"2": 2.5, "5": 2.5}
    assert full["exponential_decay_length_penalty"] == [10, 1.1]
    assert full["messages"][-1] == {"role": "assistant", "content": "So"}
    assert full["continue_final_message"] is True
    assert full["add_generation_prompt"] is False
    assert (full["top_k"], full["min_p"], full["seed"]) == (15, 0.01, 3)
    penalties = {"frequency_penalty": 0.3, "presence_penalty": -0.5, "repetition_penalty": 1.05}
    for name, value in penalties.items():
        own = request(sampling=Sampling(**{name: value}))
        assert build_body(own, "openai", "m", ()) == plain | {name: value}
        assert reports_generator(own, "lenvm")
        assert not reports_generator(own, "sglang")


def test_a_completion_without_log_probabilities_has_none():
    body = say("x", 2)
    body["choices"][0]["logprobs"] = None
    assert parse_completion(body)["mean_log_prob"] is None
    assert parse_completion(body)["last_log_prob"] is None


def test_a_server_that_leaves_out_the_ending_token_tells_nothing_of_the_ending():
    body = say("x", 3)
    del body["choices"][0]["logprobs"]["content"][-1]
    assert parse_completion(body)["last_log_prob"] is None
    assert parse_completion(body)["mean_log_prob"] == -1.0
