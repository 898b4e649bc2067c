"""What a user can get wrong, through the real entry point: a message, an exit code, and nothing
half-written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lenvm.cli import main
from lenvm.data.trajectory import read_trajectories
from lenvm.engines.transformers import TransformersEngine
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from stub_server import stub_server
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer

SRC = str(Path(__file__).parents[2] / "src")


def trajectory(i: int, split: str) -> dict[str, object]:
    return {
        "schema": "lenvm.trajectory/1",
        "id": f"p{i}-0",
        "prompt_hash": f"p{i}",
        "sample_index": 0,
        "split": split,
        "messages": [{"role": "user", "content": "w7"}],
        "prompt_token_ids": [1, 4, 7, 5],
        "completion_token_ids": [8, 9, 10, EOS],
        "completion_text": "w8 w9 w10",
        "finish_reason": "stop",
        "model": "tiny",
    }


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
    with (root / "good.jsonl").open("w") as file:
        for i, split in enumerate(["train", "train", "validation"]):
            file.write(json.dumps(trajectory(i, split)) + "\n")
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
    "a target that does not fit": (
        [*GENERATE, "--equal-to", "90", "--max-tokens", "40", "w7"],
        2,
        "raise it to at least 90",
    ),
    "two goals at once": (
        [*GENERATE, "--equal-to", "9", "--tilt", "1", "w7"],
        2,
        "exactly one of equal_to",
    ),
    "a least length over the greatest": (
        [*GENERATE, "--at-least", "50", "--at-most", "20", "w7"],
        2,
        "'at_least': 50}}; allowed: at_least up to at_most (50 > 20)",
    ),
    "a length that the models have no room for": (
        [*GENERATE, "--at-least", "600", "w7"],
        6,
        "a length of 600 tokens does not fit: after this prompt the models have room for 509",
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
    "training from no model": (
        ["train", "--output", "out/m", "--set", "backbone=./none", "{base}/good.jsonl"],
        2,
        "no model folder ./none",
    ),
    "sampling from no model": (
        ["sample", "{base}/prompts.jsonl", "-o", "out/t.jsonl", "--model", "./none"],
        2,
        "no model folder ./none",
    ),
    "a demo of no model": (
        ["demo", "--generator", "./none", "--output", "out/demo"],
        2,
        "no model folder ./none",
    ),
    "a dead endpoint": (
        [
            *("sample", "{base}/prompts.jsonl", "-o", "out/t.jsonl", "--retries", "0"),
            *("--endpoint", "http://127.0.0.1:{port}/v1"),
        ],
        5,
        "127.0.0.1:{port}",
    ),
    "no file to grade": (["grade", "none.jsonl", "-o", "out/g.jsonl"], 3, "none.jsonl"),
    "nothing to grade by": (
        ["grade", "{base}/good.jsonl", "-o", "out/g.jsonl"],
        3,
        "name the questions with --answers",
    ),
    "answers that are no questions": (
        ["grade", "{base}/good.jsonl", "-o", "out/g.jsonl", "--answers", "{base}/prompts.jsonl"],
        3,
        "prompts.jsonl:1: no answer",
    ),
    "no such answers": (
        ["grade", "{base}/good.jsonl", "-o", "out/g.jsonl", "--answers", "none.jsonl"],
        3,
        "no prompt file none.jsonl",
    ),
    "grades over their file": (
        ["grade", "{base}/good.jsonl", "-o", "{base}/good.jsonl"],
        2,
        "good.jsonl is the file to grade",
    ),
    "an unknown option": (["generate", "--equals", "3", "w7"], 2, "--equals"),
    "an unknown command": (["generte"], 2, "generte"),
    "a GPU that is not there": ([*GENERATE, "--device", "cuda", "w7"], 2, "no GPU"),
    "no device": ([*GENERATE, "--device", "foo", "w7"], 2, "device is 'foo'; allowed: cpu, cuda"),
    "no device to predict on": (["predict", "--device", "cpu:x", "w7"], 2, "device is 'cpu:x'"),
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
    left = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert [f for f in left if f.stat().st_size > 0 and f.suffix != ".lock"] == []


def test_debug_shows_where_a_mistake_was_found(tmp_path):
    command = [sys.executable, "-m", "lenvm"]
    arguments = ["predict", "--lenvm", str(tmp_path / "none"), "a prompt"]
    plain, debug = (
        subprocess.run([*command, *flags, *arguments], capture_output=True, text=True)
        for flags in ([], ["--debug"])
    )
    assert plain.returncode == 4
    assert plain.stderr.startswith("lenvm: no value model at")
    assert "Traceback" not in plain.stderr
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "CheckpointError: no value model at" in debug.stderr


RUN = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from lenvm.cli import main
main()
"""


@pytest.mark.parametrize(
    ("limit", "names"),
    [(4_000, "good.jsonl.tokens"), (30_000, "checkpoint-"), (300_000, None)],
)
def test_a_full_disk_in_training_is_said_and_leaves_no_checkpoint(base, tmp_path, limit, names):
    """First where the tokens are stored, then at a state, then it has room and continues."""
    data = tmp_path / "good.jsonl"
    with data.open("w") as file:
        for i in range(120):
            file.write(json.dumps(trajectory(i, "validation" if i % 4 else "train")) + "\n")
    command = ["train", str(data), "--output", str(tmp_path / "m"), "--set", "epochs=1"]
    command += ["--set", f"backbone={base}/generator"]

    def run(size: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RUN, str(size), *command],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": SRC},
        )

    done = run(limit)
    if names is None:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "m" / "value_head.safetensors").exists()
        return
    assert done.returncode == 3, done.stderr
    assert "lenvm: cannot write" in done.stderr
    assert names in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()
    assert [p for p in tmp_path.rglob("*") if p.name.endswith(".part")] == []
    assert list(tmp_path.glob("m.state/checkpoint-*")) == []
    assert run(300_000).returncode == 0  # room is made: the same command goes on


def test_ctrl_c_says_what_to_do(base, tmp_path):
    """Exit code 130, no traceback, and whole records that the next run adds to."""
    prompts, output = tmp_path / "p.jsonl", tmp_path / "t.jsonl"
    prompts.write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(3, 63)))
    with stub_server(delay_s=0.2) as stub:
        command = ["sample", str(prompts), "-o", str(output), "--endpoint", stub.url]
        child = subprocess.Popen(
            [sys.executable, "-m", "lenvm", *command, "--concurrency", "2"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": SRC},
        )
        deadline = time.monotonic() + 60
        while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
    assert child.returncode == 130, said
    assert "lenvm: interrupted; what was finished is kept, run the same command to" in said
    assert "Traceback" not in said
    assert 0 < len(list(read_trajectories(output))) < 60


def test_ctrl_c_promises_nothing_where_nothing_is_kept(base, tmp_path):
    """`generate` ends its line first; the next run begins anew, and nobody says otherwise."""
    command = ["generate", "--model", f"{base}/generator", "--max-tokens", "480", "--jsonl"]
    command += ["--n", "400", "w7"]
    child = subprocess.Popen(
        [sys.executable, "-m", "lenvm", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SRC},
    )
    while "generate: 0/400" not in (line := child.stderr.readline()):
        assert line, "the command ended before it began to generate"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130, said
    assert said.splitlines()[-1] == "lenvm: interrupted"


def test_ctrl_c_ends_the_line_of_an_answer_that_is_being_written(base, monkeypatch, capsys):
    command = [
        "generate",
        "--model",
        f"{base}/generator",
        "--max-tokens",
        "40",
        "--seed",
        "0",
        "w7",
    ]
    step, left = TransformersEngine.step, [5]

    def interrupted(engine: TransformersEngine) -> object:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(TransformersEngine, "step", interrupted)
    monkeypatch.setattr(sys, "argv", ["lenvm", *command])
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr()
    assert exit_.value.code == 130
    assert printed.out.startswith("w")
    assert printed.out.endswith("\n")
    assert printed.err.endswith("lenvm: interrupted\n")
