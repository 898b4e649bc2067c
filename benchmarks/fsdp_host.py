"""What FSDP2 asks of the host in an optimizer step: 24 layers so small that the device has no part.

    python benchmarks/fsdp_host.py [--out FILE]

One process of a fake group of two: collectives take no time, so what is left is Python and
dispatch. A step is two micro batches, clipping and AdamW, as `lenvm train` runs them on each of two
GPUs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.profiler import profile
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
LAYOUTS = ("one GPU", "fsdp2", "fsdp2_kept", "fsdp2_kept, weights gathered anew", "fsdp2_one_unit")
NUM_LAYERS, NUM_STEPS = 24, 80


def measure(layout: str) -> dict[str, float]:
    """Median milliseconds of a step's parts, and how often it gathers weights."""
    from tiny import tiny_backbone

    model = tiny_backbone("qwen2", num_hidden_layers=NUM_LAYERS).train()
    sharded, kept = layout != "one GPU", layout in ("fsdp2_kept", "fsdp2_one_unit")
    if sharded:
        if layout != "fsdp2_one_unit":
            for layer in model.layers:
                fully_shard(layer, reshard_after_forward=layout == "fsdp2")
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    input_ids = torch.randint(3, 60, (1, 16))
    parts: dict[str, list[float]] = {}

    def take_step() -> None:
        times = [time.perf_counter()]
        for is_last in (False, True):
            if sharded:
                model.set_requires_gradient_sync(is_last)
                model.set_reshard_after_backward(is_last or not kept)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=input_ids, use_cache=False).last_hidden_state.float().sum()
            loss.backward()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        model.zero_grad()
        times.append(time.perf_counter())
        names = ("forward_backward_ms", "clip_ms", "optimizer_ms", "zero_grad_ms")
        for name, start, stop in zip(names, times, times[1:], strict=False):
            parts.setdefault(name, []).append(1e3 * (stop - start))
        parts.setdefault("step_ms", []).append(1e3 * (times[-1] - times[0]))

    for _ in range(NUM_STEPS + 3):
        take_step()
    found = {name: round(statistics.median(values[3:]), 2) for name, values in parts.items()}
    with profile() as seen:
        take_step()
    names = [event.name.partition(" ")[0] for event in seen.events()]
    return {**found, "gathers": names.count("FSDP::all_gather")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fsdp_host_cpu.json")
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    found: dict[str, Any] = {
        "schema": "lenvm.fsdp_host/1",
        "command": " ".join(["python", *sys.argv]),
        "commit": arguments.commit,
        "hardware": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "layouts": {layout: measure(layout) for layout in LAYOUTS},
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
