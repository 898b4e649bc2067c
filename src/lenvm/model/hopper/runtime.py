"""CUDA C++ kernels for Hopper GPUs: compiled by NVRTC when first asked for, launched on torch's
current stream (and so captured into its graphs).

The sources lie beside this file. Sizes are compile-time definitions, so a kernel is compiled once
for each shape of a layer; tensor maps (descriptors of the copy engine) are made for each launch.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SHARED_BYTES = 227 * 1024
"""Most shared memory of one block."""


def is_supported(device: torch.device) -> bool:
    """Whether these kernels run there: Hopper, and NVRTC with its Python bindings installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return _has_bindings()


@cache
def _has_bindings() -> bool:
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Product:
    """A wgmma: d [64, columns] (+)= A [64, 16] @ B [16, columns], fp32 sums of bf16."""

    columns: int
    a_in_registers: bool = False
    """A is four registers a thread."""
    b_transposed: bool = False
    """B lies as rows of its first index: values, whose rows are keys."""


@dataclass(frozen=True)
class Kernel:
    function: Any
    shared_bytes: int
    num_threads: int
    cluster: tuple[int, int, int]
    """Blocks of a cluster, along the dimensions of the grid."""

    def launch(self, grid: tuple[int, int, int], *arguments: Any, pdl: bool = True) -> None:
        """arguments: None (a null pointer), tensors (their address), ints (32 bits), floats (fp32),
        tensor maps. pdl: start while the kernel before still ends; the kernel itself waits for
        that before it reads what others wrote."""
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self.num_threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        attributes = []
        if self.cluster != (1, 1, 1):
            size = driver.CUlaunchAttribute()
            size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dims = size.value.clusterDim
            dims.x, dims.y, dims.z = self.cluster
            attributes.append(size)
        if pdl:
            early = driver.CUlaunchAttribute()
            early.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            early.value.programmaticStreamSerializationAllowed = 1
            attributes.append(early)
        config.attrs, config.numAttrs = attributes, len(attributes)
        held = [_hold(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(address for address, _ in held))
        _check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


def _hold(argument: Any) -> tuple[int, Any]:
    """(address of the value, what must stay alive until the launch)."""
    value: Any
    if argument is None or isinstance(argument, Tensor):
        value = ctypes.c_uint64(0 if argument is None else argument.data_ptr())
    elif isinstance(argument, int):
        value = ctypes.c_int32(argument)
    elif isinstance(argument, float):
        value = ctypes.c_float(argument)
    else:
        return int(argument.getPtr()), argument
    return ctypes.addressof(value), value


def build_map(tensor: Tensor, rows: int) -> Any:
    """Descriptor of boxes of `rows` x 64 of a bf16 tensor [R, C], swizzled by 128 bytes; what is
    outside of the tensor comes as 0."""
    from cuda.bindings import driver

    assert tensor.dim() == 2
    assert tensor.stride(1) == 1
    assert tensor.dtype == torch.bfloat16
    size = [driver.cuuint64_t(tensor.shape[1]), driver.cuuint64_t(tensor.shape[0])]
    return _check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            tensor.data_ptr(),
            size,
            [driver.cuuint64_t(tensor.stride(0) * tensor.element_size())],
            [driver.cuuint32_t(64), driver.cuuint32_t(rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def get_kernel(
    file: str,
    definitions: Mapping[str, int],
    products: Sequence[tuple[str, Product]],
    *,
    shared_bytes: int,
    num_threads: int,
    cluster: tuple[int, int, int] = (1, 1, 1),
) -> Kernel:
    """The kernel `run` of a source file. products: what it calls the wgmma that it issues; those of
    one name differ by their columns."""
    return _get_kernel(
        file,
        tuple(sorted(definitions.items())),
        tuple(products),
        shared_bytes,
        num_threads,
        cluster,
        torch.cuda.current_device(),
    )


@cache
def _get_kernel(
    file: str,
    definitions: tuple[tuple[str, int], ...],
    products: tuple[tuple[str, Product], ...],
    shared_bytes: int,
    num_threads: int,
    cluster: tuple[int, int, int],
    _device: int,
) -> Kernel:
    from cuda.bindings import driver

    module = _check(driver.cuModuleLoadData(compile_source(file, definitions, products)))
    function = _check(driver.cuModuleGetFunction(module, b"run"))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, limit, shared_bytes))
    return Kernel(function, shared_bytes, num_threads, cluster)


def build_source(
    file: str,
    definitions: Sequence[tuple[str, int]],
    products: Sequence[tuple[str, Product]],
) -> str:
    """One self-contained CUDA C++ source."""
    parts = [f"#define {name} {value}" for name, value in definitions]
    parts += [(FOLDER / "common.cuh").read_text()]
    parts += [_write_product(*product) for product in products]
    parts += [(FOLDER / file).read_text()]
    return "\n".join(parts)


def compile_source(
    file: str,
    definitions: Sequence[tuple[str, int]],
    products: Sequence[tuple[str, Product]],
) -> bytes:
    """Its machine code for sm_90a, in half a second to one."""
    from cuda.bindings import nvrtc

    source = build_source(file, definitions, products)
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), 0, None, None))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--use_fast_math"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{file} does not compile: {bytes(log).decode(errors='replace')}")
    machine_code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
    _check(nvrtc.nvrtcGetCUBIN(program, machine_code))
    return bytes(machine_code)


def _write_product(name: str, product: Product) -> str:
    """A function of that name: d (fp32 fragments), A (its descriptor, or registers), descriptor of
    B, and whether to add to d or to replace it."""
    count = product.columns // 2
    outs = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if product.a_in_registers:
        names, flags = ["a0", "a1", "a2", "a3"], f"1, 1, {int(product.b_transposed)}"
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
    else:
        names, flags = ["a"], f"1, 1, 0, {int(product.b_transposed)}"
        a = f"%{count}"
    kind, constraint = ("u32", "r") if product.a_in_registers else ("u64", "l")
    parameters = ", ".join(f"{kind} {x}" for x in names)
    inputs = ", ".join([*(f'"{constraint}"({x})' for x in names), '"l"(b)', '"r"(more)'])
    b = count + len(names)
    return (
        f"DEVICE void {name}(float (&d)[{count}], {parameters}, u64 b, int more) {{\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{b + 1}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{product.columns}k16.f32.bf16.bf16 "\n'
        f'        "{{{outs}}}, {a}, %{b}, p, {flags};\\n}}"\n'
        f"        : {sums} : {inputs});\n}}\n"
    )


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings; RuntimeError names what failed."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__}: {error}")
    return values[0] if values else None
