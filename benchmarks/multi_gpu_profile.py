"""Where an optimizer step's time goes, under any layout: a training that is looked at, then ended.

    accelerate launch --config_file configs/fsdp2.yaml --num_processes 2 \\
        benchmarks/multi_gpu_profile.py CONFIG.json OUT.json

CONFIG.json holds the settings of `lenvm train`. Process 0 writes: wall time of a step, without and
under the profiler (which slows the host: where both are equal, the device is what takes the time),
what the device was busy with (all of it, computing, communication), what the host did longest, and
what FSDP did there. `multi_gpu.py profile` runs it for one GPU and for each layout.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SKIP, LOOK = 4, 3
"""Steps before anything is timed; steps that are timed alone, and as many under the profiler."""


def watch(out: Path) -> None:
    """Profile some steps of the training that follows, then end it."""
    from lenvm.training.loop import LenVMTrainer

    original = LenVMTrainer.training_step
    state: dict[str, Any] = {"number": 0}

    def training_step(self: Any, *args: Any) -> Any:
        number = state["number"]
        if number in (SKIP, SKIP + LOOK, SKIP + 2 * LOOK):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            state[number] = time.perf_counter()
        if number == SKIP + LOOK:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            state["profile"] = profile(activities=activities)
            state["profile"].__enter__()
        if number == SKIP + 2 * LOOK:
            state["profile"].__exit__(None, None, None)
            if self.args.process_index == 0:
                alone = (state[SKIP + LOOK] - state[SKIP]) / LOOK
                wall = (state[number] - state[SKIP + LOOK]) / LOOK
                found = {"wall_alone_ms": 1e3 * alone, **describe(state["profile"], wall)}
                out.write_text(json.dumps(found, indent=1))
            self.control.should_training_stop = True
        state["number"] += 1
        return original(self, *args)

    # `train` makes its trainer itself, so the class is what can be watched from here
    LenVMTrainer.training_step = training_step  # type: ignore[method-assign]


def describe(seen: Any, wall_s: float) -> dict[str, Any]:
    """Milliseconds a step, each."""
    rows = seen.key_averages()
    kernels = [e for e in seen.events() if str(e.device_type).endswith("CUDA")]
    computing = [e for e in kernels if "nccl" not in e.name.lower()]
    nccl = sum(e.time_range.elapsed_us() for e in kernels if "nccl" in e.name.lower())
    fsdp: dict[str, list[float]] = {}
    for row in rows:
        if row.key.startswith("FSDP::"):
            spent = fsdp.setdefault(row.key.partition(" ")[0], [0.0, 0.0])
            spent[0] += row.cpu_time_total / 1e3 / LOOK
            spent[1] += row.count / LOOK
    longest = sorted(rows, key=lambda r: -r.self_cpu_time_total)[:20]
    heaviest = sorted(rows, key=lambda r: -r.self_device_time_total)[:20]
    return {
        "wall_ms": 1e3 * wall_s,
        "device_busy_ms": measure_union(kernels) / 1e3 / LOOK,
        "computing_ms": measure_union(computing) / 1e3 / LOOK,
        "communication_ms": nccl / 1e3 / LOOK,
        "fsdp_host_ms_and_calls": fsdp,
        "host_ms": {r.key[:60]: r.self_cpu_time_total / 1e3 / LOOK for r in longest},
        "host_calls": {r.key[:60]: r.count / LOOK for r in longest},
        "device_ms": {r.key[:60]: r.self_device_time_total / 1e3 / LOOK for r in heaviest},
    }


def measure_union(kernels: list[Any]) -> float:
    """Microseconds in which at least one of them ran."""
    busy, end = 0.0, 0.0
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in kernels):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    sys.path[:0] = [str(root / "src"), str(root / "tests/training")]
    if not torch.cuda.is_available():
        from cpu_layouts import allow_cpu_layouts

        allow_cpu_layouts()
    from lenvm.training.config import TrainingConfig
    from lenvm.training.trainer import train

    settings, target = (Path(a) for a in sys.argv[1:])
    watch(target)
    train(TrainingConfig.parse(json.loads(settings.read_text())))
