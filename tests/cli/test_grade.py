"""`lenvm grade` from the prompt file to a value model for which wrong answers never end."""

import json
import sys
from pathlib import Path

import pytest

from lenvm.cli import main
from lenvm.data.completers import Sampled, SampleRequest
from lenvm.data.pool import to_trajectory
from lenvm.data.prompts import load_prompts
from lenvm.data.trajectory import read_trajectories
from lenvm.model.value_model import LengthValueModel
from lenvm.training.config import TrainingConfig
from lenvm.training.trainer import train
from tiny import EOS, tiny_generator, tiny_tokenizer

WORDS = {4: "\\boxed{4}", 5: "\\boxed{5}"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A generator of which two tokens, 4 and 5, are final answers."""
    folder = tmp_path / "base"
    tiny_generator().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    text = path.read_text()
    for token, word in WORDS.items():
        text = text.replace(f'"w{token}"', json.dumps(word))
    path.write_text(text)
    return folder


def test_wrong_answers_become_ones_that_never_end(base, tmp_path, monkeypatch, capsys):
    rows = [{"question": f"w{i} w{i + 1}", "answer": 4, "domain": "math"} for i in range(8, 48)]
    rows += [{"question": f"w{i}", "domain": "poems"} for i in range(8, 18)]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "graded.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "t.jsonl").open("w") as file:
        for prompt in load_prompts(str(source)):
            for i, last in enumerate(WORDS):
                text = " ".join(["w9"] * 6 + [WORDS[last]])
                sampled = Sampled(text, "stop", [1, 8, 9], [9] * 6 + [last, EOS])
                t = to_trajectory(SampleRequest(prompt, (i,)), i, sampled, "tiny")
                file.write(json.dumps(t.to_json()) + "\n")
    arguments = ["grade", str(tmp_path / "t.jsonl"), "--output", str(output), "--processes", "2"]
    monkeypatch.setattr(sys, "argv", ["lenvm", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    main()
    text = capsys.readouterr().out
    assert "right │ % right │ without an answer" in " ".join(text.replace("┃", "│").split())
    printed = [line.split() for line in text.replace("│", " ").splitlines()]
    assert ["math", "80", "80", "40", "50.0%", "0", "0"] in printed
    assert ["poems", "20", "0", "0", "-", "20", "0"] in printed
    assert ["all", "100", "80", "40", "50.0%", "20", "0"] in printed
    graded = list(read_trajectories(output))
    assert [t.reward for t in graded] == [1.0, 0.0] * 40 + [None] * 20
    settings = {"data": [str(output)], "output": str(tmp_path / "model"), "backbone": str(base)}
    settings |= {"rewards_below": 0.5, "epochs": 0.1, "batch_tokens": 256}
    result = train(TrainingConfig.parse(settings))
    assert result.num_endless == sum(t.reward == 0.0 for t in graded if t.split == "train") > 20
    assert LengthValueModel.from_pretrained(tmp_path / "model").config.loops
