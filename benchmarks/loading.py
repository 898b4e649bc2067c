"""Tokens/s of the training loader: plan, map, pack. Two CPU cores must outrun any one GPU.

    python benchmarks/loading.py --out benchmarks/results/loading_cpu.json

Writes a synthetic trajectory file, parses it once (`parse`: JSON to the token store), maps it again
(`open`), and packs epochs of optimizer steps as training does (`pack`: what the GPU waits for, with
and without shared prompts).
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from lenvm.data.dataset import Sequences, TokenStore  # noqa: E402
from lenvm.data.packing import BatchPlan  # noqa: E402
from lenvm.data.trajectory import Trajectory  # noqa: E402
from lenvm.training.objective import Objective  # noqa: E402
from lenvm.training.steps import Packer, RunSteps  # noqa: E402


def write_trajectories(path: Path, num_prompts: int) -> None:
    """Four completions a prompt, lengths log-normal around 400 tokens."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for prompt, sample in itertools.product(range(num_prompts), range(4)):
            if sample == 0:
                length = int(np.clip(random.lognormal(5.0, 0.6), 20, 700))
                ids = random.integers(3, 150_000, length).tolist()
            length = int(np.clip(random.lognormal(5.9, 0.8), 4, 1500))
            row = Trajectory.model_validate(
                {
                    "schema": "lenvm.trajectory/1",
                    "id": f"{prompt:016x}-{sample}",
                    "prompt_hash": f"{prompt:016x}",
                    "sample_index": sample,
                    "prompt_text": "",
                    "prompt_token_ids": ids,
                    "completion_token_ids": random.integers(3, 150_000, length).tolist(),
                    "completion_text": "",
                    "finish_reason": "stop",
                    "model": "synthetic",
                }
            )
            file.write(row.to_json_line() + b"\n")


def measure_packing(sequences: Sequences, seconds: float, share_prompts: bool) -> dict[str, float]:
    plan = BatchPlan(
        sequences, 32_768, step_sequences=1024, grouped=share_prompts, share_prompts=share_prompts
    )
    packer = Packer(sequences, torch.device("cpu"), share_prompts)
    begin, tokens, batches = time.perf_counter(), 0, 0
    steps = RunSteps(plan, Objective(), 1000, 0)
    planned = time.perf_counter() - begin
    begin = time.perf_counter()
    for index in range(len(steps)):
        for rows in steps[index].micro_batches:
            tokens += packer(rows).num_tokens
            batches += 1
        if time.perf_counter() - begin > seconds:
            break
    spent = time.perf_counter() - begin
    return {
        "tokens_per_s": tokens / spent,
        "ms_per_batch": 1e3 * spent / batches,
        "plan_1000_epochs_s": planned,
    }


def read_cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/loading_cpu.json")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"schema": "lenvm.benchmark.loading/1", "command": " ".join(sys.argv)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        write_trajectories(path, options.prompts)
        begin = time.perf_counter()
        store = TokenStore.load(path)
        parse = time.perf_counter() - begin
        begin = time.perf_counter()
        sequences = Sequences.select([TokenStore.load(path)], "train")
        opened = time.perf_counter() - begin
        found["num_tokens"] = int(sequences.totals.sum())
        found["parse"] = {"tokens_per_s": len(store.tokens) / parse}
        found["open"] = {"seconds": opened}
        found["pack"] = measure_packing(sequences, options.seconds, False)
        found["pack_shared_prompts"] = measure_packing(sequences, options.seconds, True)
    commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found["machine"] = {
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "cpu": read_cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
    found["headline"] = {"loader_tokens_per_s": found["pack"]["tokens_per_s"]}
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
