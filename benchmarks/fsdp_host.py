"""What FSDP2 and ZeRO-3 ask of the host in an optimizer step: 24 layers so small that the device
has no part.

    python benchmarks/fsdp_host.py [--out FILE]

One process of a fake group of two: collectives take no time, so what is left is Python and
dispatch. A step is two micro batches, clipping and AdamW, as `lenvm train` runs them on each of two
GPUs. ZeRO-3 is measured where DeepSpeed is installed, with configs/zero3.json, in a process for
each layout (it changes torch for good); on CPUs it has no streams to wait for.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import pairwise
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
ZERO3 = ("zero3, module by module", "zero3, layer by layer", "zero3")
"""The last is what small models get: weights joined, gradients reduced once a step."""
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


def measure_zero3(layout: str) -> dict[str, float]:
    """Median milliseconds of a step's parts under DeepSpeed."""
    import deepspeed
    from deepspeed import comm

    from lenvm.training.model import keep_whole
    from tiny import tiny_backbone

    os.environ.setdefault("LOCAL_RANK", "0")
    backend: Any = sys.modules["deepspeed.comm.torch"]
    backend.build_shm_op = lambda: None  # compiles for minutes
    comm.init_distributed("fake")
    config = json.loads((ROOT / "configs/zero3.json").read_text()) | {"gradient_clipping": 1.0}
    model = whole(tiny_backbone("qwen2", num_hidden_layers=NUM_LAYERS).train())
    if layout == "zero3":
        keep_whole(model, config)
    elif layout.endswith("layer by layer"):
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.backbone.layers[0])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    input_ids = torch.randint(3, 60, (1, 16))
    rows = []
    for _ in range(NUM_STEPS + 3):
        start = time.perf_counter()
        with engine.coalesce_grad_reduction() if layout == "zero3" else nullcontext():
            for is_last in (False, True):
                engine.set_gradient_accumulation_boundary(is_last)
                engine.backward(engine(input_ids).float().sum())
            done = time.perf_counter()
        reduced = time.perf_counter()
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        times = (start, done, reduced, time.perf_counter())
        rows.append([1e3 * (b - a) for a, b in pairwise(times)])
    parts = [round(statistics.median(part), 2) for part in zip(*rows[3:], strict=True)]
    names = ("forward_backward_ms", "reduce_ms", "optimizer_ms")
    return {**dict(zip(names, parts, strict=True)), "step_ms": round(sum(parts), 2)}


def whole(backbone: Any) -> Any:
    """A backbone alone whose weights may be joined as a value model's are."""
    from lenvm.training.model import PackedModel

    class Whole(PackedModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.backbone, self._joined = backbone, {}

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            self.lay_out_weights()
            hidden: torch.Tensor = self.backbone(input_ids=input_ids, use_cache=False)[0]
            return hidden

    return Whole()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fsdp_host_cpu.json")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--zero3", choices=ZERO3, help="measure this alone, and write no file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    if arguments.zero3:
        print(json.dumps(measure_zero3(arguments.zero3)))
        return
    found: dict[str, Any] = {
        "schema": "lenvm.fsdp_host/1",
        "command": " ".join(["python", *sys.argv]),
        "commit": arguments.commit,
        "hardware": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "layouts": {layout: measure(layout) for layout in LAYOUTS},
    }
    for layout in ZERO3 if find_spec("deepspeed") else ():
        command = [sys.executable, "-W", "ignore", __file__, "--zero3", layout]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found["layouts"][layout] = json.loads(text.splitlines()[-1])
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
