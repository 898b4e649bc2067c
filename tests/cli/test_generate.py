"""`lenvm generate` on a tiny model: streamed, in a batch, and the room that a length needs."""

import io
import json
import sys

import pytest

from lenvm.cli import main
from lenvm.cli.generate import check_limit, check_room
from lenvm.engines.transformers import TransformersEngine
from lenvm.errors import CapacityError, InputError
from lenvm.guidance.request import LengthControl, pick_max_tokens
from lenvm.model.value_model import LengthValueModel
from serving import serving
from tiny import tiny_generator, tiny_pair, tiny_tokenizer


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


def test_truncation_and_stop_texts_are_asked_for(generator, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[str, str]:
        command = ["generate", "--model", generator, "--seed", "3", "--max-tokens", "40", "w7"]
        monkeypatch.setattr(sys, "argv", ["lenvm", *command, *arguments])
        main()
        return tuple(capsys.readouterr())

    plain, _ = run()
    greedy, _ = run("--temperature", "0")
    assert plain != greedy == run("--top-k", "1")[0] == run("--min-p", "1")[0]
    words = plain.split()
    cut, about = run("--stop", f"{words[2]} {words[3]}", "--stop", "w999")
    assert cut.rstrip("\n") == plain[: plain.index(f"{words[2]} {words[3]}")]
    assert "finish: stop" in about
    line, _ = run("--jsonl", "--stop", f"{words[2]} {words[3]}")
    assert json.loads(line)["text"] == cut.rstrip("\n")


@pytest.mark.parametrize(
    ("control", "room", "limit"),
    [
        (None, 9999, 1024),
        (None, 600, 600),
        ({"equal_to": 100}, 9999, 1024),
        ({"at_least": 800}, 9999, 1600),
        ({"equal_to": 2000}, 9999, 4000),
        ({"at_least": 2000}, 2300, 2300),
        ({"at_most": 2000}, 9999, 1024),
        ({"tilt": 9.0}, 9999, 1024),
    ],
)
def test_the_limit_leaves_room_for_the_length(control, room, limit):
    control = control and LengthControl.parse(control)
    assert pick_max_tokens(control, default=1024, room=room) == limit


def test_a_limit_below_the_length_is_refused():
    control = LengthControl.parse({"equal_to": 51})
    with pytest.raises(InputError, match="at least 51"):
        check_limit(control, 50)
    check_limit(control, 51)
    check_limit(LengthControl.parse({"equal_to": 51, "remaining": True}), 50)
    with pytest.raises(CapacityError, match=r"51 tokens does not fit.* room for 50"):
        check_room(control, 50)


def test_the_command_and_the_server_give_a_length_the_same_room(
    generator, tmp_path, monkeypatch, capsys
):
    """An answer that would go on runs into the limit: 2 x 40 tokens, over a default of 8."""
    monkeypatch.setattr("lenvm.guidance.request.DEFAULT_MAX_TOKENS", 8)
    pair = tiny_pair()
    pair.tokenizer = tiny_tokenizer()
    pair.save_pretrained(tmp_path / "m")
    length, seed = {"at_least": 40}, 2
    command = ["generate", "--model", generator, "--lenvm", str(tmp_path / "m"), "--jsonl"]
    command += ["--length", json.dumps(length), "--seed", str(seed), "w7"]
    monkeypatch.setattr(sys, "argv", ["lenvm", *command])
    main()
    ours = json.loads(capsys.readouterr().out)
    engine = TransformersEngine.load(generator, LengthValueModel.from_pretrained(tmp_path / "m"))
    with serving(engine, default_max_tokens=8) as client:
        body = {"messages": [{"role": "user", "content": "w7"}], "length": length, "seed": seed}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert (ours["num_tokens"], ours["finish_reason"]) == (80, "length")
    assert answer["usage"]["completion_tokens"] == 80
    assert answer["choices"][0]["finish_reason"] == "length"


def test_standard_input_that_is_no_utf8_is_told_as_that(generator, monkeypatch, capsys):
    for errors in ("strict", "surrogateescape"):
        stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr(sys, "argv", ["lenvm", "generate", "--model", generator, "-"])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        assert "standard input is not UTF-8: it has the byte 0xe9" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 40])
def test_the_table_of_values_is_whole(columns, tmp_path, monkeypatch, capsys):
    model = tiny_pair()
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "m")
    monkeypatch.setenv("COLUMNS", str(columns))
    command = ["values", "w7", "w8 w9", "--lenvm", str(tmp_path / "m"), "--budget", "100"]
    monkeypatch.setattr(sys, "argv", ["lenvm", *command])
    main()
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.strip().startswith("token"))
    assert head.split() == [
        *("token", "step", "value", "length", "mean", "geo.mean", "p10", "p50", "p90", "P(fits)"),
        "true",
    ]
    rows = [line.split() for line in lines[lines.index(head) + 1 :] if line.strip(" ─━")]
    assert [row[0] for row in rows] == ["(prompt)", "w8", "w9", "</s>"]
    assert {len(row) for row in rows} == {11}
    assert max(map(len, lines)) <= 80
