"""The evaluations against the embedded server itself (tiny models): every arm, no stub between."""

import json
from pathlib import Path

import httpx
import pytest

from evals.prediction.test_prediction import write
from lenvm.evals.arms import parse_arms
from lenvm.evals.client import connect
from lenvm.evals.generator import Sampling
from lenvm.evals.lifebench.arms import KINDS as LIFEBENCH_KINDS
from lenvm.evals.lifebench.run import LifebenchConfig, run_lifebench
from lenvm.evals.prediction.predictors import EndpointPredictor, ValueModelPredictor
from lenvm.evals.prediction.run import PredictionConfig, run_prediction
from lenvm.evals.tradeoff.arms import KINDS as TRADEOFF_KINDS
from lenvm.evals.tradeoff.run import TradeoffConfig, run_tradeoff
from serving import serving, tiny_engine
from tiny import EOS


@pytest.fixture(scope="module")
def client():
    with serving(tiny_engine(max_requests=16)) as found:
        yield found


@pytest.fixture
def generator(client):
    return connect(
        f"{client.base_url}/v1",
        concurrency=16,
        eos_token_ids=(EOS,),
        token_counter=lambda text: len(text.split()),
    )


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_every_arm_and_constraint_of_lifebench_runs(generator, tmp_path):
    row = {"category": "qa", "type": "t", "lang": "en", "raw_data": ""}
    task = "w7 w8 {word_count_type} {word_count} words"
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"id": i, "task": task, **row}) + "\n" for i in range(3)))
    arms = ["prompt", "countdown", "truncate", "eos_bias:3", "eos_decay:1.5"]
    config = LifebenchConfig(
        path,
        tuple(parse_arms([*arms, "hard", "soft:100", "conditional:1"], LIFEBENCH_KINDS)),
        constraints=("equal_to", "at_most", "at_least"),
        targets=(8, 16),
        max_tokens=32,
        sampling=Sampling(top_p=1.0, top_k=64, seed=0),
    )
    summary = run_lifebench(config, generator, tmp_path / "out")
    assert generator.endpoint.missing == {}
    assert summary["num_failed"] == 0
    assert summary["notes"] == []
    assert [a["skipped"] for a in summary["arms"]] == [None] * 8
    assert all(a["equal_to"] and a["at_most"] for a in summary["arms"])
    assert [a["arm"] for a in summary["arms"] if a["at_least"] is None] == ["truncate"]
    assert all(a["quality"]["likely_end"] for a in summary["arms"])
    for record in read(tmp_path / "out"):
        assert record["mean_log_prob"] < 0
        assert record["last_log_prob"] < 0
        assert 1 <= record["num_tokens"] <= 32
        if record["arm"] == "conditional:1" and record["case"]["constraint"] == "at_most":
            assert record["num_tokens"] <= record["case"]["target"]  # the ending token counted
            assert record["finish_reason"] == "stop"


def test_the_ending_token_counts_and_is_the_last_that_has_a_log_probability(client):
    """Fault 7: one length everywhere. What `last_log_prob` is taken from."""
    body = {"messages": [{"role": "user", "content": "w7"}], "max_tokens": 40, "logprobs": True}
    ends = set()
    for seed in range(12):
        reply = httpx.post(f"{client.base_url}/v1/chat/completions", json=body | {"seed": seed})
        choice = reply.json()["choices"][0]
        content = choice["logprobs"]["content"]
        assert len(content) == reply.json()["usage"]["completion_tokens"]
        name = client.state.engine.tokenizer.convert_ids_to_tokens(EOS)
        assert (content[-1]["token"] == name) == (choice["finish_reason"] == "stop")
        ends.add(choice["finish_reason"])
    assert "stop" in ends


def test_every_arm_of_the_trade_off_runs_and_a_forced_answer_sees_its_draft(generator, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "w7 w8", "answer": "2"}\n{"question": "w9", "answer": "3"}\n')
    arms = ["prompt", "concise", "tilt:12.5", "at_most:12", "budget:4", "budget_answer:4"]
    config = TradeoffConfig(
        str(path),
        tuple(parse_arms([*arms, "eos_bias:2"], TRADEOFF_KINDS)),
        max_tokens=32,
        sampling=Sampling(min_p=0.01, seed=0),
    )
    summary = run_tradeoff(config, generator, tmp_path / "out")
    assert summary["num_failed"] == 0
    assert [a["skipped"] for a in summary["arms"]] == [None] * 7
    records = {r["id"]: r for r in read(tmp_path / "out")}
    forced = [r for r in records.values() if r["case"]["forced"]]
    assert forced
    for record in forced:
        draft = records[record["id"].removesuffix("/forced")]
        assert (draft["finish_reason"], draft["num_tokens"]) == ("length", 4)
        assert record["num_prompt_tokens"] >= draft["num_prompt_tokens"] + 4


def test_predictions_over_http_are_those_of_the_value_model(client, tmp_path):
    """Fault 9 as well: prompts of all lengths in one batch, no padding in any error."""
    path = write(tmp_path / "t.jsonl", [(i, "m", "test", 3 + 9 * i, "stop") for i in range(6)] * 2)
    near = ValueModelPredictor(client.state.engine.value_model, "tiny", batch_tokens=64)
    far = EndpointPredictor(f"{client.base_url}/v1")
    config = PredictionConfig((path,))
    here = run_prediction(config, near, tmp_path / "near")["domains"]["all"]
    there = run_prediction(config, far, tmp_path / "far")["domains"]["all"]
    for name in ("mre", "median_re", "mre_mean", "mae", "spearman"):
        assert there[name]["value"] == pytest.approx(here[name]["value"], rel=1e-3)
    assert [p["mre"]["value"] for p in there["positions"]] == pytest.approx(
        [p["mre"]["value"] for p in here["positions"]], rel=1e-3
    )
