"""What a user of `lenvm eval` can get wrong, through the real entry point; interrupted runs in
processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.stub import Stub, running
from lenvm.cli import main

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture
def run(monkeypatch, capsys):
    """(arguments) -> (exit code, all that was printed); never a traceback."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", "220")
        monkeypatch.setattr(sys, "argv", ["lenvm", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return call


def write_items(path: Path, count: int = 3) -> Path:
    row = {"category": "qa", "type": "Health", "lang": "en", "raw_data": ""}
    row["task"] = "Say {word_count_type} {word_count} words long."
    rows = [{"id": i, **row, "task": f"{row['task']} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("evaluation", "content", "message"),
    [
        ("lifebench", '{"id": 1, "lang": "en", "task": "x"}\n', "bad.jsonl:1: field 'category'"),
        ("lifebench", '{"id": 1\n', "bad.jsonl:1"),
        ("lifebench", "", "holds no LIFEBench items"),
        ("tradeoff", '{"question": "1 + 1?"}\n', "no answer; looked for answer"),
        ("tradeoff", '{"answer": "2"}\n', "no question; looked for question"),
        ("length-prediction", '{"id": 1}\n', "bad.jsonl:1"),
    ],
)
def test_a_file_with_missing_fields(run, tmp_path, evaluation, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    out = tmp_path / "out"
    values = {"gamma": 0.99, "head": "scalar", "model": "m", "values": [[{}]]}
    with running(Stub(extra={"/v1/length/values": lambda body: values})) as stub:
        code, said = run(
            "eval", evaluation, tmp_path / "bad.jsonl", "-o", out, "--endpoint", stub.url
        )
    assert code == 3
    assert message in said
    assert stub.bodies == []
    assert not (out / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", 16, "--target", 4096), "targets 4096 tokens are over the limit of 2048"),
        (("--target", 16, "--max-tokens", 2048), "lower max_tokens"),
        (("--target", 0), "--target"),
    ],
)
def test_a_target_over_the_servers_limit(run, tmp_path, arguments, message):
    items, out = write_items(tmp_path / "items.jsonl"), tmp_path / "out"
    with running(Stub(max_length=2048)) as stub:
        code, said = run("eval", "lifebench", items, "-o", out, "--endpoint", stub.url, *arguments)
    assert code == 2
    assert message in said
    assert stub.bodies == []


def test_a_server_without_the_plugin(run, tmp_path):
    items, sums = write_items(tmp_path / "items.jsonl"), tmp_path / "sums.jsonl"
    sums.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    reason = "has no lenvm plugin: it ignores length controls"
    with running(Stub(plugin=None, max_length=None)) as stub:
        common = ("--endpoint", stub.url)
        one, said = run("eval", "lifebench", items, "-o", tmp_path / "a", "--target", 64, *common)
        two, also = run("eval", "tradeoff", sums, "-o", tmp_path / "b", "--samples", 1, *common)
        assert not any("length" in body for body in stub.bodies)
    assert (one, two) == (0, 0)
    assert f"hard did not run: the server at {stub.url} {reason}" in said
    assert "prompt only" in said
    assert f"tilt:5 did not run: the server at {stub.url} {reason}" in also
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert [a["arm"] for a in summary["arms"] if a["skipped"] is None] == ["prompt", "truncate"]
    assert summary["num_records"] == 6
    assert run("report", tmp_path / "a")[0] == 0
    assert reason in (tmp_path / "a" / "report.html").read_text()


def settle(stub: Stub) -> None:
    """Wait until the stub has read what a killed client had sent."""
    seen = -1
    while seen != len(stub.bodies):
        seen = len(stub.bodies)
        time.sleep(0.3)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_stopped(run, tmp_path, end):
    items, out = write_items(tmp_path / "items.jsonl", 12), tmp_path / "out"
    with running(Stub(delay_s=lambda body: 0.05 if body["max_tokens"] > 1 else 0.0)) as stub:
        arguments = ("eval", "lifebench", items, "--endpoint", stub.url, "--concurrency", 2)
        arguments += ("--arm", "prompt", "--arm", "hard", "--target", 20, "--target", 64)
        child = subprocess.Popen(
            [sys.executable, "-m", "lenvm", *map(str, arguments), "-o", str(out)],
            env={**os.environ, "PYTHONPATH": str(SRC)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        while len(stub.bodies) < 12:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(end)
        _, err = child.communicate(timeout=60)
        assert "Traceback" not in err
        if end == signal.SIGINT:
            assert child.returncode == 130
            assert "run the same command to continue" in err
        kept = (out / "records.jsonl").read_text().count("\n")
        assert 8 <= kept < 24
        assert not (out / "summary.json").exists()
        settle(stub)
        stub.bodies.clear()
        _, said = run("eval", "lifebench", items, "-o", out, "--regrade")
        assert f"hard: {kept} of {kept} requests were not sent, the run was stopped" in said
        code, said = run(*arguments, "-o", out)
        assert (code, "not sent" in said) == (0, False)
        assert len(stub.bodies) == 48 - kept
        run(*arguments, "-o", tmp_path / "whole")
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("out", "whole"))
    for summary in (one, two):
        for arm in summary["arms"]:  # times differ from run to run
            del arm["quality"]["ms_per_token"], arm["equal_to"]["quality"]["ms_per_token"]
            for row in arm["equal_to"]["by_target"]:
                del row["quality"]["ms_per_token"]
    assert one == two


def test_a_changed_configuration_in_an_old_folder(run, tmp_path):
    items, out = write_items(tmp_path / "items.jsonl"), tmp_path / "out"
    with running(Stub()) as stub:
        command = ("eval", "lifebench", items, "-o", out, "--endpoint", stub.url, "--arm", "prompt")
        assert run(*command, "--target", 20)[0] == 0
        before = {f.name: f.read_bytes() for f in out.iterdir()}
        stub.bodies.clear()
        for change in (("--target", 64), ("--target", 20, "--temperature", 0.5)):
            code, said = run(*command, *change)
            assert code == 2
            assert ("targets" in said) == (change[1] == 64)
            assert ("temperature" in said) == (len(change) == 4)
        other, said = run("eval", "tradeoff", items, "-o", out, "--regrade")
        assert (other, "eval.lifebench" in said) == (3, True)
    assert stub.bodies == []
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_failures_are_said_and_tried_again(run, tmp_path):
    items, out = write_items(tmp_path / "items.jsonl", 4), tmp_path / "out"
    refused = {"0", "1"}
    with running(
        Stub(fail=lambda b: 400 if b["messages"][0]["content"][-1] in refused else None)
    ) as stub:
        command = ("eval", "lifebench", items, "-o", out, "--target", 20, "--arm", "prompt")
        command += ("--endpoint", stub.url)
        code, said = run(*command)
        assert (code, "2 of 4 requests failed and score as failures" in said) == (0, True)
        refused.clear()
        stub.bodies.clear()
        code, said = run(*command)
    assert (code, "failed and score" in said, len(stub.bodies)) == (0, False, 2)
