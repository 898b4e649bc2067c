import sys
from pathlib import Path
from typing import Any

import pytest

from lenvm.errors import InputError
from lenvm.pipeline.config import PipelineConfig, ServerConfig
from lenvm.pipeline.plan import Command, Node, plan, to_flags
from lenvm.pipeline.run import describe, select
from lenvm.pipeline.servers import server_argv, server_environment

VALUES: dict[str, Any] = {
    "folder": "runs/x",
    "generator": "gen",
    "servers": {
        "many": {"engine": "vllm", "replicas": 2, "gpus": 4, "arguments": ["--seed", "1"]},
        "guided": {"engine": "vllm", "lenvm": "runs/x/model", "port": 9000},
    },
    "download": [{"name": "data", "repo": "lenvm-data"}],
    "convert": [{"name": "old", "files": ["a.jsonl"], "tokenizer": "gen"}],
    "sample": [
        {"name": "math", "prompts": "bundled", "server": "many", "n": 16, "concurrency": 9},
        {"name": "here", "prompts": "bundled"},
    ],
    "train": {"launcher": "torchrun", "processes": 8, "epochs": 2, "data": ["more.jsonl"]},
    "evaluate": [
        {"name": "p", "evaluation": "length-prediction"},
        {"name": "l", "evaluation": "lifebench", "arguments": ["items"], "server": "guided"},
        {"name": "t", "evaluation": "tradeoff", "arguments": ["gsm8k"]},
    ],
    "report": {},
}


def make(**changes: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({**VALUES, **changes})


def by_name(config: PipelineConfig, node: Node | None = None) -> dict[str, Command]:
    return {c.name: c for c in plan(config, node)}


def test_stages_stand_in_order_with_what_they_read_and_write():
    commands = by_name(make())
    assert list(commands) == [
        *("download-data", "convert-old", "sample-math", "sample-here", "train"),
        *("evaluate-p", "evaluate-l", "evaluate-t", "report"),
    ]
    files = [f"runs/x/trajectories/{name}.jsonl" for name in ("old", "math", "here")]
    train = commands["train"].arguments
    assert train[:5] == ("train", *files, "more.jsonl")
    assert "epochs=2" in train
    assert 'backbone="gen"' in train
    assert commands["train"].inputs == ("convert-old", "sample-math", "sample-here")
    assert commands["evaluate-p"].arguments[:4] == ("eval", "length-prediction", *files[:2])
    assert commands["evaluate-p"].arguments[-2:] == ("--lenvm", "runs/x/model")
    assert "--lenvm" not in commands["evaluate-l"].arguments  # the server guides
    assert commands["evaluate-t"].arguments[-4:] == ("--lenvm", "runs/x/model", "--model", "gen")
    assert commands["sample-here"].arguments[-2:] == ("--model", "gen")
    assert commands["report"].inputs == ("evaluate-p", "evaluate-l", "evaluate-t")
    urls = ["http://a/v1", "http://b/v1"]
    assert commands["sample-math"].argv(urls).count("--endpoint") == 2
    assert commands["evaluate-l"].argv(urls).count("--endpoint") == 1


def test_what_only_says_how_fast_is_not_in_the_manifest():
    def config(**fields: Any) -> Any:
        sample = {**VALUES["sample"][0], **fields}
        return by_name(make(sample=[sample]))["sample-math"].config

    assert config(concurrency=10) == config() != config(n=8)
    assert config(server=None) == config()


def test_several_machines_sample_their_shards_and_train_together():
    first, second = (by_name(make(), Node(i, 2, "n0", 4000)) for i in range(2))
    assert "1/2" in second["sample-math"].arguments
    assert first["sample-math"].config == second["sample-math"].config
    assert str(second["sample-math"].output).endswith("math.1-of-2.jsonl")
    assert first["train"].arguments == second["train"].arguments
    assert "runs/x/trajectories/math.1-of-2.jsonl" in first["train"].arguments
    line = " ".join(second["train"].argv())
    assert "--nnodes 2 --node-rank 1 --master-addr n0 --master-port 4000 --nproc-per-node 8" in line
    train = {**VALUES["train"], "launcher": "accelerate", "launcher_arguments": ["--use_fsdp"]}
    line = " ".join(by_name(make(train=train), Node(1, 2, "n0"))["train"].argv())
    assert "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip n0" in line
    assert line.index("--use_fsdp") < line.index("-m lenvm train")
    assert first["train"].everywhere
    assert not first["evaluate-p"].everywhere
    assert "machine 0 runs it" in describe(make(), Node(1, 2))
    with pytest.raises(InputError, match="several machines needs"):
        plan(make(train={"epochs": 1}), Node(0, 2))
    with pytest.raises(InputError, match="node 2 of 2"):
        Node(2, 2)


def test_servers_start_as_their_engines_want(monkeypatch: pytest.MonkeyPatch):
    def argv(**fields: Any) -> str:
        config = ServerConfig.model_validate({"engine": "vllm", **fields})
        return " ".join(server_argv(config, "gen", 8001)).replace(sys.executable, "python")

    assert argv(gpus=2) == ("vllm serve gen --host 127.0.0.1 --port 8001 --tensor-parallel-size 2")
    assert argv(engine="sglang", arguments=["--x"]) == (
        "python -m sglang.launch_server --model-path gen --host 127.0.0.1 --port 8001 --x"
    )
    assert argv(lenvm="v", model="m") == (
        "python -m lenvm serve --engine vllm --model m --lenvm v --host 127.0.0.1 --port 8001"
    )
    assert argv(engine="lenvm").startswith("python -m lenvm serve --model gen --host")
    assert argv(engine="command", command=["a", "{port}", "{model}"]) == "a 8001 gen"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = ServerConfig(engine="vllm", gpus=2, replicas=2, environment={"A": "b"})
    assert server_environment(two, 1) == {"CUDA_VISIBLE_DEVICES": "2,3", "A": "b"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert server_environment(two, 1)["CUDA_VISIBLE_DEVICES"] == "6,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(InputError, match="replica 1 needs GPUs 2 to 3"):
        server_environment(two, 1)
    assert server_environment(ServerConfig(engine="vllm", gpus=0), 0) == {}


def test_a_dry_run_can_be_copied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lines = describe(make()).splitlines()
    serve = "CUDA_VISIBLE_DEVICES=4,5,6,7 vllm serve gen --host 127.0.0.1 --port 8001"
    assert any(line.startswith(serve) and line.endswith("&") for line in lines)
    assert sum("vllm serve gen" in line for line in lines) == 2
    assert any(line.startswith("lenvm eval lifebench items") for line in lines)
    short = describe(make(), until="sample").splitlines()
    assert short == lines[: len(short)]
    assert short[-2] == "# sample-here"


def test_options_become_flags():
    options = {"max_tokens": 5, "where": ["a=b", "c=d"], "strict": True, "merge": False}
    assert to_flags({**options, "length": [{"equal_to": 3}]}) == [
        *("--max-tokens", "5", "--where", "a=b", "--where", "c=d", "--strict", "--no-merge"),
        *("--length", '{"equal_to": 3}'),
    ]


def test_what_cannot_be_planned_is_said():
    with pytest.raises(InputError, match="no stage 'bench'; the stages are download-data"):
        select(plan(make()), "bench")
    with pytest.raises(InputError, match="has no stage"):
        plan(PipelineConfig(folder="x"))
    with pytest.raises(InputError, match="nothing to train on"):
        plan(PipelineConfig.model_validate({"folder": "x", "train": {}}))
    with pytest.raises(InputError, match="p has nothing to read"):
        plan(make(sample=[], convert=[], train=None, evaluate=VALUES["evaluate"][:1]))
    with pytest.raises(InputError, match="a report needs evaluations"):
        plan(make(evaluate=[]))


def test_a_changed_prompt_file_changes_the_stage(tmp_path: Path):
    prompts = tmp_path / "p.jsonl"
    sample = [{"name": "a", "prompts": str(prompts)}]
    prompts.write_text('{"prompt": "a"}\n')
    before = by_name(make(sample=sample))["sample-a"].config
    prompts.write_text('{"prompt": "b"}\n')
    assert by_name(make(sample=sample))["sample-a"].config != before
