"""What the tests of Hopper's kernels share: where they run, and what the compiler says of them."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from lenvm.model.hopper.runtime import build_source, compile_source, is_supported

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not is_supported(torch.device("cuda")),
        reason="needs a Hopper GPU and cuda-bindings",
    ),
]


def check_compiles(file, definitions, products):
    """For sm_90a, without a spilled register, and wgmma not one after the other."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    source = build_source(file, sorted(definitions.items()), products)
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), 0, None, None)
    options = [
        b"--gpu-architecture=sm_90a", b"--std=c++17", b"--use_fast_math", b"--ptxas-options=-v",
    ]  # fmt: skip
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    told = bytes(log).decode()
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, told
    assert set(re.findall(r"(\d+) bytes spill", told)) == {"0"}, told
    assert "serializ" not in told


def disassemble(file, definitions, products):
    """Its machine code as text, by the tool that comes with Triton."""
    backends = pytest.importorskip("triton.backends")
    tool = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as image:
        image.write(compile_source(file, sorted(definitions.items()), products))
        image.flush()
        command = [tool, "--dump-sass", image.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
