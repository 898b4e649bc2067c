"""What a user can get wrong, through the real entry point: a message, an exit code, and nothing
half-written."""

import json
import socket
import sys
from pathlib import Path

import pytest

from lenvm.cli import main
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A generator, a value model, and files that are wrong in every way."""
    root = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_generator().save_pretrained(root / "generator")
    tokenizer.save_pretrained(root / "generator")
    model = LengthValueModel.build(
        tiny_backbone(), LenVMConfig(gamma=0.99, head="scalar", eos_token_ids=[EOS])
    )
    model.tokenizer = tokenizer
    model.save_pretrained(root / "model")
    (root / "empty.jsonl").write_text("")
    (root / "broken.jsonl").write_text('{"prompt": "w7"}\n{"prompt": \n')
    (root / "mixed.jsonl").write_text('{"prompt": "w7"}\n{"length": 3}\n')
    (root / "odd.toml").write_text("learning_rat = 1e-3\n")
    (root / "cut.toml").write_text("learning_rate = \n")
    (root / "prompts.jsonl").write_text('{"prompt": "w7 w8"}\n')
    row = {"schema": "lenvm.trajectory/99", "id": "a"}
    (root / "newer.jsonl").write_text(json.dumps(row) + "\n")
    return root


def dead_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


GENERATE = ["generate", "--model", "{base}/generator", "--lenvm", "{base}/model"]
TRAIN = ["train", "--output", "out/model", "--set", "backbone={base}/generator"]
CASES = {
    "target below 1": ([*GENERATE, "--equal-to", "0", "w7"], 2, "equal_to is 0"),
    "two goals at once": (
        [*GENERATE, "--equal-to", "9", "--tilt", "1", "w7"],
        2,
        "exactly one of equal_to",
    ),
    "conditional on a scalar head": (
        [*GENERATE, "--equal-to", "9", "--rule", "conditional", "--max-tokens", "9", "w7"],
        2,
        "distribution head",
    ),
    "an unknown rule": ([*GENERATE, "--equal-to", "9", "--rule", "best", "w7"], 2, "conditional, "),
    "a control that is no JSON": ([*GENERATE, "--length", "{{", "w7"], 2, "JSON object"),
    "an unknown field": ([*GENERATE, "--length", '{{"equal": 3}}', "w7"], 2, "one of the fields"),
    "both ways of a control": (
        [*GENERATE, "--length", '{{"equal_to": 3}}', "--tilt", "1", "w7"],
        2,
        "leave out tilt",
    ),
    "no prompt": (GENERATE, 2, "no prompt"),
    "no such generator": (["generate", "--model", "./none", "w7"], 2, "no model folder ./none"),
    "no such value model": (
        ["predict", "--lenvm", "{base}/none", "w7"],
        4,
        "no value model at",
    ),
    "a model without head": (
        ["predict", "--lenvm", "{base}/generator", "w7"],
        4,
        "not a value model",
    ),
    "no such prompt file": ([*GENERATE, "--prompts", "none.jsonl"], 3, "none.jsonl"),
    "an empty prompt file": ([*GENERATE, "--prompts", "{base}/empty.jsonl"], 3, "empty.jsonl"),
    "a malformed line": ([*GENERATE, "--prompts", "{base}/broken.jsonl"], 3, "broken.jsonl"),
    "rows of two schemas": ([*GENERATE, "--prompts", "{base}/mixed.jsonl"], 3, "mixed.jsonl"),
    "no training data": ([*TRAIN, "none.jsonl"], 3, "none.jsonl"),
    "empty training data": ([*TRAIN, "{base}/empty.jsonl"], 3, "empty.jsonl"),
    "trajectories of a newer schema": ([*TRAIN, "{base}/newer.jsonl"], 3, "newer.jsonl"),
    "an unknown setting": ([*TRAIN, "{base}/empty.jsonl", "--set", "epoch=3"], 2, "epoch"),
    "an unknown setting in TOML": (
        [*TRAIN, "{base}/empty.jsonl", "--config", "{base}/odd.toml"],
        2,
        "learning_rat",
    ),
    "a broken TOML": ([*TRAIN, "{base}/empty.jsonl", "--config", "{base}/cut.toml"], 3, "TOML"),
    "gamma of 1": ([*TRAIN, "{base}/empty.jsonl", "--set", "gamma=1.0"], 2, "gamma"),
    "a dead endpoint": (
        [
            *("sample", "{base}/prompts.jsonl", "-o", "out/t.jsonl", "--retries", "0"),
            *("--endpoint", "http://127.0.0.1:{port}/v1"),
        ],
        5,
        "127.0.0.1:{port}",
    ),
    "an unknown option": (["generate", "--equals", "3", "w7"], 2, "--equals"),
    "an unknown command": (["generte"], 2, "generte"),
    "a GPU that is not there": ([*GENERATE, "--device", "cuda", "w7"], 2, "no GPU"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_has_a_message_an_exit_code_and_leaves_nothing(
    name, base, tmp_path, monkeypatch, capsys
):
    arguments, code, says = CASES[name]
    values = {"base": base, "port": dead_port()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["lenvm", *(a.format(**values) for a in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr()
    message = printed.err + printed.out
    assert exit_.value.code == code, message
    assert says.format(**values) in message, message
    assert "Traceback" not in message
    left = [f for f in tmp_path.rglob("*") if f.is_file() and "manifest" not in f.name]
    assert [f for f in left if f.stat().st_size > 0 and f.suffix != ".lock"] == []
