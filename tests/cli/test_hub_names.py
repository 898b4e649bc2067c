"""`--model NAME` where NAME is no folder: the hub is asked once, a mistake is told at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stub_hub import Hub, running
from tiny import tiny_generator, tiny_tokenizer

SRC = str(Path(__file__).parents[2] / "src")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("generator")
    tiny_generator().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def generate(
    model: str, hub: str, cache: Path, **more: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command in a process of its own (the hub's address is read at import), and its time."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    environment |= {"PYTHONPATH": SRC, "HF_ENDPOINT": hub, "HF_HOME": str(cache), **more}
    command = [sys.executable, "-m", "lenvm", "generate", "--model", model, "--max-tokens", "4"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "w7"], capture_output=True, text=True, env=environment, cwd=cache
    )
    return done, time.monotonic() - started


def test_a_model_of_the_hub_is_fetched_and_then_needs_no_hub(files, tmp_path):
    hub = Hub()
    hub.files = files
    with running(hub):
        done, _ = generate("owner/name", hub.url, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "tokens, finish: " in done.stderr
        assert "model.safetensors" in hub.gets
    offline, _ = generate("owner/name", hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_a_name_that_neither_has_is_told_at_once(tmp_path):
    with running(Hub()) as hub:
        done, _ = generate("runs/modle", hub.url, tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"lenvm: no model 'runs/modle': there is no such folder here, and {hub.url} has no model "
        "of that name, or a private one; check the name, or set HF_TOKEN\n"
    )


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("runs/modle", {}, "cannot be reached ("),
        ("runs/modle", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("runs/my/modle", {}, "no name on a hub (OWNER/NAME)"),
    ],
)
def test_without_a_hub_it_is_told_soon_and_without_noise(name, more, says, tmp_path):
    with running(Hub()) as hub:
        gone = hub.url
    done, seconds = generate(name, gone, tmp_path, **more)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lenvm: no model '{name}': there is no such folder here, and ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert seconds < 40  # with the libraries' retries alone it waits for 69
