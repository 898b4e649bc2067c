"""Files that survive a kill: atomic replacement, JSON lines that are whole or absent, manifests.

Every stage of lenvm writes through this module. A manifest stands beside each product
(`NAME.manifest.json`) and says what made it; a stage that runs again compares its own settings with
the manifest and refuses to mix two configurations.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from lenvm.errors import DataError, InputError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step (temporary file in the same folder, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON. Raises ValueError for NaN or infinity: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; DataError says where it is wrong."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON-lines file, one line in memory at a time.

    An unfinished last line (no newline: the writer was killed) is passed over; anything else that
    is not a JSON object raises DataError with file and line.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                try:
                    json.loads(line)
                except ValueError:
                    return
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}:{number}: expected a JSON object, got {type(value).__name__}"
                )
            yield number, value


class JsonlWriter:
    """Appends JSON lines, each with one write call, so that a kill loses at most the last line.

    Opening cuts an unfinished last line that an earlier kill left behind. Not safe for several
    writing processes; `lock` is taken so that a second writer gets a DataError.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path} is being written by another process; wait for it") from None
        _cut_unfinished_line(path)

    def write(self, value: Mapping[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self.write_lines([data.encode("utf-8", "surrogatepass")])

    def write_lines(self, lines: list[bytes]) -> None:
        """Append encoded lines in one write; on a full disk nothing of them stays behind."""
        if not lines:
            return
        data = b"\n".join(lines) + b"\n"
        start = os.fstat(self._file.fileno()).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except BaseException:
            os.ftruncate(self._file.fileno(), start)
            raise

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cut_unfinished_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            size = min(1 << 16, keep)
            file.seek(keep - size)
            newline = file.read(size).rfind(b"\n")
            if newline >= 0:
                keep = keep - size + newline + 1
                break
            keep -= size
        if keep < end:
            file.truncate(keep)


def hash_config(config: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `config`."""
    text = json.dumps(
        config, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def manifest_path(product: Path) -> Path:
    """Where the manifest of a file or of a folder's product stands."""
    return product.with_name(product.name + ".manifest.json")


def claim(product: Path, kind: str, config: Mapping[str, Any]) -> bool:
    """Claim `product` for a run with `config`; True when an earlier run is being continued.

    Writes the manifest (kind, config, its hash, command, package version) on the first claim. When
    one is there with another kind or config, raises InputError that shows both settings.
    """
    from lenvm import __version__

    path = manifest_path(product)
    config = json.loads(json.dumps(config, default=str))
    if path.exists():
        found = read_json(path)
        if found.get("kind") != kind:
            raise InputError(
                f"{product} was made by {found.get('kind')!r}, not {kind!r}; use another path"
            )
        if found.get("config") != config:
            old = found.get("config") or {}
            rows = [
                f"  {key}: {old.get(key)!r} there, {config.get(key)!r} now"
                for key in sorted({*old, *config})
                if old.get(key) != config.get(key)
            ]
            raise InputError(
                f"{product} was made with other settings:\n" + "\n".join(rows) + "\n"
                "Use another output path, the earlier settings, or delete the file and its manifest."
            )
        return True
    write_json(
        path,
        {
            "schema": "lenvm.manifest/1",
            "kind": kind,
            "config": config,
            "config_hash": hash_config(config),
            "command": " ".join(sys.argv),
            "lenvm_version": __version__,
        },
    )
    return False
