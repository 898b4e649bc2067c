"""`lenvm generate` on a tiny model: streamed, in a batch, and the room that a length needs."""

import json
import sys

import pytest

from lenvm.cli import main
from lenvm.cli.generate import pick_limit
from lenvm.errors import InputError
from lenvm.guidance.request import LengthControl
from tiny import tiny_generator, tiny_tokenizer


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("generator")
    tiny_generator().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_an_answer_is_the_same_streamed_as_lines_and_in_a_batch(generator, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[str, str]:
        command = ["generate", "--model", generator, "--seed", "3", "--max-tokens", "12"]
        monkeypatch.setattr(sys, "argv", ["lenvm", *command, *arguments])
        main()
        return tuple(capsys.readouterr())

    streamed, about = run("w7")
    line, _ = run("--jsonl", "w7")
    record = json.loads(line)
    assert streamed == record["text"] + "\n"
    assert len(record["text"].split()) >= record["num_tokens"] - 1 > 0
    assert f"[{record['num_tokens']} tokens, finish: {record['finish_reason']}]" in about
    batch, progress = run("w7", "w9")
    assert batch.startswith(record["text"] + "\n\n")
    assert "generate: 2/2" in progress


def test_penalties_are_asked_for_and_checked(generator, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        command = ["generate", "--model", generator, "--temperature", "0", "--max-tokens", "30"]
        monkeypatch.setattr(sys, "argv", ["lenvm", *command, *arguments, "w7"])
        main()
        return capsys.readouterr().out

    plain, varied = (set(run(*more).split()) for more in ((), ("--frequency-penalty", "2")))
    assert len(varied) > len(plain)
    with pytest.raises(SystemExit):
        run("--repetition-penalty", "0")
    assert "repetition_penalty is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("control", "given", "limit"),
    [
        (None, None, 1024),
        (None, 7, 7),
        ({"equal_to": 100}, None, 1024),
        ({"equal_to": 2000}, None, 2500),
        ({"at_least": 2000}, None, 2500),
        ({"at_most": 2000}, 50, 50),
        ({"equal_to": 50}, 50, 50),
        ({"equal_to": 50, "remaining": True}, 40, 40),
    ],
)
def test_the_limit_leaves_room_for_the_length(control, given, limit):
    assert pick_limit(control and LengthControl.parse(control), given) == limit


def test_a_limit_below_the_length_is_refused():
    with pytest.raises(InputError, match="at least 51"):
        pick_limit(LengthControl.parse({"equal_to": 51}), 50)
