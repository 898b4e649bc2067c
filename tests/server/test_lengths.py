"""The value endpoints, against the value model itself."""

import pytest
import torch

from lenvm.evals.prediction.predictors import EndpointPredictor, ValueModelPredictor
from lenvm.model.prediction import predict_lengths
from serving import serving, tiny_engine
from tiny import EOS


@pytest.fixture(scope="module")
def scalar():
    with serving(tiny_engine("scalar")) as found:
        yield found


def test_values_are_those_of_the_value_model(client):
    sequences, positions = [[7, 8, 9, 10], [11], [12, 13]], [[0, 3], [0], []]
    remote = EndpointPredictor(f"{client.base_url}/v1")
    model = client.state.engine.value_model
    local = ValueModelPredictor(model, "tiny")
    assert (remote.gamma, remote.head) == (local.gamma, local.head)
    found = remote.read(sequences, positions)
    for one, two in zip(found, local.read(sequences, positions), strict=True):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert a["value"] == pytest.approx(b["value"], abs=1e-5)
            assert a["length"] == pytest.approx(b["length"], abs=1)
            assert set(a["quantiles"]) == {"0.1", "0.5", "0.9"}


def test_texts_and_conversations_come_with_their_tokens(client):
    body = {"text": ["w7 w8 w9", "w7"], "quantiles": [0.25]}
    reply = client.post("/v1/length/values", json=body).json()
    assert reply["tokens"] == [["w7", "w8", "w9"], ["w7"]]
    assert reply["token_ids"] == [[7, 8, 9], [7]]
    assert [len(row) for row in reply["lengths"]] == [3, 1]
    assert reply["values"][0][2]["quantiles"]["0.25"] <= reply["lengths"][0][2]
    talk = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w9 w10"}]
    reply = client.post("/v1/length/values", json={"messages": talk}).json()
    assert reply["tokens"][0][-2:] == ["w9", "w10"]


def test_predictions_of_a_batch_come_in_its_order(client):
    prompts = ["w7 w8 w9 " * k for k in (1, 40, 3, 20)]
    body = {"prompts": prompts, "budget": 100}
    reply = client.post("/v1/length/predict", json=body).json()
    ids = [[4, *[7, 8, 9] * k, 5] for k in (1, 40, 3, 20)]
    expected = predict_lengths(client.state.engine.value_model, ids, budget=100)
    assert [row["index"] for row in reply["data"]] == [0, 1, 2, 3]
    for row, numbers, tokens in zip(reply["data"], expected, ids, strict=True):
        assert row["prompt_tokens"] == len(tokens)
        assert row["median"] == pytest.approx(numbers["p50"], abs=1)
        assert row["interval_80"][0] <= row["median"] <= row["interval_80"][1]
        assert row["p_within_budget"] == pytest.approx(numbers["p_within_budget"], abs=1e-4)


def test_a_scalar_head_predicts_a_length_and_refuses_a_budget(scalar):
    reply = scalar.post("/v1/length/predict", json={"prompts": ["w7"]}).json()
    assert reply["head"] == "scalar"
    assert reply["data"][0]["length"] > 0
    assert "median" not in reply["data"][0]
    error = scalar.post("/v1/length/predict", json={"prompts": ["w7"], "budget": 9}).json()["error"]
    assert error["param"] == "budget"


def test_candidates_are_the_generators_likeliest_with_their_values(client):
    body = {"token_ids": [[7, 8, 9], [7]], "top_k": 5}
    reply = client.post("/v1/length/candidates", json=body).json()
    engine = client.state.engine
    for prefix, row in zip(body["token_ids"], reply["data"], strict=True):
        with torch.inference_mode():
            logits = engine.generator.base_model(torch.tensor([prefix])).last_hidden_state[:, -1]
            log_probs = engine.lm_head(logits).log_softmax(-1)[0]
        assert len(row["candidates"]) == 5
        found = [c["log_prob"] for c in row["candidates"]]
        assert found == pytest.approx(log_probs.topk(5).values.tolist(), abs=1e-4)
        for c in row["candidates"]:
            (raw,) = engine.value_model.read([[*prefix, c["token_id"]]])
            value = float(engine.value_model.belief(raw[-1:]).value())
            assert c["value"] == pytest.approx(0.0 if c["is_ending"] else value, abs=1e-5)
    named = {"token_ids": [7], "candidates": [[EOS, 9]]}
    rows = client.post("/v1/length/candidates", json=named).json()["data"][0]["candidates"]
    assert [r["token_id"] for r in rows] == [EOS, 9]
    assert (rows[0]["value"], rows[0]["length"]) == (0.0, 0.0)


def test_positions_and_candidates_of_one_text_need_no_list_of_lists(client):
    for path, fields in (("values", {"positions": [0, 2]}), ("candidates", {"candidates": [3, 4]})):
        body = {"token_ids": [7, 8, 9]}
        flat = client.post(f"/v1/length/{path}", json=body | fields)
        ((name, asked),) = fields.items()
        nested = client.post(f"/v1/length/{path}", json=body | {name: [asked]})
        assert flat.status_code == 200, flat.text
        assert flat.json() == nested.json()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("values", {}, None),
        ("values", {"text": "w7", "token_ids": [7]}, None),
        ("values", {"token_ids": []}, "token_ids"),
        ("values", {"token_ids": [[]]}, "token_ids.0"),
        ("values", {"token_ids": [64]}, "token_ids.0"),
        ("values", {"token_ids": [-1]}, "token_ids.0"),
        ("values", {"token_ids": [7, 8], "positions": [[2]]}, "positions.0"),
        ("values", {"token_ids": [7, 8], "positions": [[0], [0]]}, "positions"),
        ("values", {"token_ids": [7] * 600}, "token_ids.0"),
        ("values", {"text": "w7", "quantiles": [1.5]}, "quantiles.0"),
        ("values", {"text": "w7", "nonsense": 1}, "nonsense"),
        ("predict", {"prompts": []}, "prompts"),
        ("predict", {"prompts": ["w7"], "budget": 0}, "budget"),
        ("predict", {"prompts": ["w7 " * 600]}, "prompts.0"),
        ("candidates", {"token_ids": [7], "candidates": [[900]]}, "candidates.0"),
        ("candidates", {"token_ids": [7], "candidates": []}, "candidates"),
        ("candidates", {"token_ids": [7], "top_k": 1000}, "top_k"),
        ("candidates", {"token_ids": [7] * 512}, "token_ids.0"),
    ],
)
def test_a_bad_field_is_named(client, path, body, param):
    reply = client.post(f"/v1/length/{path}", json=body)
    assert reply.status_code in (400, 422), reply.text
    assert reply.json()["error"]["param"] == param, reply.text
