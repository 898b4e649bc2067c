"""Where models run, and in which precision."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lenvm.errors import InputError


def pick_device(device: str | None = None) -> str:
    """The device asked for, else the best one. InputError where torch has no such device here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return "cuda" if count else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError:  # torch's list of all it could be built for
        asked = None
    if asked is None or (asked.type not in ("cpu", "cuda") and not _is_accelerator(asked.type)):
        raise InputError(f"device is {device!r}; allowed: cpu, cuda, or one GPU such as cuda:1")
    if asked.type == "cuda" and not count:
        raise InputError(f"device is {device!r}, but torch sees no GPU here; use cpu")
    if asked.type == "cuda" and (asked.index or 0) >= count:
        raise InputError(
            f"device is {device!r}, but the GPUs here are cuda:0 to cuda:{count - 1}; use one of "
            "them"
        )
    return device


def _is_accelerator(kind: str) -> bool:
    """Whether torch has an accelerator of that kind (mps, xpu) on this machine."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == kind


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


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled at all."""
    return find_spec("triton") is not None


def pin(values: Any, dtype: Any, device: Any) -> Any:
    """Numbers as a tensor on the host from which `device` can read while the host goes on."""
    import torch

    numbers = torch.as_tensor(values, dtype=dtype)
    return numbers.pin_memory() if torch.device(device).type == "cuda" else numbers


def upload(values: Any, dtype: Any, device: Any) -> Any:
    """Numbers as a tensor on `device`, without waiting for what it has still to do."""
    return pin(values, dtype, device).to(device, non_blocking=True)


@contextmanager
def tf32_products() -> Iterator[None]:
    """fp32 matrix products on CUDA run in TF32 inside: factors of 10 bits, sums in fp32. A graph
    that is captured inside keeps it. The process's own setting comes back afterwards; meanwhile
    other threads have this one."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before == "tf32":
        yield
        return
    # The older of torch's two settings sets the newer one as well. The newer alone would leave them
    # at odds, and then whoever reads the older raises (the profiler, for one).
    _hear_once_that_it_is_older()
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before  # "ieee" and "none" are told apart


@functools.cache
def _hear_once_that_it_is_older() -> None:
    """torch warns at the first use of a process; filters of warnings are not for every step."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = True


def with_fast_products(head: Callable[[Any], Any], dtype: Any, device: Any) -> Callable[[Any], Any]:
    """A value head over hidden states of `dtype`, for serving: in TF32 where they come from a model
    in 16 bits on a GPU, which rounds them as coarsely; else `head` itself, in full fp32."""
    import torch

    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return head

    def run(hidden: Any) -> Any:
        with tf32_products():
            return head(hidden)

    return run
