"""The GPU runner's kernels, plans and bookkeeping on the CPU, through Triton's interpreter.

Graphs, 16-bit types (the interpreter's dot is wrong in bf16) and timing are the GPU's to test:
`test_ragged_gpu.py`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from model.families import VOCAB, build
from model.ragged_machine import History, run_random_history
family, fused = sys.argv[1], sys.argv[2] == "True"
history = History(build(family), max_tokens=400, max_requests=3, max_candidates=5, kernels="triton",
                  page_size=16)
history.decoder._chunk = 40
if sys.argv[3] == "True":  # every product fused, splits merged by the last to arrive
    from lenvm.model.kernel_choices import AttentionChoice, Choices, Tile
    choices = Choices(
        qkv=Tile(16, 16, 32), out=Tile(16, 32, 32, splits=2), gate_up=Tile(16, 32, 32),
        down=Tile(16, 64, 32, splits=2), attention=AttentionChoice(block=32, waves=8, merges=True),
    )
    assert history.decoder._runner._forward.can_run(choices, 32)
    history.decoder._runner.choose = lambda num_tokens: choices
assert history.decoder._runner.is_fused == fused, "fused"
run_random_history(history, 1, 9, VOCAB)
print("compared", history.num_compared)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("family", "fused", "products"),
    [
        ("qwen3", True, False),
        ("mistral", True, False),
        ("gemma3", False, False),
        ("qwen2", True, True),
        ("mistral", True, True),
    ],
)
def test_a_random_history_under_the_interpreter(family, fused, products):
    root = Path(__file__).parents[2]
    paths = [root / "src", root / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, family, str(fused), str(products)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if "0-dimensional arrays" in done.stderr:
        pytest.skip("Triton's interpreter needs numpy < 2.4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compared" in done.stdout
