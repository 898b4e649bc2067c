import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lenvm.data.hub import download
from lenvm.errors import DataError, EndpointError, InputError
from lenvm.files import read_json

SRC = str(Path(__file__).parents[2] / "src")
FIRST, SECOND = "1" * 40, "2" * 40
BIG = bytes(range(256)) * 40_000
FILES = {"README.md": b"hello", "data/train.jsonl": b'{"a": 1}\n', "model.safetensors": BIG}


class Hub:
    """What the hub answers: one repository `owner/name` of two commits, `main` at one of them."""

    def __init__(self) -> None:
        self.main, self.files = FIRST, dict(FILES)
        self.cut_after: int | None = None
        """Close the connection after so many bytes of a large file."""
        self.stalls = False
        """Rather than close it, leave it open without a word."""
        self.damage = False
        self.ranges: list[str] = []
        self.gets: list[str] = []
        self.url = ""

    def info(self, commit: str) -> dict[str, Any]:
        siblings = []
        for path, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": "b"}
            if len(data) > 1000:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 100}
            siblings.append(entry)
        return {"id": "owner/name", "sha": commit, "siblings": siblings, "tags": [], "private": 0}

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": "b"}
            for path, data in self.files.items()
        ]


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), text)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0].replace("/datasets/owner", "/models/owner")
            commits = {"main": hub.main, FIRST: FIRST, SECOND: SECOND}
            if "owner/name" not in path:
                self.send_json({}, 404, X_Error_Code="RepoNotFound")
            elif path.startswith("/api/models/owner/name/tree/"):
                self.send_json(hub.tree())
            elif path.startswith("/api/models/owner/name"):
                revision = path.split("/revision/")[-1] if "/revision/" in path else "main"
                if revision not in commits:
                    self.send_json({}, 404, X_Error_Code="RevisionNotFound")
                else:
                    self.send_json(hub.info(commits[revision]))
            else:
                name = path.split("/resolve/")[1].split("/", 1)[1]
                self.send_file(name, commits[path.split("/resolve/")[1].split("/")[0]], body)

        def send_file(self, name: str, commit: str, body: bool) -> None:
            data = hub.files[name]
            digest = hashlib.sha256(data).hexdigest()
            start = 0
            if wanted := self.headers.get("Range"):
                hub.ranges.append(wanted)
                start = int(wanted.split("=")[1].split("-")[0])
            self.send_response(206 if wanted else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{digest}"')
            self.send_header("Accept-Ranges", "bytes")
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if not body:
                return
            hub.gets.append(name)
            if hub.damage and len(data) > 1000:
                data = bytes(len(data))
            if hub.cut_after is not None and len(data) > 1000:
                self.wfile.write(data[start : start + hub.cut_after])
                if hub.stalls:
                    time.sleep(60)
                self.close_connection = True
                return
            self.wfile.write(data[start:])

    return Handler


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
