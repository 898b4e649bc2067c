"""Rows of prompt files and hub data sets, each with its place for error messages.

The one file that imports the optional `datasets`.
"""

import base64
import binascii
import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lenvm.errors import DataError, EndpointError, InputError
from lenvm.files import read_json, read_jsonl, write_bytes

Rows = Iterator[tuple[str, dict[str, Any]]]


def read_rows(source: str, hub_split: str = "train") -> Rows:
    """(place, row) of a file, a folder of text files, or a hub data set OWNER/NAME."""
    path = Path(source)
    readers: dict[str, Callable[[Path], Iterable[tuple[str, Any]]]] = {
        ".jsonl": lambda p: ((f"{p}:{n}", row) for n, row in read_jsonl(p)),
        ".json": _read_json_rows,
        ".csv": _read_csv_rows,
        ".parquet": _read_parquet_rows,
        ".txt": _read_text_rows,
    }
    rows: Iterable[tuple[str, Any]]
    if path.is_dir():
        rows = _read_folder_rows(path)
    elif path.suffix in readers:
        if not path.is_file():
            raise DataError(f"no prompt file {path}")
        rows = readers[path.suffix](path)
    elif path.exists() or source.count("/") != 1:
        raise DataError(
            f"{source}: not a prompt file; known are {', '.join(readers)}, folders of text files "
            "and hub names OWNER/NAME"
        )
    else:
        rows = read_hub_rows(source, hub_split)
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        yield where, row


def read_hub_rows(
    name: str, split: str, config: str | None = None, *, revision: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Rows of a hub data set, streamed. InputError without the package `datasets`."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name} is a hub name; reading it needs the package `datasets`: pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True, revision=revision)
    except (OSError, ValueError) as error:  # what `datasets` raises for names, splits, networks
        raise EndpointError(
            f"cannot read the data set {name}: {error}\nCheck the name and the network "
            "(HF_ENDPOINT names another hub), or give a downloaded file"
        ) from error
    yield from ((f"{name}[{i}]", row) for i, row in enumerate(rows))


def resolve_image(image: Any, base: Path, image_dir: Path | None, where: str) -> str:
    """An image of a row as path or address.

    Relative paths are taken from `base`, the folder of the prompt file. Embedded images (base64
    text, data URLs, {"bytes": ...} of a Parquet file) are saved in `image_dir`, named by content.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return _save_image(image, image_dir, where)
    if not isinstance(image, str) or not image:
        raise DataError(f"{where}: an image must be a path, an address or bytes; got {image!r:.80}")
    if image.startswith(("http://", "https://")):
        return image
    if image.startswith("data:") or len(image) > 1024:
        try:
            return _save_image(base64.b64decode(image.split(",", 1)[-1]), image_dir, where)
        except binascii.Error as error:
            raise DataError(f"{where}: the image is not base64: {error}") from None
    return str((base / image).absolute())


def _save_image(data: bytes, image_dir: Path | None, where: str) -> str:
    if image_dir is None:
        raise InputError(f"{where} holds an image itself: name a folder to save it in (image_dir)")
    kinds = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}
    suffix = next((s for magic, s in kinds.items() if data.startswith(magic)), ".png")
    path = (image_dir / (hashlib.sha256(data).hexdigest()[:16] + suffix)).absolute()
    if not path.exists():
        write_bytes(path, data)
    return str(path)


def _read_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    data = read_json(path)
    if not isinstance(data, list):
        raise DataError(f"{path}: expected a list of objects, got {type(data).__name__}")
    yield from ((f"{path}[{i}]", row) for i, row in enumerate(data))


def _read_csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: not as many columns as the header has")
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _read_parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not Parquet: {error}") from None


def _read_text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line}


def _read_folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".txt", ".md")):
        yield str(path), {"prompt": _read_text(path), "file": path.name}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from None
