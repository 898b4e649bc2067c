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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from lenvm.errors import DataError, InputError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step (temporary file in the same folder, fsync, rename).

    Raises DataError where the disk is full or the folder cannot be written; `path` is as before.
    """
    with explaining(path):
        _write_bytes(path, data)


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """What could not be written, why, and what to do, as a DataError.

    Of OSError and of what safetensors and torch raise in its place; anything else passes.
    """
    try:
        yield
    except Exception as error:
        if (why := _why_not_written(error)) is None:
            raise
        raise DataError(
            f"cannot write {path}: {why}. Nothing half-written was left; "
            "make room (or choose another path) and run the same command again."
        ) from error


def _why_not_written(error: Exception) -> str | None:
    """The system's words; None for an error that is not about writing."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error: " in str(error):
        return str(error).partition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
        return "torch could not write all of it, the disk may be full"
    return None


def _write_bytes(path: Path, data: bytes) -> None:
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


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line with its newline) of a file, blank lines left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, expected a file of JSON lines") from None
    with file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON-lines file, one line in memory at a time.

    An unfinished last line (no newline: the writer was killed) is passed over; anything else that
    is not a JSON object raises DataError with file and line.
    """
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            if not line.endswith(b"\n"):
                return
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}")
        yield number, value


class JsonlWriter:
    """Appends JSON lines, each with one write call, so that a kill loses at most the last line.

    Opening mends an unfinished last line that an earlier kill left behind: a whole object gets its
    newline, a part of one is cut. The file is locked: a second writer gets a DataError. Raises
    DataError where the disk is full; what was there before stays.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self.path = path
        with explaining(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path} is being written by another process; wait for it") from None
        with explaining(path):
            _mend_last_line(path)

    def write(self, value: Mapping[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self.write_lines([data.encode("utf-8", "surrogatepass")])

    def write_lines(self, lines: list[bytes]) -> None:
        """Append encoded lines in one write; on a full disk nothing of them stays behind."""
        if not lines:
            return
        data = b"\n".join(lines) + b"\n"
        start = os.fstat(self._file.fileno()).st_size
        with explaining(self.path):
            try:
                view = memoryview(data)
                while view:
                    view = view[self._file.write(view) :]
            except BaseException:
                os.ftruncate(self._file.fileno(), start)
                raise

    def close(self) -> None:
        if not self._file.closed:
            with self._file, explaining(self.path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def replace_jsonl(path: Path) -> Iterator[JsonlWriter]:
    """A writer whose lines become `path` when the block ends, and vanish when it fails."""
    part = path.with_name(f".{path.name}.part")
    with explaining(part):
        part.unlink(missing_ok=True)
    try:
        with JsonlWriter(part) as writer:
            yield writer
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _mend_last_line(path: Path) -> None:
    """End a last line without newline, as `read_jsonl` sees it: keep a whole object, cut a part."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            size = min(1 << 16, start)
            file.seek(start - size)
            newline = file.read(size).rfind(b"\n")
            if newline >= 0:
                start = start - size + newline + 1
                break
            start -= size
        if start == end:
            return
        file.seek(start)
        try:
            json.loads(file.read())
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")


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
    one is there with another kind or config, raises InputError that shows both settings; so does a
    file that is there without a manifest, since nobody knows what made it.
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
            old, new = _flatten(found.get("config") or {}), _flatten(config)
            rows = [
                f"  {key}: {_brief(old.get(key))} there, {_brief(new.get(key))} now"
                for key in sorted({*old, *new})
                if old.get(key) != new.get(key)
            ]
            raise InputError(
                f"{product} was made with other settings:\n" + "\n".join(rows) + "\n"
                "Use another output path or the earlier settings, or delete file and manifest."
            )
        return True
    if product.is_file() and product.stat().st_size > 0:
        raise InputError(
            f"{product} is there, but without {path.name}, so that what made it is unknown; use "
            "another path or delete the file"
        )
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


@contextmanager
def claiming(
    product: Path,
    kind: str,
    config: Mapping[str, Any],
    has_begun: Callable[[], object] = lambda: None,
) -> Iterator[bool]:
    """`claim`, taken back where the block fails before anything of the product is there, so that
    the mistake can be mended and the same path used. has_begun: something that a later run goes on
    from, besides the product itself."""
    continued = claim(product, kind, config)
    try:
        yield continued
    except BaseException:  # Ctrl-C, too
        if not continued and not product.exists() and not has_begun():
            manifest_path(product).unlink(missing_ok=True)
        raise


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _brief(value: Any, limit: int = 160) -> str:
    """A setting for an error message; a long one keeps its beginning and tells its size."""
    text = json.dumps(value, ensure_ascii=False)
    size = f" ({len(value)} entries)" if isinstance(value, list | dict) else ""
    return text if len(text) <= limit else f"{text[:limit]}...{size}"
