"""The shipped configurations against one process: on GPUs, and FSDP2 on CPU processes too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lenvm.errors import InputError
from lenvm.model.value_model import LengthValueModel
from lenvm.training.config import TrainingConfig
from lenvm.training.trainer import train
from tiny import tiny_generator, tiny_tokenizer
from training.test_processes import SCRIPT, finish, kill_after, losses, pick_port
from training.test_trainer import write_data

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ON_TWO = "DeepSpeed ZeRO-3 on 2 processes"


def test_the_configurations_are_what_accelerate_reads():
    from accelerate.commands.config.config_args import ClusterConfig

    assert [p.stem for p in CONFIGS] == ["ddp", "fsdp2", "fsdp2_one_unit", "zero2", "zero3"]
    for path in CONFIGS:
        values = yaml.safe_load(path.read_text())
        assert ClusterConfig.from_yaml_file(yaml_file=path).num_machines == 1
        if "deepspeed_config" in values:
            file = ROOT / values["deepspeed_config"]["deepspeed_config_file"]
            stage = json.loads(file.read_text())["zero_optimization"]["stage"]
            assert path.stem == f"zero{stage}"


def tiny_settings(tmp_path: Path) -> dict[str, Any]:
    tiny_generator(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return {
        "data": [write_data(tmp_path / "t.jsonl", 100)],
        "backbone": str(tmp_path / "base"),
        "learning_rate": 1e-3,
        "batch_tokens": 128,
        "accumulation": 3,
        "epochs": 2,
        "evals": 2,
    }


def launch(
    tmp_path: Path, settings: dict[str, Any], layout: str | None, script: Path = SCRIPT
) -> subprocess.Popen[bytes]:
    """A training process on the CPU, or two of them under a shipped configuration."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings))
    command = [sys.executable, str(script), str(path)]
    if layout is not None:
        options = [
            "--config_file",
            str(ROOT / "configs" / f"{layout}.yaml"),
            "--num_processes",
            "2",
        ]
        options += ["--main_process_port", pick_port()]
        command[1:1] = ["-m", "accelerate.commands.launch", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2_one_unit"])
def test_fsdp2_gives_the_losses_of_one_process_and_ddp_goes_on_from_it(tmp_path: Path, layout: str):
    """fp32 weights under autocast in both: they part by the order of sums alone."""
    settings = tiny_settings(tmp_path)
    finish(launch(tmp_path, {**settings, "output": str(tmp_path / "one")}, None))
    mixed = {**settings, "output": str(tmp_path / "mixed")}
    process = launch(tmp_path, mixed, layout)
    state = tmp_path / "mixed.state"
    while not list(state.glob("checkpoint-*/complete")):
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(launch(tmp_path, mixed, "ddp"))
    for a, b in zip(losses(tmp_path, "one"), losses(tmp_path, "mixed"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    one, other = (LengthValueModel.from_pretrained(tmp_path / n) for n in ("one", "mixed"))
    fresh = LengthValueModel.build(str(tmp_path / "base"), one.config)
    ids = [[5, 6, 7, 8, 9, 10, 11, 12]]
    a, b, untrained = (model.read(ids)[0] for model in (one, other, fresh.eval()))
    assert (a - b).norm() < 0.02 * (a - untrained).norm()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"zero": {"stage3_max_live_parameters": 0}},
        {"zero": {"stage3_max_live_parameters": "default"}},
        {"gradient_checkpointing": True, "zero": {"stage3_param_persistence_threshold": 0}},
        {"trainable": "last", "last_layers": 1},
        {"trainable": "lora"},
        {"trainable": "head"},
        {"compile": True},
    ],
)
def test_zero3_gives_the_losses_of_one_process_and_goes_on(tmp_path: Path, fields: dict[str, Any]):
    """Weights gathered all at once, as a small model's are, or module by module."""
    pytest.importorskip("deepspeed")
    zero = fields.get("zero", {})
    settings = {**tiny_settings(tmp_path), "precision": "bf16"}
    settings |= {k: v for k, v in fields.items() if k != "zero"}
    config = yaml.safe_load((ROOT / "configs/zero3.yaml").read_text())
    deepspeed = json.loads((ROOT / "configs/zero3.json").read_text())
    deepspeed["zero_optimization"] |= zero
    if zero.get("stage3_max_live_parameters") == "default":
        del deepspeed["zero_optimization"]["stage3_max_live_parameters"]
    (tmp_path / "zero.json").write_text(json.dumps(deepspeed))
    config["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "zero.json")
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(config))
    layout = str(tmp_path / "zero")
    finish(launch(tmp_path, {**settings, "output": str(tmp_path / "one")}, None))
    two = {**settings, "output": str(tmp_path / "two")}
    process = launch(tmp_path, two, layout)
    while not list((tmp_path / "two.state").glob("checkpoint-*/complete")):
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    complete = next((tmp_path / "two.state").glob("checkpoint-*/complete"))
    is_whole = zero.get("stage3_max_live_parameters") != 0
    parts = ", joined in parts of 3 layers" if is_whole else ""
    assert json.loads(complete.read_text())["layout"] == f"{ON_TWO}{parts}"
    finish(launch(tmp_path, two, layout))
    for a, b in zip(losses(tmp_path, "one"), losses(tmp_path, "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    one, other = (LengthValueModel.from_pretrained(tmp_path / n) for n in ("one", "two"))
    ids = [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert torch.allclose(one.read(ids)[0], other.read(ids)[0], atol=2e-3)


def test_zero3_reduces_a_part_while_the_last_backward_goes_on(tmp_path: Path):
    """Seven layers are three parts. Processes may have different numbers of micro batches."""
    pytest.importorskip("deepspeed")
    settings = {**tiny_settings(tmp_path), "precision": "bf16", "epochs": 1}
    tiny_generator(num_hidden_layers=7).save_pretrained(tmp_path / "base")
    finish(launch(tmp_path, {**settings, "output": str(tmp_path / "one")}, None))
    two = {**settings, "output": str(tmp_path / "two")}
    finish(launch(tmp_path, two, "zero3", Path(__file__).with_name("record_reductions.py")))
    for a, b in zip(losses(tmp_path, "one"), losses(tmp_path, "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    parts = [f"joined_{name}" for name in ("head", "backbone_2", "backbone_1", "backbone_0")]
    last = ["begin", *parts, "end", "joined_backbone"]
    counts = []
    for process in (0, 1):
        events = json.loads((tmp_path / f"two.events{process}.json").read_text())
        steps = " ".join(events).split("step")[1:]
        before = [step.removesuffix(" ".join(last)) for step in map(str.strip, steps)]
        assert all(step.endswith(" ".join(last)) for step in map(str.strip, steps))
        assert all(set(text.split()) <= {"begin", "end"} for text in before)
        counts.append([text.count("begin") for text in before])
    assert max(counts[0]) > 0
    assert counts[1] == [counts[0][0], *(count + 1 for count in counts[0][1:])]


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2_one_unit"])
def test_fsdp2_goes_back_to_the_best_weights(tmp_path: Path, layout: str):
    """After an evaluation, which gathers weights. At this rate the last are not the best."""
    settings = {**tiny_settings(tmp_path), "learning_rate": 0.3, "best_metric": "loss"}
    finish(launch(tmp_path, {**settings, "output": str(tmp_path / "model")}, layout))
    _, evals = losses(tmp_path, "model")
    assert evals[-2] > 1.01 * min(evals)
    assert evals[-1] == pytest.approx(min(evals[1:]), rel=1e-5)


def test_another_layouts_state_is_refused_where_it_cannot_be_read(tmp_path: Path):
    settings = {**tiny_settings(tmp_path), "output": str(tmp_path / "model")}
    checkpoint = tmp_path / "model.state" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    text = json.dumps({"step": 3, "layout": "DeepSpeed ZeRO-3 on 8 processes"})
    (checkpoint / "complete").write_text(text)
    with pytest.raises(InputError, match="ZeRO-3 on 8 processes, and this one is on any but"):
        train(TrainingConfig.parse(settings))


def test_zero3_refuses_a_state_from_before_the_parts(tmp_path: Path):
    """Its parameters have other names."""
    pytest.importorskip("deepspeed")
    settings = {**tiny_settings(tmp_path), "output": str(tmp_path / "two"), "precision": "bf16"}
    checkpoint = tmp_path / "two.state" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete").write_text(json.dumps({"step": 3, "layout": ON_TWO}))
    process = launch(tmp_path, settings, "zero3")
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    expected = f"a run on {ON_TWO}, and this one is on {ON_TWO}, joined in parts of 3 layers;"
    assert expected in errors.decode()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp2_one_unit"])
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
    kill_after(
        launch_on_gpus(tmp_path, killed, command), tmp_path / "killed.metrics.jsonl", rows=12
    )
    assert list((tmp_path / "killed.state").glob("checkpoint-*/complete"))
    run(tmp_path, killed, command)
    for a, b in zip(losses(tmp_path, "two"), losses(tmp_path, "killed"), strict=True):
        assert a == pytest.approx(b, rel=2e-2)


def launch_on_gpus(
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
    finish(launch_on_gpus(tmp_path, settings, launcher))
