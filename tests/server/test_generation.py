"""Chat and plain completions as OpenAI's clients use them, with the length asked for."""

import json
import subprocess
import sys

import openai
import pytest

from lenvm.engines.transformers import TransformersEngine
from serving import CHAT, ask, serving, settle, stream, tiny_engine
from tiny import EOS, tiny_generator, tiny_pair, tiny_tokenizer


@pytest.fixture(scope="module")
def scalar():
    with serving(tiny_engine("scalar", max_candidates=16)) as found:
        yield found


def test_an_answer_has_openais_shape_and_the_prediction(client):
    reply = ask(client, length={"equal_to": 9}, seed=3, logprobs=True, top_logprobs=2)
    assert reply.status_code == 200
    body = reply.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    usage = body["usage"]
    assert usage["completion_tokens"] == 9
    assert usage["total_tokens"] == usage["prompt_tokens"] + 9
    assert usage["lenvm"]["predicted_length"] > 0
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 9
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert all(token["logprob"] < 0 for token in content)


def test_a_stream_carries_values_and_adds_up_to_the_whole(client):
    fields = {"length": {"equal_to": 12}, "seed": 4}
    whole = ask(client, **fields).json()["choices"][0]
    chunks = stream(client, stream_options={"include_usage": True}, **fields)
    *tokens, last = chunks
    assert (
        "".join(c["choices"][0]["delta"]["content"] for c in tokens) == whole["message"]["content"]
    )
    assert tokens[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in tokens][-1] == whole["finish_reason"]
    assert [c["lenvm"]["num_tokens"] for c in tokens] == list(range(1, 13))
    assert all(-1 < c["lenvm"]["value"] <= 0 for c in tokens)
    assert tokens[-1]["lenvm"]["remaining"] == 0
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["lenvm"]["predicted_length"] == tokens[0]["lenvm"]["predicted_length"]


def test_without_control_the_value_model_is_asked_only_on_request(client):
    assert all("lenvm" not in chunk for chunk in stream(client))
    assert all("lenvm" in chunk for chunk in stream(client, track_length=True))


def test_lenvm_sample_takes_token_ids_from_the_server_without_a_tokenizer(client, tmp_path):
    from lenvm.data.trajectory import read_trajectories

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "trajectories.jsonl"
    prompts.write_text(json.dumps({"prompt": "w7 w8 w9"}) + "\n")
    arguments = ["sample", str(prompts), "--endpoint", f"{client.base_url}/v1", "-n", "3"]
    command = [sys.executable, "-m", "lenvm", *arguments, "-o", str(out), "--max-tokens", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = list(read_trajectories(out))
    assert len(found) == 3
    for trajectory in found:
        assert trajectory.usage["completion_tokens"] == len(trajectory.completion_token_ids) <= 9
        assert trajectory.prompt_token_ids == found[0].prompt_token_ids
    plain = ask(client, seed=3).json()["choices"][0]
    assert "token_ids" not in plain


def test_several_choices_differ_and_repeat_with_their_seed(client):
    one, two = (ask(client, n=3, seed=9).json()["choices"] for _ in range(2))
    texts = [c["message"]["content"] for c in one]
    assert texts == [c["message"]["content"] for c in two]
    assert len(set(texts)) == 3
    assert [c["index"] for c in one] == [0, 1, 2]
    streamed = {0: "", 1: "", 2: ""}
    for chunk in stream(client, n=3, seed=9):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    assert list(streamed.values()) == texts


def test_stop_texts_never_appear(client):
    free = ask(client, seed=5, ignore_eos=True).json()["choices"][0]["message"]["content"]
    word = free.split()[6]
    cut = ask(client, seed=5, ignore_eos=True, stop=[f" {word}"]).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert free.startswith(cut["message"]["content"])
    assert word not in cut["message"]["content"].split()[1:]
    chunks = stream(client, seed=5, ignore_eos=True, stop=f" {word}")
    streamed = "".join(c["choices"][0]["delta"]["content"] for c in chunks)
    assert streamed == cut["message"]["content"]


def test_plain_completions_take_texts_and_token_ids(client):
    body = {"prompt": ["w7 w8", "w9"], "max_tokens": 5, "seed": 1, "logprobs": 2, "n": 2}
    found = client.post("/v1/completions", json=body | {"ignore_eos": True}).json()
    assert found["object"] == "text_completion"
    assert [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
    assert all(len(c["logprobs"]["tokens"]) == 5 for c in found["choices"])
    texts = [c["text"] for c in found["choices"]]
    ids = client.post("/v1/completions", json=body | {"prompt": [[7, 8], [9]], "ignore_eos": True})
    assert [c["text"] for c in ids.json()["choices"]] == texts


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probs_of_a_text_come_with_its_offsets(client, streamed):
    body = {"prompt": "w7 w8", "max_tokens": 6, "seed": 1, "logprobs": 1, "ignore_eos": True}
    if streamed:
        reply = client.post("/v1/completions", json=body | {"stream": True})
        events = [json.loads(x[6:]) for x in reply.text.split("\n\n") if x[6:7] == "{"]
        parts = [e["choices"][0] for e in events]
        text = "".join(p["text"] for p in parts)
        offsets = [o for p in parts for o in p["logprobs"]["text_offset"]]
    else:
        (found,) = client.post("/v1/completions", json=body).json()["choices"]
        text, offsets = found["text"], found["logprobs"]["text_offset"]
    starts = [i for i, c in enumerate(text) if c == " "]
    assert len(offsets) == 6
    assert offsets == (starts if text[0] == " " else [0, *starts])


def test_each_of_several_prompts_has_its_prediction(client):
    body = {"prompt": ["w7 w8", "w9"], "n": 2, "max_tokens": 5, "track_length": True}
    usages = [client.post("/v1/completions", json=body).json()["usage"]]
    ask_stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    events = client.post("/v1/completions", json=ask_stream).text.split("\n\n")
    usages.append(json.loads(events[-3][6:])["usage"])
    alone = [
        client.post("/v1/completions", json=body | {"prompt": p}).json()["usage"]["lenvm"]
        for p in body["prompt"]
    ]
    expected = [found["predicted_length"] for found in alone]
    for found in usages:
        assert found["lenvm"]["predicted_lengths"] == pytest.approx(expected, abs=1)


def test_with_a_guide_the_prediction_is_that_of_the_model_itself():
    engine = TransformersEngine(
        tiny_generator(), tiny_tokenizer(), tiny_pair(), eos_token_ids=[EOS]
    )
    with serving(engine) as client:
        body = CHAT | {"return_token_ids": True, "max_tokens": 9}
        for fields in ({"length": {"equal_to": 9}, "track_length": False}, {"track_length": True}):
            answer = client.post("/v1/chat/completions", json=body | fields).json()
            ids = answer["choices"][0]["prompt_token_ids"]
            expected = float(engine.value_model.read_ends([ids]).length()[0])
            assert answer["usage"]["lenvm"]["predicted_length"] == pytest.approx(expected, rel=1e-4)
            (row,) = client.post("/v1/length/predict", json={"token_ids": [ids]}).json()["data"]
            assert row["length"] == pytest.approx(expected, abs=1e-3)
            chunks = stream(client, **fields)
            (shown,) = {c["lenvm"]["predicted_length"] for c in chunks}
            assert shown == pytest.approx(expected, rel=1e-4)


def test_an_answer_is_continued(client):
    talk = [*CHAT["messages"], {"role": "assistant", "content": "w20 w21"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    reply = ask(client, messages=talk, **fields)
    plain = ask(client).json()["usage"]["prompt_tokens"]
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] == plain + 3 - 1  # w4 w20 w21, but no open turn


def test_the_baselines_of_the_evaluations_act(client):
    long = ask(client, logit_bias={"2": -100}, seed=2).json()
    assert long["usage"]["completion_tokens"] == CHAT["max_tokens"]
    short = ask(client, exponential_decay_length_penalty=[2, 9.0], seed=2).json()
    assert short["choices"][0]["finish_reason"] == "stop"
    assert short["usage"]["completion_tokens"] < 16


def test_a_penalty_changes_the_answer_and_not_what_its_log_probabilities_are(client):
    fields = {"temperature": 0, "ignore_eos": True, "logprobs": True, "max_tokens": 20}

    def words(**more) -> list[str]:
        choice = ask(client, **fields, **more).json()["choices"][0]
        assert sum(t["logprob"] for t in choice["logprobs"]["content"]) < 0
        return choice["message"]["content"].split()

    plain = words()
    neutral = {"frequency_penalty": 0, "presence_penalty": None, "repetition_penalty": 1}
    assert words(**neutral) == plain
    assert words(frequency_penalty=0.001, presence_penalty=None)[0] == plain[0]
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2}):
        assert len(set(words(**penalty))) > len(set(plain))
    assert words(repetition_penalty=8.0) != plain
    greedy = ask(client, **fields, n=2, frequency_penalty=2.0).json()["choices"]
    assert greedy[0]["message"] == greedy[1]["message"]
    chunks = stream(client, **fields, frequency_penalty=2.0)
    streamed = "".join(c["choices"][0]["delta"]["content"] for c in chunks)
    assert streamed == greedy[0]["message"]["content"]
    guided = {"length": {"equal_to": 9}, "frequency_penalty": 1.0, "seed": 2}
    one, two = (ask(client, **guided).json() for _ in range(2))
    assert one["usage"]["completion_tokens"] == 9
    assert one["choices"] == two["choices"]
    text = {"prompt": "w7 w8", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    answers = [
        client.post("/v1/completions", json=text | more).json()["choices"][0]["text"].split()
        for more in ({}, {"presence_penalty": 2.0})
    ]
    assert len(set(answers[1])) > len(set(answers[0]))
    settle(client)
    assert not client.state.engine._penalties


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("frequency_penalty", 2.5, "less than or equal to 2"),
        ("frequency_penalty", -2.5, "greater than or equal to -2"),
        ("presence_penalty", 3, "less than or equal to 2"),
        ("repetition_penalty", 0, "greater than 0"),
        ("repetition_penalty", 10.5, "less than or equal to 10"),
    ],
)
def test_a_penalty_out_of_range_is_refused_with_the_range(client, path, field, value, allowed):
    body = CHAT if "chat" in path else {"prompt": "w7"}
    reply = client.post(path, json=body | {field: value})
    assert reply.status_code == 422
    error = reply.json()["error"]
    assert (error["param"], error["value"]) == (field, str(value))
    assert allowed in error["allowed"]
    assert error["message"].startswith(f"{field} is {value}; allowed: ")


def test_the_default_length_leaves_room_for_what_is_asked():
    with serving(default_max_tokens=8) as client:
        body = {k: v for k, v in CHAT.items() if k != "max_tokens"}
        free = client.post("/v1/chat/completions", json=body | {"ignore_eos": True}).json()
        assert free["usage"]["completion_tokens"] == 8
        asked = client.post("/v1/chat/completions", json=body | {"length": {"equal_to": 30}})
        assert asked.json()["usage"]["completion_tokens"] == 30
        settle(client)


async def test_the_openai_client_works_unchanged(client):
    async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none") as sdk:
        (model,) = (await sdk.models.list()).data
        answer = await sdk.chat.completions.create(
            model=model.id, messages=CHAT["messages"], extra_body={"length": {"at_most": 7}}
        )
        assert answer.usage.completion_tokens <= 7
        assert answer.usage.lenvm["predicted_length"] > 0
        events = await sdk.chat.completions.create(
            model=model.id,
            messages=CHAT["messages"],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"length": {"equal_to": 7}},
        )
        chunks = [chunk async for chunk in events]
        assert chunks[-1].usage.completion_tokens == 7
        assert chunks[0].lenvm["remaining"] >= 0
        with pytest.raises(openai.UnprocessableEntityError, match=r"length\.equal_to is -1"):
            await sdk.chat.completions.create(
                model=model.id,
                messages=CHAT["messages"],
                extra_body={"length": {"equal_to": -1}},
            )


def test_the_openai_client_has_its_usual_parameters(client):
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as sdk:
        usual = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 12, "seed": 6, "n": 2}
        usual |= {"temperature": 0.8, "top_p": 0.9, "logprobs": True, "top_logprobs": 2}
        extra = {"top_k": 20, "min_p": 0.01, "length": {"at_least": 4}}
        one = sdk.chat.completions.create(**usual, stop=["w9"], extra_body=extra)
        two = sdk.chat.completions.create(**usual, stop=["w9"], extra_body=extra)
        texts = [c.message.content for c in one.choices]
        assert texts == [c.message.content for c in two.choices]
        assert not any("w9" in text for text in texts)
        assert len(one.choices[0].logprobs.content[0].top_logprobs) == 2
        streamed = ["", ""]
        for chunk in sdk.chat.completions.create(
            **usual, stop=["w9"], stream=True, extra_body=extra
        ):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert streamed == texts
        plain = sdk.completions.create(model="tiny", prompt="w7", max_tokens=3, logprobs=1)
        assert plain.choices[0].logprobs.text_offset[0] == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40])
@pytest.mark.parametrize(
    "fields",
    [{}, {"length": {"equal_to": 9}}, {"exponential_decay_length_penalty": [0, 100.0]}],
    ids=["free", "guided", "penalty"],
)
def test_next_to_no_temperature_is_greedy_and_hurts_nobody(client, temperature, fields):
    greedy, cold = (ask(client, temperature=t, **fields).json() for t in (0, temperature))
    if "length" in fields:  # where T = 0 still leaves the rule something to choose
        assert cold["usage"]["completion_tokens"] == 9
    else:
        texts = [reply["choices"][0]["message"]["content"] for reply in (greedy, cold)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"length": {"equal_to": -1}}, "length.equal_to"),
        ({"length": {"equal_to": 5, "top_p": 3}}, "length.top_p"),
        ({"length": {"equal_to": 5, "at_most": 9}}, "length"),
        ({"length": {}}, "length"),
        ({"length": {"equl_to": 5}}, "length.equl_to"),
        ({"length": {"equal_to": 5, "rule": "magic"}}, "length.rule"),
        ({"length": {"equal_to": 5, "top_k": 500}}, "length.top_k"),
        ({"length": {"equal_to": True}}, "length.equal_to"),
        ({"length": [1]}, "length"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temprature": 1.0}, "temprature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"2": 1e9}}, "logit_bias.2"),
        ({"exponential_decay_length_penalty": [-1, -1.0]}, "exponential_decay_length_penalty.0"),
        ({"top_logprobs": 3}, None),
        ({"length": {"equal_to": 50}, "max_tokens": 8}, "length.equal_to"),
        ({"length": {"at_least": 50}, "max_tokens": 8}, "length.at_least"),
        ({"length": {"equal_to": 9000}}, "length.equal_to"),
        ({"logit_bias": {"999": 1}}, "logit_bias.999"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(client, fields, param):
    reply = ask(client, **fields)
    assert reply.status_code in (400, 422), reply.text
    error = reply.json()["error"]
    if param is not None:
        assert error["param"] == param
    assert error["allowed"]
    assert error["type"] == "invalid_request_error"
    assert "chatcmpl" not in error["message"]


def test_what_is_wrong_with_the_whole_is_said_without_repeating_it(client):
    secret = CHAT | {"messages": [{"role": "user", "content": "w7 w8"}], "top_logprobs": 3}
    error = client.post("/v1/chat/completions", json=secret).json()["error"]
    assert error["message"] == "top_logprobs goes with logprobs true"
    error = ask(client, length={"at_least": 9, "at_most": 5}).json()["error"]
    assert error["message"].endswith("allowed: at_least up to at_most (9 > 5)")
    assert "tolerance" in ask(client, length={"equl_to": 5}).json()["error"]["allowed"]


@pytest.mark.parametrize("prompt", [[], [99_999_999], {}, [[]], 7])
def test_a_prompt_of_no_known_form_is_told_the_forms(client, prompt):
    error = client.post("/v1/completions", json={"prompt": prompt}).json()["error"]
    assert error["param"].startswith("prompt")
    assert "token ids" in error["allowed"]


def test_token_ids_over_the_vocabulary_are_named(client):
    error = client.post("/v1/completions", json={"prompt": [7, 999]}).json()["error"]
    assert error["param"] == "prompt"
    assert error["message"] == "prompt is 999; allowed: token ids from 0 to 63"


def test_a_body_without_its_type_or_none_at_all_is_told_so(client):
    url = "/v1/chat/completions"
    reply = client.post(url, content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    assert "content-type: application/json" in reply.json()["error"]["message"]
    assert client.post(url).json()["error"]["message"] == "the body is empty; send a JSON object"


def test_what_the_scalar_head_cannot_do_is_refused(scalar):
    error = ask(scalar, length={"equal_to": 5, "rule": "conditional"}).json()["error"]
    assert error["param"] == "length.rule"
    assert "distribution head" in error["allowed"]
    error = ask(scalar, length={"equal_to": 5, "top_k": 100}).json()["error"]
    assert error["param"] == "length.top_k"
    assert "16 candidates" in error["allowed"]
    assert ask(scalar, length={"equal_to": 5}).json()["usage"]["completion_tokens"] == 5


def test_a_server_without_value_model_serves_all_but_lengths():
    with serving(tiny_engine(None)) as client:
        assert ask(client).status_code == 200
        assert ask(client, length={"equal_to": 5}).json()["error"]["param"] == "length"
        assert ask(client, track_length=True).json()["error"]["param"] == "track_length"
        assert client.post("/v1/length/values", json={"text": "w7"}).status_code == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"messages": ',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "w7"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "w7"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "w7"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "w7"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "w7"}], "length": {"equal_to": '
        + b"9" * 4000
        + b"}}",
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": ' + b'{"a":' * 50_000,
        b'{"messages": [{"role": "user", "content": "w7"}], "user": "\\udc00", "nope\\ud800": 1}',
    ],
    ids=lambda raw: raw[-24:].decode("latin-1"),
)
def test_what_is_no_request_is_refused_and_the_next_is_answered(client, raw):
    reply = client.post(
        "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
    )
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["error"]["message"]
    assert ask(client).status_code == 200


def test_a_prompt_of_100000_tokens_is_refused_by_its_length(client):
    text = "w7 " * 100_000
    error = ask(client, messages=[{"role": "user", "content": text}]).json()["error"]
    assert "100002 tokens" in error["message"]
    assert error["allowed"] == "1 to 511 tokens"
    reply = client.post("/v1/completions", json={"prompt": [7] * 100_000})
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert client.post("/v1/completions", json={"prompt": [4000]}).status_code == 422
    assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
    assert len(json.dumps(error)) < 2000


@pytest.mark.parametrize("guide", [True, False])
def test_answers_are_followed_with_the_guide_or_without(tmp_path, guide):
    from lenvm.cli.serve import _load_engine

    tiny_generator().save_pretrained(tmp_path / "generator")
    tiny_tokenizer().save_pretrained(tmp_path / "generator")
    pair = tiny_pair()
    pair.save_pretrained(tmp_path / "pair")
    engine = _load_engine(
        str(tmp_path / "generator"), str(tmp_path / "pair"), "cpu", guide=guide, max_requests=2
    )
    num_layers = engine.session.scorer.decoder._cache.data.shape[0]
    assert num_layers == (1 if guide else 2)
