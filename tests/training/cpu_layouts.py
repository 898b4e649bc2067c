"""FSDP2 and DeepSpeed on CPU processes over gloo, where accelerate takes GPUs alone for them."""

import os
import sys
from typing import Any


def allow_cpu_layouts() -> None:
    """Give accelerate's state what it would hold on GPUs. The launcher's variables choose."""
    from accelerate import state
    from accelerate.utils import DistributedType

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm  # noqa: F401

        backend = sys.modules["deepspeed.comm.torch"]  # `comm.torch` is torch itself
        backend.build_shm_op = lambda: None  # type: ignore[attr-defined]  # compiles for minutes
    original = state.AcceleratorState.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        fresh = not state.AcceleratorState._shared_state
        original(self, *args, **kwargs)
        fsdp, deepspeed = kwargs.get("fsdp_plugin"), kwargs.get("deepspeed_plugin")
        if not fresh or self.distributed_type != DistributedType.MULTI_CPU:
            return
        if fsdp is not None and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            if self._mixed_precision != "no":
                fsdp.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp, DistributedType.FSDP
        elif deepspeed is not None:
            from deepspeed import comm

            comm.init_distributed("gloo")
            deepspeed.set_mixed_precision(self._mixed_precision)
            deepspeed.select(_from_accelerator_state=True)
            self.deepspeed_plugins, self.distributed_type = deepspeed, DistributedType.DEEPSPEED
        state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = initialise
