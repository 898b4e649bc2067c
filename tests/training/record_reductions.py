"""`python record_reductions.py CONFIG.json`: a process that trains under ZeRO-3 and writes what is
done to gradients, in order, beside the output.

Process 1 has a micro batch more, a stand-in, in all steps but the first, in which DeepSpeed
compares the processes' forwards.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any


def record(events: list[str]) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    from lenvm.training.loop import LenVMTrainer

    backward, partition, step = (
        DeepSpeedEngine.backward,
        Optimizer.partition_grads,
        LenVMTrainer._step_whole,
    )
    names: dict[int, str] = {}

    def recorded_backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.update({id(p): name for name, p in self.module.named_parameters()})
        events.append("begin")
        result = backward(self, *args, **kwargs)
        events.append("end")
        return result

    def recorded_partition(self: Any, parameters: Any, *args: Any) -> Any:
        """What follows a reduction."""
        events.append(" ".join(names[id(p)] for p in parameters))
        return partition(self, parameters, *args)

    def uneven_step(self: Any, engine: Any, inputs: Any, *args: Any) -> None:
        if self.args.process_index == 1 and "step" in events:
            stand_in = inputs.micro_batches[0][:0]
            inputs = replace(inputs, micro_batches=[*inputs.micro_batches, stand_in])
        events.append("step")
        step(self, engine, inputs, *args)

    DeepSpeedEngine.backward = recorded_backward
    Optimizer.partition_grads = recorded_partition
    LenVMTrainer._step_whole = uneven_step  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / "src")]
    warnings.filterwarnings("ignore")
    from cpu_layouts import allow_cpu_layouts

    allow_cpu_layouts()
    from torch import distributed

    from lenvm.training.config import TrainingConfig
    from lenvm.training.trainer import leave_group, train

    config = TrainingConfig.parse(json.loads(Path(sys.argv[1]).read_text()))
    seen: list[str] = []
    record(seen)
    train(config)
    Path(f"{config.output}.events{distributed.get_rank()}.json").write_text(json.dumps(seen))
    leave_group()
