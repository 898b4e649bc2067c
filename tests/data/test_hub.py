import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lenvm.data.hub import download
from lenvm.errors import DataError, EndpointError, InputError
from lenvm.files import read_json
from stub_hub import BIG, FILES, FIRST, SECOND, Hub, running

SRC = str(Path(__file__).parents[2] / "src")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield hub


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_download_is_whole_pinned_and_done_once(hub: Hub, tmp_path: Path, kind: Any):
    folder = tmp_path / "d"
    report = download("owner/name", folder, kind=kind)
    assert (report.commit, report.num_files, report.num_fetched) == (FIRST, 3, 3)
    assert {n: (folder / n).read_bytes() for n in FILES} == FILES
    assert read_json(tmp_path / "d.manifest.json")["config"]["commit"] == FIRST
    hub.main, hub.gets = SECOND, []
    report = download("owner/name", folder, kind=kind)
    assert (report.commit, report.num_fetched, hub.gets) == (FIRST, 0, [])
    assert "all were there" in str(report)
    with pytest.raises(InputError, match="other settings"):
        download("owner/name", folder, kind=kind, revision="main")


def test_only_files_that_match(hub: Hub, tmp_path: Path):
    assert download("owner/name", tmp_path / "d", patterns=["*.jsonl"]).num_files == 1
    assert not (tmp_path / "d" / "README.md").exists()
    with pytest.raises(InputError, match="no file that matches"):
        download("owner/name", tmp_path / "e", patterns=["*.bin"])


def start_child(hub: Hub, folder: Path) -> "subprocess.Popen[str]":
    code = "import sys; from pathlib import Path; from lenvm.data.hub import download\n"
    code += "print(download('owner/name', Path(sys.argv[1])))"
    env = {**os.environ, "PYTHONPATH": SRC, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-c", code, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def list_files(folder: Path) -> dict[str, bytes]:
    """What a user sees: everything outside the hub's own .cache, and parts anywhere."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and (".cache" not in path.parts or path.suffix == ".incomplete")
    }


def test_an_interrupted_download_leaves_whole_files_and_goes_on(hub: Hub, tmp_path: Path):
    folder, hub.cut_after = tmp_path / "d", 1_000_000
    with pytest.raises(EndpointError, match="Finished files are kept: run the same command again"):
        download("owner/name", folder)
    assert list_files(folder) == {k: v for k, v in FILES.items() if v is not BIG}
    hub.cut_after, hub.gets = None, []
    assert download("owner/name", folder).num_fetched == 1
    assert list_files(folder) == FILES
    assert hub.gets == ["model.safetensors"]


def test_a_killed_download_goes_on_and_leaves_no_part_behind(hub: Hub, tmp_path: Path):
    folder, hub.cut_after, hub.stalls = tmp_path / "d", 1_000_000, True
    child = start_child(hub, folder)
    deadline = time.monotonic() + 30
    while "model.safetensors" not in hub.gets and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(DataError, match="being downloaded by another process"):
        download("owner/name", folder)
    child.kill()
    child.communicate()
    hub.cut_after = None
    assert any(name.endswith(".incomplete") for name in list_files(folder))
    download("owner/name", folder)
    assert list_files(folder) == FILES


def test_a_damaged_file_is_removed_and_named(hub: Hub, tmp_path: Path):
    hub.damage = True
    with pytest.raises(DataError, match=r"model\.safetensors is damaged .*checksum"):
        download("owner/name", tmp_path / "d")
    assert not (tmp_path / "d" / "model.safetensors").exists()
    hub.damage = False
    assert download("owner/name", tmp_path / "d").num_fetched == 1


def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EndpointError, match="has no someone/else"):
        download("someone/else", tmp_path / "d")
    with pytest.raises(EndpointError, match="no such revision"):
        download("owner/name", tmp_path / "d", revision="v9")
    with pytest.raises(InputError, match=r"lenvm-data, .*OWNER/NAME"):
        download("nonsense", tmp_path / "d")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(InputError, match="not empty and not a download"):
        download("owner/name", tmp_path / "mine")
    assert not (tmp_path / "d").exists()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EndpointError, match=r"cannot download owner/name from http://127"):
        download("owner/name", tmp_path / "d")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
