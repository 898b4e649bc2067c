"""`lenvm eval` from the command line, against a real local server and a tiny model in-process."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from evals.stub import Stub, running, say
from lenvm.cli import _eval_options as options
from lenvm.cli._eval_length_tokens import _print_summary as print_tokens
from lenvm.cli.eval import register
from lenvm.errors import DataError, InputError
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer


def call(*arguments: object) -> str:
    """Run `lenvm eval ...`; its errors propagate, as cli.main expects them."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        app, ["eval", *map(str, arguments)], catch_exceptions=False
    )
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


@pytest.mark.parametrize("name", ["lifebench", "tradeoff"])
def test_penalties_reach_the_server(name, items, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "1 + 2?", "answer": "#### 3"}) + "\n")
    flags = ["--frequency-penalty", 0.3, "--presence-penalty", -1, "--repetition-penalty", 1.05]
    with running(Stub()) as stub:
        call(
            *(name, items if name == "lifebench" else questions, "-o", tmp_path / "out"),
            *("--endpoint", stub.url, "--arm", "prompt", *flags),
        )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    wanted = {"frequency_penalty": 0.3, "presence_penalty": -1.0, "repetition_penalty": 1.05}
    assert wanted.items() <= summary["config"]["sampling"].items()
    assert stub.bodies
    assert all(wanted.items() <= body.items() for body in stub.bodies)


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
        "31% [20, 40]"
    )
    assert options.format_interval(None) == "-"


def test_tradeoff_over_http(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(
        '{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?", "answer": "3"}\n'
    )
    out = tmp_path / "out"
    with running(Stub(answer=lambda body: say("\\boxed{2}", 20))) as stub:
        output = call(
            *("tradeoff", path, "-o", out, "--endpoint", stub.url, "--samples", 2),
            *("--arm", "prompt", "--arm", "tilt:0.5"),
        )
    assert "LenVM tilt 0.5" in output
    summary = json.loads((out / "summary.json").read_text())
    assert [a["pass_at_1"]["value"] for a in summary["arms"]] == [0.5, 0.5]
    assert "LenVM tilt 0.5" in call("tradeoff", path, "-o", out, "--regrade")


@pytest.fixture
def value_model(tmp_path) -> Path:
    model = LengthValueModel.build(
        tiny_backbone(), LenVMConfig(gamma=0.99, head="distribution", eos_token_ids=[EOS])
    )
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_length_prediction_with_a_value_model_folder(value_model, tmp_path):
    from evals.prediction.test_prediction import write

    data = write(tmp_path / "t.jsonl", [(i, "m", "test", 30 + i, "stop") for i in range(5)] * 2)
    out = tmp_path / "out"
    arguments = ["length-prediction", data, "-o", out]
    output = call(*arguments, "--lenvm", value_model, "--device", "cpu")
    assert "prompt_length" in output
    assert json.loads((out / "summary.json").read_text())["model"].endswith("/model")
    assert "ridge" in call(*arguments, "--regrade")
    with pytest.raises(InputError, match="not both"):
        call(*arguments, "--lenvm", "x", "--endpoint", "http://x/v1")


def test_length_tokens_with_a_value_model_folder(value_model, tmp_path):
    from evals.prediction.test_prediction import write

    data = write(tmp_path / "t.jsonl", [(i, "m", "test", 12, "stop") for i in range(4)])
    out = tmp_path / "out"
    arguments = ["length-tokens", data, "-o", out, "--threshold", 0, "--min-count", 1]
    output = call(*arguments, "--lenvm", value_model, "--device", "cpu")
    assert "w7" in output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_tokens"] == 4 * 11
    assert "results in" in call(*arguments, "--no-merge", "--regrade")


@pytest.mark.parametrize("command", ["length-prediction", "length-tokens"])
def test_data_of_another_tokenizer_is_refused(value_model, tmp_path, command):
    from evals.prediction.test_prediction import change, write

    data = write(tmp_path / "t.jsonl", [(i, "m", "test", 30 + i, "stop") for i in range(5)] * 2)
    change(data, 7, 9)
    arguments = [command, data, "-o", tmp_path / "out", "--lenvm", value_model, "--device", "cpu"]
    with pytest.raises(DataError, match="sampled with another tokenizer"):
        call(*arguments)
    assert not (tmp_path / "out").exists()


def test_tokens_that_look_like_markup_are_printed_as_they_are(capsys, tmp_path):
    row = {"token": "[/b]", "num": 9, "num_events": 3, "event_share": 0.3, "mean_gain": 0.1}
    lists = ("longer_by_event", "shorter_by_event", "longer_by_mean", "shorter_by_mean")
    summary = {name: [row] for name in lists}
    print_tokens({**summary, "notes": ["a [/note]"], "num_failed": 0}, tmp_path)
    captured = capsys.readouterr()
    assert captured.out.count("[/b]") == 4
    assert "a [/note]" in captured.err


def test_scaling_trains_and_evaluates_every_cell(tmp_path):
    from training.test_trainer import write_data

    tiny_generator(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = write_data(tmp_path / "t.jsonl", 60)
    text = f"""
        [base]
        data = ["{data}"]
        backbone = "{tmp_path / "base"}"
        epochs = 1
        evals = 1
        [axes]
        head = ["scalar", "distribution"]
        num_prompts = [20]
    """
    (tmp_path / "grid.toml").write_text(text)
    out = tmp_path / "out"
    arguments = ["scaling", tmp_path / "grid.toml", "-o", out, "--split", "validation"]
    output = call(*arguments, "--min-completions", 1, "--device", "cpu")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_failed"] == 0, summary["notes"]
    assert len(summary["cells"]) == 2
    assert {"val_loss", "mre", "mre_at_0.5"} <= set(summary["metrics"])
    assert "distribution" in output
    before = (out / "records.jsonl").read_bytes()
    call(*arguments, "--min-completions", 1, "--device", "cpu")
    assert (out / "records.jsonl").read_bytes() == before
