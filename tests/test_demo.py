"""The demo's path on a tiny model: every stage, killed and continued, complete, other settings."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lenvm.demo import DemoConfig, run_demo
from lenvm.errors import InputError
from lenvm.reports.demo import build_demo_report, shortfalls
from tiny import EOS, tiny_generator, tiny_tokenizer

SIZES = {
    "train_prompts": 6,
    "heldout_prompts": 4,
    "max_tokens": 24,
    "batch": 8,
    "last_layers": 1,
    "batch_tokens": 4096,
    "control_prompts": 2,
    "control_max_tokens": 30,
    "targets": (6, 12),
}
RUN = """
import json, sys
from pathlib import Path
from lenvm.demo import DemoConfig, run_demo
sizes = json.loads(sys.argv[3])
sizes["targets"] = tuple(sizes["targets"])
run_demo(Path(sys.argv[1]), DemoConfig(generator=sys.argv[2], **sizes), lambda *_: None)
"""


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    model = tiny_generator(max_position_embeddings=4096)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_every_stage_is_there_and_a_second_run_is_over_at_once(generator, tmp_path):
    stages = []
    config = DemoConfig(generator=generator, **SIZES)
    summary = run_demo(tmp_path, config, lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == [
        "sample completions",
        *[s for s in dict.fromkeys(stages) if s not in {"sample completions", "predict"}][:-1],
        "predict",
        "generate with control",
    ]
    assert set(summary["sampling"]) == {
        *("num_prompts", "num_trajectories", "num_tokens", "num_truncated", "tokens_per_s"),
    }
    assert set(summary["training"]) == {
        *("num_tokens", "tokens_per_s", "val_loss_first", "val_loss_last"),
    }
    assert {"num_prompts", "mre", "mre_constant"} <= set(summary["prediction"])
    assert summary["equal_to"]["targets"] == [6, 12]
    for arm in ("unguided", "guided"):
        assert {"length_score", "deviation"} <= set(summary["equal_to"][arm])
    assert [t["scale"] for t in summary["tilt"]] == [-60, 0, 60]
    assert summary["equal_to"]["guided"]["deviation"] <= 0.05
    assert build_demo_report(tmp_path).exists()
    assert isinstance(shortfalls(summary), list)
    assert 0 < summary["peak_memory_gb"] < 6
    start = time.monotonic()
    assert run_demo(tmp_path, config, lambda *_: None) == json.loads(
        (tmp_path / "summary.json").read_text()
    )
    assert time.monotonic() - start < 5
    with pytest.raises(InputError, match="completions"):
        run_demo(tmp_path, DemoConfig(generator=generator, completions=3, **SIZES), print)


@pytest.mark.parametrize("until", ["trajectories.jsonl", "model.metrics.jsonl"])
def test_killed_it_goes_on_where_it_stopped(generator, tmp_path, until):
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path), generator]
    command.append(json.dumps(SIZES))
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    watched = tmp_path / until
    while not (watched.exists() and watched.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (tmp_path / "trajectories.jsonl").read_bytes()
    summary = run_demo(tmp_path, DemoConfig(generator=generator, **SIZES), lambda *_: None)
    rows = (tmp_path / "trajectories.jsonl").read_bytes().splitlines()
    ids = [json.loads(row)["id"] for row in rows]
    assert len(ids) == len(set(ids)) == summary["sampling"]["num_trajectories"]
    assert set(before.splitlines()[:-1]) <= set(rows)
