"""The commands of this package end to end: arguments in, files and tables out."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lenvm.data.trajectory import read_trajectories
from lenvm.errors import DataError, InputError
from stub_server import stub_server
from tiny import tiny_tokenizer


def run(*arguments: Any, code: int = 0) -> str:
    """Run one command; a LenVMError is raised as it is."""
    app = typer.Typer()
    app.callback()(lambda: None)
    for name in ("prompts", "sample", "stats", "convert", "download"):
        importlib.import_module(f"lenvm.cli.{name}").register(app)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_prompts_lists_counts_filters_and_converts(tmp_path: Path):
    assert "deepmath-103k" in run("prompts")
    source = tmp_path / "p.csv"
    source.write_text("q,subject,level\nOne?,math,1\nTwo?,math,2\none?,math,2\nThree?,code,2\n")
    fields = ("--field", "q", "--field", "domain=subject")
    assert "left out: 1 duplicates" in run("prompts", source, *fields)
    output = run("prompts", source, *fields, "--where", "level=2", "-o", tmp_path / "o.jsonl")
    assert "3 prompts written" in output
    assert "left out: 1 filtered" in output
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["messages"][0]["content"] for r in rows] == ["Two?", "one?", "Three?"]
    assert [r["domain"] for r in rows] == ["math", "math", "code"]
    again = run("prompts", tmp_path / "o.jsonl", "--show", 0)
    assert "o.jsonl: " in again.replace("\n", "")
    with pytest.raises(InputError, match="expected NAME=VALUE"):
        run("prompts", source, "--where", "level")


def test_sample_then_stats_then_convert_there_and_back(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    path = tmp_path / "t.jsonl"
    with stub_server() as stub:
        options = ("--endpoint", stub.url, "-n", 2, "--limit", 12, "--seed", 1, "--max-tokens", 30)
        output = run("sample", "bundled", "-o", path, *options, "--length", '{"equal_to": 9}')
        assert "24 completions written" in output
        assert stub.requests[0]["vllm_xargs"] == {"lenvm": '{"equal_to": 9}'}
        changed = (*options[:-1], 31, "--length", '{"equal_to": 9}')
        with pytest.raises(InputError, match=r"max_tokens.*30.*31"):
            run("sample", "bundled", "-o", path, *changed)
        stub.fail_when, stub.fail_status = "messages", 400
        other = ("--endpoint", stub.url, "--limit", 3, "--retries", 0)
        output = run("sample", "bundled", "-o", tmp_path / "f.jsonl", *other, code=5)
        assert "3 completions failed" in output
    assert "gamma for training" in run("stats", path)
    found = json.loads(run("stats", path, "--json"))
    assert found["groups"][-1]["num_completions"] == 24
    assert found["controlled"] == 24
    run("stats", path, "--plot", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    run("stats", path, "--downsample", tmp_path / "d.jsonl", "--per-prompt", 1)
    assert len(list(read_trajectories(tmp_path / "d.jsonl"))) == 12
    with pytest.raises(InputError, match="need --downsample"):
        run("stats", path, "--prompts", 3)
    run("convert", path, "-o", tmp_path / "p.jsonl", "--to", "published")
    with pytest.raises(InputError, match="--tokenizer"):
        run("convert", tmp_path / "p.jsonl", "-o", tmp_path / "b.jsonl")
    back = ("-o", tmp_path / "b.jsonl", "--tokenizer", tmp_path / "tok", "--split", "test")
    run("convert", tmp_path / "p.jsonl", *back)
    assert {t.split for t in read_trajectories(tmp_path / "b.jsonl")} == {"test"}


def test_stats_warns_of_what_training_would_suffer_from(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with stub_server(min_length=1, max_length=40) as stub:
        options = ("--endpoint", stub.url, "-n", 4, "--limit", 12, "--seed", 1)
        run("sample", "bundled", "-o", path, *options, "--max-tokens", 20)
        run("sample", "bundled", "-o", tmp_path / "whole.jsonl", *options, "--max-tokens", 40)
    rows = list(read_trajectories(path))
    cut = sum(not t.is_complete for t in rows)
    assert cut > 10
    output = run("stats", path)
    assert f"warning: {path}: {cut} of 48 completions ({100 * cut / 48:.0f}%) are trunc" in output
    assert "lengths are underestimated" in output
    assert "--set censoring=one_sided" in output
    assert "warning" not in run("stats", tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join([*lines, *lines[:5]]))
    output = run("stats", tmp_path / "twice.jsonl")
    assert "twice.jsonl: 5 completions have an id that an earlier line has" in output
    (told,) = json.loads(run("stats", tmp_path / "twice.jsonl", "--json"))["warnings"]
    assert told in output


def test_shards_sample_disjoint_parts(tmp_path: Path):
    with stub_server() as stub:
        for i in range(2):
            options = ("--endpoint", stub.url, "--limit", 40, "--shard", f"{i}/2")
            run("sample", "bundled", "-o", tmp_path / f"{i}.jsonl", *options)
    ids = [t.id for t in read_trajectories(tmp_path / "0.jsonl", tmp_path / "1.jsonl")]
    assert len(set(ids)) == len(ids) == 40
    with pytest.raises(InputError, match="expected I/K"):
        run("sample", "bundled", "-o", tmp_path / "x.jsonl", "--shard", "two")


def test_bad_arguments_are_named(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(DataError, match="no prompt file"):
        run("sample", tmp_path / "none.jsonl", "-o", path)
    with pytest.raises(InputError, match="--extra is"):
        run("sample", "bundled", "-o", path, "--endpoint", "http://127.0.0.1:9", "--extra", "[1]")
    with pytest.raises(InputError, match="--server is 'tgi'"):
        run("sample", "bundled", "-o", path, "--endpoint", "http://127.0.0.1:9", "--server", "tgi")
    with pytest.raises(DataError, match="does not exist"):
        run("stats", path)
    path.write_text("")
    with pytest.raises(DataError, match="holds no trajectories"):
        run("stats", path)
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match=r"t\.jsonl holds no trajectories, only an unfinished"):
        run("stats", path)
    with pytest.raises(InputError, match="allowed: model, dataset"):
        run("download", "a/b", "--kind", "space")
    assert "lenvm-data" in run("download")
