"""`lenvm eval` from the command line, against a real local server and a tiny model in-process."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from evals.stub import Stub, running
from lenvm.cli import _eval_options as options
from lenvm.cli.eval import register
from lenvm.errors import InputError


def call(*arguments: object) -> str:
    """Run `lenvm eval ...`; its errors propagate, as cli.main expects them."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def items(tmp_path) -> Path:
    row = {
        "category": "qa",
        "type": "Health",
        "lang": "en",
        "task": "Say {word_count_type} {word_count} words long.",
        "raw_data": "",
    }
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i in range(3)))
    return path


def test_lifebench_over_http(items, tmp_path):
    with running(Stub(plugin="vllm")) as stub:
        output = call(
            *("lifebench", items, "-o", tmp_path / "out", "--endpoint", stub.url),
            *("--arm", "prompt", "--arm", "hard", "--target", 20, "--target", 64),
        )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config"]["targets"] == [20, 64]
    assert [a["arm"] for a in summary["arms"]] == ["prompt", "hard"]
    assert "LenVM hard" in output
    assert "100.0" in output
    again = call("lifebench", items, "-o", tmp_path / "out", "--regrade")
    assert "LenVM hard" in again


def test_options_that_contradict_are_refused(items, tmp_path):
    with running(Stub()) as stub, pytest.raises(InputError, match="in-process"):
        call(
            *("lifebench", items, "-o", tmp_path / "out"),
            *("--endpoint", stub.url, "--lenvm", "folder"),
        )


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"rule": "hard"}', '{"top_k": 0}', '{"nonsense": 1}']
)
def test_control_settings_are_checked(text):
    with pytest.raises(InputError):
        options.parse_control_settings(text)


def test_control_settings_are_read():
    assert options.parse_control_settings('{"top_k": 40}') == {"top_k": 40}
    assert options.parse_control_settings(None) == {}


def test_intervals_read_well():
    assert options.format_interval({"value": 0.314, "low": 0.2, "high": 0.4}, ".0%") == (
        "31% [20%, 40%]"
    )
    assert options.format_interval(None) == "-"
