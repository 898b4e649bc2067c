"""A lab on the move: only what changed, compressed, in parts that the device tool carries.

At most 8 files of 16 MiB come back from a call, and 64 MiB go in. Weights of full models and what
can be made again stay behind. A file is left out, and named, when there is no room for it.
"""

import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lenvm.errors import DataError

PART_BYTES = 15_900 * 1024
MAX_PARTS = 4
"""Of 8 files in all, 64 MiB together."""
MARKS = ".travelled.json"
STAY = ("data/", "grids/*/data/*", "grids/*/cells/*/model*/*", "length_tokens/*/records.jsonl")
ORDER = ("steps", "answers", "prediction", "grids", "length_tokens", "models", "tokens")
PRESETS = {".safetensors": 0}
"""Of lzma: weights do not compress; all else hardly better at 6 than at 3, in three times the
time."""
MAX_WEIGHTS = 40 * 2**20
"""Adapters travel, whole models do not."""


def pack(lab: Path, out: Path) -> None:
    """Parts of one tar of xz files, most valuable first."""
    marks = _read_marks(lab)
    files = [f for f in _files(lab) if marks.get(str(f.relative_to(lab))) != _mark(f)]
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    room, left_out = MAX_PARTS * PART_BYTES - 1024**2, []
    with ThreadPoolExecutor() as pool, tarfile.open(fileobj=buffer, mode="w") as tar:
        for file, data in zip(files, pool.map(_compress, files), strict=True):
            name = str(file.relative_to(lab))
            if buffer.tell() + len(data) > room:
                left_out.append(name)
                continue
            info = tarfile.TarInfo(name + ".xz")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            marks[name] = _mark(file)
    whole = buffer.getvalue()
    for number, start in enumerate(range(0, len(whole), PART_BYTES)):
        (out / f"lab.tar.{number}").write_bytes(whole[start : start + PART_BYTES])
    (lab / MARKS).write_text(json.dumps(marks))
    print(f"{len(files) - len(left_out)} files, {len(whole) / 2**20:.1f} MiB")
    heavy = [f for f in lab.glob("models/*/adapter_model.safetensors") if _is_whole(f)]
    if heavy:
        names = ", ".join(str(f.relative_to(lab)) for f in heavy)
        print(f"too large to travel, lost with the machine: {names}")
    if left_out:
        print(f"no room for {', '.join(left_out)}: pack again")


def unpack(folder: Path, lab: Path) -> None:
    """Files replace those of the lab; several packs are read in the order of their folders."""
    parts = sorted(folder.glob("lab.tar.*"), key=lambda p: int(p.suffix[1:]))
    if not parts:
        raise DataError(f"no lab.tar.* in {folder}")
    marks = _read_marks(lab)
    with tarfile.open(fileobj=io.BytesIO(b"".join(p.read_bytes() for p in parts))) as tar:
        for member in tar:
            data = tar.extractfile(member)
            assert data is not None
            target = lab / member.name.removesuffix(".xz")
            if not target.resolve().is_relative_to(lab.resolve()):
                raise DataError(f"{folder}: {member.name} leads out of the lab")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(lzma.decompress(data.read()))
            marks[str(target.relative_to(lab))] = _mark(target)
    (lab / MARKS).write_text(json.dumps(marks))
    print(f"{len(marks)} files in {lab}")


def _files(lab: Path) -> Iterator[Path]:
    for part in ORDER:
        for file in sorted((lab / part).rglob("*")):
            name = file.relative_to(lab)
            stays = any(name.match(pattern) for pattern in STAY) or "checkpoint" in str(name)
            hidden = any(p.startswith(".") for p in name.parts)
            if file.is_file() and not stays and not _is_whole(file) and not hidden:
                yield file


def _is_whole(file: Path) -> bool:
    """Weights too large to be an adapter's."""
    return file.suffix == ".safetensors" and file.stat().st_size > MAX_WEIGHTS


def _compress(file: Path) -> bytes:
    data = file.read_bytes()
    return lzma.compress(data, preset=PRESETS.get(file.suffix, 3))


def _mark(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_marks(lab: Path) -> dict[str, list[int]]:
    path = lab / MARKS
    lab.mkdir(parents=True, exist_ok=True)
    return dict(json.loads(path.read_text())) if path.exists() else {}
