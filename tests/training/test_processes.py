"""Several processes give one process's losses; a killed one ends where it would have ended."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lenvm.training.config import TrainingConfig
from lenvm.training.trainer import train
from tiny import tiny_generator, tiny_tokenizer
from training.test_trainer import read_metrics, write_data

SCRIPT = Path(__file__).with_name("run_training.py")
NAMES = ("one", "two")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    tiny_generator(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_data(tmp_path / "t.jsonl", 200)
    return {
        "data": [str(tmp_path / "t.jsonl")],
        "backbone": str(tmp_path / "base"),
        "learning_rate": 1e-3,
        "precision": "fp32",  # in bf16 a product's rounding depends on the batch it is in
        "batch_tokens": 128,
        "accumulation": 3,
        "epochs": 2,
        "evals": 5,
    }


def pick_port() -> str:
    """Not from `random`, which hypothesis seeds alike in every worker, and below the ports that the
    system gives to outgoing connections."""
    return str(random.SystemRandom().randint(20_000, 32_000))


def start(tmp_path: Path, settings: dict[str, Any], processes: int = 1) -> subprocess.Popen[bytes]:
    path = tmp_path / f"{Path(settings['output']).name}.json"
    path.write_text(json.dumps(settings))
    launcher = [sys.executable, str(SCRIPT), str(path)]
    if processes > 1:
        options = ["--nproc-per-node", str(processes), "--master-port", pick_port()]
        launcher[1:1] = ["-m", "torch.distributed.run", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(launcher, env=env, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()[-3000:]


def losses(tmp_path: Path, name: str) -> tuple[list[float], list[float]]:
    rows = read_metrics(tmp_path, name)
    return [r["loss"] for r in rows if "loss" in r], [
        r["eval_loss"] for r in rows if "eval_loss" in r
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "batch_sequences": 20,
            "share_prompts": True,
            "head": "scalar",
            "aggregation": "sequence_mean",
        },
    ],
    ids=["default", "shared-prompts-sequence-mean"],
)
@pytest.mark.filterwarnings("ignore:aggregation")
def test_two_processes_and_one_give_the_same_losses_and_weights(
    tmp_path: Path, settings: dict[str, Any], fields: dict[str, Any]
):
    settings |= fields
    if "batch_sequences" in fields:
        del settings["accumulation"]
    one = {**settings, "output": str(tmp_path / "one")}
    two = {**settings, "output": str(tmp_path / "two")}
    train(TrainingConfig.parse(one))
    finish(start(tmp_path, two, processes=2))
    for a, b in zip(losses(tmp_path, "one"), losses(tmp_path, "two"), strict=True):
        assert len(a) > 3
        assert a == pytest.approx(b, rel=1e-5)
    norms = [[r["grad_norm"] for r in read_metrics(tmp_path, n) if "loss" in r] for n in NAMES]
    # AdamW alone would hide a wrong scale
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    # AdamW takes a full step where a gradient is nothing but rounding, so single weights may differ
    start_weights, a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("base", *NAMES))
    for name, tensor in a.items():
        moved = (tensor - start_weights[f"model.{name}"]).norm()
        assert moved > 0
        assert (tensor - b[name]).norm() < 1e-3 * moved, name
    # metrics but for speed are the same too
    first, second = ([r for r in read_metrics(tmp_path, n) if "eval_mae" in r][-1] for n in NAMES)
    for name in ("eval_mae", "eval_rmse", "eval_relative_error_at_50", "eval_calibration_error"):
        assert first[name] == pytest.approx(second[name], rel=1e-3)


def test_a_state_of_two_processes_is_continued_by_one(tmp_path: Path, settings: dict[str, Any]):
    whole = {**settings, "output": str(tmp_path / "whole")}
    train(TrainingConfig.parse(whole))
    mixed = {**settings, "output": str(tmp_path / "mixed")}
    kill_after(start(tmp_path, mixed, processes=2), tmp_path / "mixed.metrics.jsonl", rows=12)
    state = list((tmp_path / "mixed.state").glob("checkpoint-*/complete"))
    assert state, "killed before the first checkpoint: raise rows"
    train(TrainingConfig.parse(mixed))
    for a, b in zip(losses(tmp_path, "whole"), losses(tmp_path, "mixed"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_kill_9_at_a_random_moment_changes_nothing(tmp_path: Path, settings: dict[str, Any]):
    """Losses and weights of the continued run are those of the whole one, bit for bit."""
    settings |= {"lora_dropout": 0.1, "trainable": "lora"}  # dropout: the RNG's state counts
    whole = {**settings, "output": str(tmp_path / "whole")}
    finish(start(tmp_path, whole))
    killed = {**settings, "output": str(tmp_path / "killed")}
    rows = random.SystemRandom().randint(1, 15)
    print(f"killed after {rows} rows")
    kill_after(start(tmp_path, killed), tmp_path / "killed.metrics.jsonl", rows)
    finish(start(tmp_path, killed))
    assert losses(tmp_path, "whole") == losses(tmp_path, "killed")
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        a, b = (load_file(tmp_path / n / name) for n in ("whole", "killed"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def kill_after(process: subprocess.Popen[bytes], metrics: Path, rows: int) -> None:
    """SIGKILL the process and its children once the metrics file has so many rows."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
