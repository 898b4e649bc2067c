"""Triton's kernels on a CPU: a script in a process of its own, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def interpret(script: str, *arguments: str) -> None:
    """The script imports from src/ and tests/, and prints "compared" at its end."""
    paths = [ROOT / "src", ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if "0-dimensional arrays" in done.stderr:
        pytest.skip("Triton's interpreter needs numpy < 2.4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compared" in done.stdout
