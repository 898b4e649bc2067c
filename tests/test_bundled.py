"""The default generator and the value model that the package brings, for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lenvm.engines.generate import length_control
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Request, TransformersEngine
from lenvm.guidance.request import LengthControl
from lenvm.guidance.scorer import CandidateScorer
from lenvm.guidance.session import Guided
from lenvm.model.bundled import bundled_model, bundled_value_model
from lenvm.model.prediction import predict_lengths
from lenvm.model.tokenization import encode_prompt
from lenvm.model.value_model import LengthValueModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def value_model():
    return LengthValueModel.from_pretrained(bundled_value_model(), dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(value_model):
    return TransformersEngine.load("smollm2", value_model, dtype=torch.float32, max_requests=8)


def prompt(engine, text):
    return tuple(encode_prompt(engine.tokenizer, [{"role": "user", "content": text}]))


def test_what_ships_is_small():
    size = sum(f.stat().st_size for f in bundled_value_model().rglob("*") if f.is_file())
    assert size < 12_000_000


def test_a_long_answer_is_foreseen(value_model, engine):
    texts = ["What is 2+2? Answer with a number.", "Write a long story about a fox in the woods."]
    short, long = predict_lengths(value_model, [list(prompt(engine, t)) for t in texts])
    assert short["p50"] < long["p50"]
    assert long["p10"] < long["p50"] < long["p90"]


def test_its_guide_scores_and_it_predicts_itself(value_model, engine):
    guide = value_model.guide
    assert guide.backbone.config.num_hidden_layers == 8
    assert guide.config.gamma == value_model.config.gamma
    assert engine.session.scorer.model is guide
    ids = prompt(engine, "Write a long story about a fox in the woods.")
    session = engine.session
    session.add({"probe": Guided(ids, LengthControl(equal_to=20))})
    with torch.inference_mode():
        raw = session.scorer.score_raw(["probe"], torch.tensor([[510, 198]]))[0]
        for row, token in enumerate((510, 198)):
            plain = guide(input_ids=torch.tensor([[*ids, token]]))[0, -1]
            torch.testing.assert_close(raw[row], plain, atol=1e-3, rtol=1e-3)
    predicted = session.prediction("probe")
    session.remove(["probe"])
    (row,) = predict_lengths(value_model, [list(ids)])
    assert predicted == pytest.approx(row["p50"], abs=1)


def test_scored_candidates_are_plain_forwards(value_model, engine):
    ids = list(prompt(engine, "Name a colour."))
    scorer = CandidateScorer(value_model, max_requests=2, max_tokens=400, max_candidates=8)
    scorer.add({"a": ids})
    candidates = [510, 198, 28, 2]
    got = scorer.score_raw(["a"], torch.tensor([candidates]))[0]
    for row, token in enumerate(candidates):
        with torch.inference_mode():
            plain = value_model(input_ids=torch.tensor([[*ids, token]]))[0, -1]
        torch.testing.assert_close(got[row], plain, atol=1e-3, rtol=1e-3)


def test_every_answer_has_the_length_asked_for(engine):
    goals = [{"equal_to": 24}, {"at_most": 12}, {"at_least": 30}, {"tilt": 40.0}, None]
    requests = [
        Request(
            str(i),
            prompt(engine, "Why is the sky blue?"),
            SamplingParams(max_tokens=40, seed=1, min_p=0.05),
            LengthControl.parse(goal) if goal else None,
        )
        for i, goal in enumerate(goals)
    ]
    done = {c.request.id: c for c in engine.generate(requests)}
    assert len(done["0"].token_ids) == 24
    assert len(done["1"].token_ids) <= 12
    assert len(done["2"].token_ids) >= 30
    assert all(c.text for c in done.values())


def test_stock_generate_has_it_too(value_model, engine):
    inputs = {"input_ids": torch.tensor([prompt(engine, "Why is the sky blue?")])}
    torch.manual_seed(0)
    output = engine.generator.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=40,
        custom_generate=length_control(value_model, {"equal_to": 20}),
    )
    assert output.shape[1] - inputs["input_ids"].shape[1] == 20


def test_the_commands_need_nothing_but_the_package(tmp_path):
    environment = {**os.environ, "LENVM_CACHE": str(bundled_model().parent)}
    start = "from lenvm.cli import main; main()"
    command = [sys.executable, "-c", start, "generate", "--at-most", "8", "--jsonl"]
    done = subprocess.run(
        [*command, "--seed", "1", "Name a colour."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["num_tokens"] <= 8
    assert list(Path(tmp_path).iterdir()) == []
