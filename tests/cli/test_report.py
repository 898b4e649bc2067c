"""`lenvm values` to `lenvm report`: traces of a tiny model, and one page of result folders."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from evals.prediction.test_prediction import write
from lenvm.cli import predict, report, values
from lenvm.errors import DataError, InputError
from lenvm.model.prediction import trace_values
from lenvm.model.tokenization import encode_prompt
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.reports.traces import read_traces
from reports.made_up_evals import write_prediction, write_scaling
from tiny import EOS, tiny_backbone, tiny_tokenizer


def call(*arguments: object) -> str:
    """Run `lenvm values`, `predict` or `report`; errors propagate, as cli.main expects them."""
    app = typer.Typer()
    values.register(app)
    predict.register(app)
    report.register(app)
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        app, list(map(str, arguments)), catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def save_model(folder: Path, head: str) -> Path:
    model = LengthValueModel.build(
        tiny_backbone(), LenVMConfig(gamma=0.99, head=head, eos_token_ids=[EOS])
    )
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save_model(root / "one", "distribution"), save_model(root / "run" / "model", "scalar")]


@pytest.fixture
def trajectories(tmp_path) -> Path:
    rows = [(0, "math", "test", 9, "stop"), (1, "code", "test", 7, "length", {"equal_to": 20})]
    return write(tmp_path / "t.jsonl", rows)


def test_values_writes_versioned_traces_that_report_draws(models, trajectories, tmp_path):
    files = []
    for index, model in enumerate(models):
        lines = call(
            *("values", "--trajectories", trajectories, "--jsonl"),
            *("--lenvm", model, "--device", "cpu"),
        )
        files.append(tmp_path / f"{index}.jsonl")
        files[-1].write_text(lines)
    complete, cut = read_traces(files[0])
    assert json.loads(files[0].read_text().splitlines()[0])["schema"] == "lenvm.trace/1"
    assert (complete.model, complete.domain, complete.length) == ("one", "math", 9)
    assert complete.remaining_true == list(range(9, -1, -1))
    assert complete.values[-1] == 0
    assert complete.remaining_low is not None
    assert (cut.remaining_true, cut.control, cut.finish_reason) == (
        None,
        {"equal_to": 20},
        "length",
    )
    other, _ = read_traces(files[1])
    assert (other.model, other.remaining_low) == ("run/model", None)
    out = tmp_path / "page.html"
    assert call("report", *files, "-o", out).strip() == str(out)
    text = out.read_text()
    assert text.count('<article class="trace"') == 4
    assert text.count("hidden>") >= 2  # the two models' answer side by side, the others hidden


def test_values_of_texts_as_a_markdown_table(models):
    text = call(
        *("values", "w1 w2", "w3 w4 w5", "--markdown", "--lenvm", models[0], "--device", "cpu")
    )
    lines = text.strip().splitlines()
    assert lines[0] == "| step | token | value | predicted | true | relative error |"
    assert lines[2].startswith("| 0 | (prompt) |")
    assert "| 0.0000 | 0.0 | 0 | - |" in lines[-1]


def test_predict_gives_median_interval_and_the_probability_of_a_budget(models):
    arguments = ["predict", "w7 w8", "--lenvm", models[0], "--device", "cpu", "--budget", 60]
    row = json.loads(call(*arguments, "--jsonl"))
    model = LengthValueModel.from_pretrained(models[0])
    ids = encode_prompt(model.tokenizer, [{"role": "user", "content": "w7 w8"}])
    belief = model.belief(model.read([ids])[0][-1])
    assert row["p10"] < row["length"] == row["p50"] < row["p90"]
    assert row["p90"] == pytest.approx(belief.quantile(0.9).item(), rel=1e-3)
    within = belief.log_interval(torch.tensor(1), torch.tensor(60)).exp().item()
    assert 0 < within < 1
    assert row["p_within_budget"] == pytest.approx(within, abs=1e-5)
    table = call(*arguments)
    for shown in ("median", "80% interval", "P(<= 60)", f"{row['p10']:,.0f} - {row['p90']:,.0f}"):
        assert shown in table
    with pytest.raises(InputError, match="scalar head knows no"):
        call("predict", "w7", "--lenvm", models[1], "--device", "cpu", "--budget", 60)


def test_values_give_the_probability_that_the_whole_answer_fits(models):
    model = LengthValueModel.from_pretrained(models[0])
    states = trace_values(model, [4, 9], [7, 8, EOS], budget=40)
    (raw,) = model.read([[4, 9, 7, 8, EOS]])
    for t in range(3):
        left = torch.tensor(40 - t)
        within = model.belief(raw[1 + t]).log_interval(torch.tensor(1), left).exp().item()
        assert states[t]["p_within_budget"] == pytest.approx(within, abs=1e-5)
    assert states[3]["p_within_budget"] == 1.0
    assert trace_values(model, [4, 9], [7, 8, EOS], budget=2)[3]["p_within_budget"] == 0.0
    arguments = ["values", "w1", "w3 w4", "--lenvm", models[0], "--device", "cpu", "--budget", 9]
    assert "P(fits)" in call(*arguments)


def test_values_as_a_table_and_in_one_form_only(models):
    arguments = ["values", "w1", "w3 w4", "--lenvm", models[0], "--device", "cpu"]
    assert "(prompt)" in call(*arguments)
    with pytest.raises(InputError, match="not both"):
        call(*arguments, "--jsonl", "--markdown")


def test_report_makes_one_page_of_several_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [write_prediction(tmp_path / "p", num=9), write_scaling(tmp_path / "s")]
    assert call("report", *folders, "--title", "My <model>").strip() == "report.html"
    text = (tmp_path / "report.html").read_text()
    assert "<h1>My &lt;model&gt;</h1>" in text
    assert "Scaling" in text
    assert call("report", tmp_path, "-o", "all.html").strip() == "all.html"


def test_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        call("report", tmp_path / "none")
