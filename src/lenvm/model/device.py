"""Where models run, and in which precision."""

from typing import Any

from lenvm.errors import InputError


def pick_device(device: str | None = None) -> str:
    """The device asked for (InputError where it is a GPU and none is there), else the best one."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, but torch sees no GPU here; use cpu")
    return device


def has_fast_bf16(device: str) -> bool:
    """True on GPUs and on CPUs with bf16 instructions; elsewhere bf16 is several times slower."""
    import torch

    if device.startswith("cuda"):
        return True
    cpu: Any = torch.cpu
    return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def pick_dtype(device: str) -> Any:
    """bf16 where it is fast, else fp32."""
    import torch

    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def pin(values: Any, dtype: Any, device: Any) -> Any:
    """Numbers as a tensor on the host from which `device` can read while the host goes on."""
    import torch

    numbers = torch.as_tensor(values, dtype=dtype)
    return numbers.pin_memory() if torch.device(device).type == "cuda" else numbers


def upload(values: Any, dtype: Any, device: Any) -> Any:
    """Numbers as a tensor on `device`, without waiting for what it has still to do."""
    return pin(values, dtype, device).to(device, non_blocking=True)
