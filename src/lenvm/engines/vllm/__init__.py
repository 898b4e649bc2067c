"""vLLM, as released: its plugin entry points and nothing else.

| file | what | entry point |
|---|---|---|
| here | `register`, which vLLM calls in every process | `vllm.general_plugins` |
| guidance.py | `LengthGuidance`, the logits processor | `vllm.logits_processors`, see entry/ |
| rows.py, slots.py | vLLM's batch as V1 and as V2 describes it, mapped onto a `GuidedBatch` | |
| runner.py | the processor inside 0.25's V2 runner, which takes none by itself | |
| request.py | requests and configurations as guidance sees them, and what is refused | |
| values.py | the value model as a pooling model | the model registry |

Nothing here imports the value model's code until LENVM_MODEL says that there is one.

vLLM 0.25 falls back to its slower V1 model runner wherever a package declares a logits processor,
used or not. So lenvm declares its own in entry/, a folder that `register` puts on the path where
LENVM_MODEL is set and nowhere else: an installed lenvm costs other servers nothing. There runner.py
keeps vLLM on V2 all the same, and guides inside it.
"""

import atexit
import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

TESTED = ("0.25.0",)
"""vLLM releases that this package was run with."""
ENTRY = str(Path(__file__).parent / "entry")
PROCESSOR = "lenvm.engines.vllm.guidance:LengthGuidance"
ARCHITECTURE = "LengthValueModel"
log = logging.getLogger(__name__)
SIGN = "LENVM_VLLM_SIGN"
"""Names a file that the worker makes once it guides: the front end refuses controls without it."""


def register() -> None:
    """Make the value model's architecture known, and with LENVM_MODEL the logits processor. Without
    it, imports nothing heavy and changes nothing else."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "lenvm.engines.vllm.values:VllmLengthValueModel")
    if not os.environ.get("LENVM_MODEL"):
        return
    if ENTRY not in sys.path:
        sys.path.append(ENTRY)
    from lenvm.engines.vllm.runner import hook

    if not hook():
        log.warning("lenvm does not know this vLLM's V2 model runner: V1 runs, somewhat slower")
    if SIGN not in os.environ:  # the first process: the front end
        folder = tempfile.mkdtemp(prefix="lenvm-vllm-")
        os.environ[SIGN] = str(Path(folder, "guides"))
        atexit.register(_clear, os.getpid())


def show_sign() -> None:
    """Tell the front end that a worker of this engine guides."""
    if path := os.environ.get(SIGN):
        Path(path).touch()


def sees_sign() -> bool:
    """Whether a worker guides. vLLM drops logits processors without a word under speculative
    decoding; a control must not be ignored without a word."""
    path = os.environ.get(SIGN)
    return path is not None and Path(path).exists()


def _clear(owner: int) -> None:
    if os.getpid() != owner:  # a forked child runs the parent's exit handlers too
        return
    path = Path(os.environ[SIGN])
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()
