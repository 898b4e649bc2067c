"""DDP and FSDP2 on GPUs, from the shipped configurations, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lenvm.model.value_model import LengthValueModel
from lenvm.training.config import TrainingConfig
from tiny import tiny_generator, tiny_tokenizer
from training.test_processes import SCRIPT, finish, kill_after, losses
from training.test_trainer import write_data

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_configurations_are_what_accelerate_reads():
    from accelerate.commands.config.config_args import ClusterConfig

    assert [p.stem for p in CONFIGS] == ["ddp", "fsdp2", "zero2", "zero3"]
    for path in CONFIGS:
        values = yaml.safe_load(path.read_text())
        assert ClusterConfig.from_yaml_file(yaml_file=path).num_machines == 1
        if "deepspeed_config" in values:
            file = ROOT / values["deepspeed_config"]["deepspeed_config_file"]
            stage = json.loads(file.read_text())["zero_optimization"]["stage"]
            assert path.stem == f"zero{stage}"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_losses_of_one(tmp_path: Path, layout: str):
    tiny_generator(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings = {
        "data": [write_data(tmp_path / "t.jsonl", 200)],
        "backbone": str(tmp_path / "base"),
        "learning_rate": 1e-3,
        "batch_tokens": 128,
        "accumulation": 3,
        "epochs": 2,
        "evals": 5,
    }
    run(tmp_path, {**settings, "output": str(tmp_path / "one")}, [sys.executable])
    launcher = ["--config_file", str(ROOT / "configs" / f"{layout}.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    run(tmp_path, {**settings, "output": str(tmp_path / "two")}, command)
    for a, b in zip(losses(tmp_path, "one"), losses(tmp_path, "two"), strict=True):
        assert a == pytest.approx(b, rel=2e-2)  # bf16
    LengthValueModel.from_pretrained(tmp_path / "two")
    again = {k: v for k, v in settings.items() if k != "backbone"}
    again |= {"init_from": str(tmp_path / "two"), "output": str(tmp_path / "again"), "epochs": 1}
    run(tmp_path, again, [sys.executable])  # and it goes on in one process
    assert losses(tmp_path, "again")[1][0] == pytest.approx(
        losses(tmp_path, "two")[1][-1], rel=2e-2
    )
    killed = {**settings, "output": str(tmp_path / "killed")}
    kill_after(launch(tmp_path, killed, command), tmp_path / "killed.metrics.jsonl", rows=12)
    assert list((tmp_path / "killed.state").glob("checkpoint-*/complete"))
    run(tmp_path, killed, command)
    for a, b in zip(losses(tmp_path, "two"), losses(tmp_path, "killed"), strict=True):
        assert a == pytest.approx(b, rel=2e-2)


def launch(
    tmp_path: Path, settings: dict[str, Any], launcher: list[str]
) -> "subprocess.Popen[bytes]":
    TrainingConfig.parse(settings)
    path = tmp_path / f"{Path(settings['output']).name}.json"
    path.write_text(json.dumps(settings))
    count = "0,1" if "--num_processes" in launcher else "0"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": count}
    command = [*launcher, str(SCRIPT), str(path)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True)


def run(tmp_path: Path, settings: dict[str, Any], launcher: list[str]) -> None:
    finish(launch(tmp_path, settings, launcher))
