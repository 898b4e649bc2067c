"""A stand-in for the model hub: real HTTP, one repository `owner/name` of two commits."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
                if name not in hub.files:
                    self.send_json({}, 404, X_Error_Code="EntryNotFound")
                    return
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
