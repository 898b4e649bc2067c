import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.errors import DataError, InputError
from lenvm.files import (
    JsonlWriter,
    claim,
    claiming,
    explaining,
    hash_config,
    manifest_path,
    read_json,
    read_jsonl,
    replace_jsonl,
    write_bytes,
    write_json,
    write_text,
)

SRC = str(Path(__file__).parents[1] / "src")


def rows(path: Path) -> list[Any]:
    return [row for _, row in read_jsonl(path)]


def test_writing_replaces_in_one_step_and_leaves_no_part(tmp_path: Path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one")
    with path.open() as reader:
        write_text(path, "two")
        assert reader.read() == "one"
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"cannot write .*a\.bin: No space left on device"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_refuses_what_is_not_json(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match=r"b\.json is not JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "c.json")


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=5))
def test_json_lines_read_back(tmp_path_factory: pytest.TempPathFactory, values: list[Any]):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    with JsonlWriter(path) as writer:
        for value in values:
            writer.write(value)
    assert rows(path) == values


def test_a_cut_at_any_byte_loses_at_most_the_line_it_hits(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    whole = b'{"a":1}\n{"b":"\xc3\xa9"}\n{"c":[3]}\n'
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        before = rows(path)
        with JsonlWriter(path) as writer:
            writer.write({"d": 4})
        assert rows(path) == [*before, {"d": 4}]
        assert len(before) >= whole[:size].count(b"\n")


def test_a_long_unfinished_line_is_cut(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":"' + b"x" * 300_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b'{"a":1}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":1}\n{bad}\n', r"a\.jsonl:2: not JSON"),
        (b'{"a":1}\n\n[1]\n', r"a\.jsonl:3: expected a JSON object, got list"),
        (b'\xff\xfe{"a":1}\n', r"a\.jsonl:1: not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows(tmp_path / "a.jsonl")


def test_a_second_writer_is_refused(tmp_path: Path):
    with (
        JsonlWriter(tmp_path / "a.jsonl"),
        pytest.raises(DataError, match="written by another process"),
    ):
        JsonlWriter(tmp_path / "a.jsonl")
    JsonlWriter(tmp_path / "a.jsonl").close()


def test_a_full_disk_leaves_only_whole_lines(tmp_path: Path):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from lenvm.files import JsonlWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with JsonlWriter(Path(sys.argv[1])) as writer:\n"
        "    for i in range(100): writer.write({'i': i, 'text': 'x' * 150})\n"
    )
    path = tmp_path / "a.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": SRC},
        capture_output=True,
        text=True,
    )
    assert "DataError: cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert [row["i"] for row in rows(path)] == [0, 1, 2, 3, 4]
    assert path.read_bytes().endswith(b"\n")


def test_replacing_lines_is_all_or_nothing(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with replace_jsonl(path) as writer:
        writer.write({"a": 1})
        assert not path.exists()
    assert rows(path) == [{"a": 1}]
    with pytest.raises(ZeroDivisionError), replace_jsonl(path) as writer:
        writer.write({"b": 1 / 0})
    assert rows(path) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_claim_continues_the_same_and_refuses_other_settings(tmp_path: Path):
    product = tmp_path / "a.jsonl"
    assert claim(product, "trajectories", {"n": 1, "path": Path("x")}) is False
    assert claim(product, "trajectories", {"path": Path("x"), "n": 1}) is True
    assert json.loads(manifest_path(product).read_text())["lenvm_version"]
    with pytest.raises(InputError, match=r"n: 1 there, 2 now\n.*extra: null there, \"y\" now|n: 1"):
        claim(product, "trajectories", {"n": 2, "path": Path("x")})
    with pytest.raises(InputError, match="made by 'trajectories', not 'demo'"):
        claim(product, "demo", {"n": 1})


def test_nested_settings_are_compared_one_by_one(tmp_path: Path):
    claim(tmp_path / "a", "k", {"sampling": {"top_k": 0, "seed": 1}, "n": 1})
    with pytest.raises(InputError, match=r"settings:\n  sampling\.seed: 1 there, 2 now\nUse"):
        claim(tmp_path / "a", "k", {"sampling": {"top_k": 0, "seed": 2}, "n": 1})


def test_a_claim_is_taken_back_where_nothing_was_made(tmp_path: Path):
    product = tmp_path / "a.jsonl"

    def fail(n: int, change: Callable[[], None]) -> bool:
        try:
            with claiming(product, "k", {"n": n}) as continued:
                change()
                raise ZeroDivisionError
        except ZeroDivisionError:
            return continued

    assert fail(1, lambda: None) is False
    assert list(tmp_path.iterdir()) == []
    assert fail(2, product.touch) is False
    assert fail(2, product.unlink) is True
    assert manifest_path(product).exists()  # an earlier run's claim is its own


def test_what_libraries_say_of_a_full_disk_is_said_too(tmp_path: Path):
    class SafetensorError(Exception):
        pass

    said = {
        "File too large": SafetensorError("serializing: I/O error: File too large (os error 27)"),
        "torch could not write": RuntimeError("PytorchStreamWriter failed writing file data/0"),
        "No space left": OSError(28, "No space left on device"),
    }
    for words, error in said.items():
        with (
            pytest.raises(DataError, match=rf"cannot write {tmp_path}: .*{words}"),
            explaining(tmp_path),
        ):
            raise error
    for error in (RuntimeError("shapes differ"), SafetensorError("invalid header")):
        with pytest.raises(type(error)), explaining(tmp_path):
            raise error


def test_long_settings_are_shown_in_brief(tmp_path: Path):
    product = tmp_path / "a.jsonl"
    claim(product, "k", {"prompts": list(range(5000))})
    with pytest.raises(InputError, match=r"\(5000 entries\) there") as caught:
        claim(product, "k", {"prompts": [1]})
    assert len(str(caught.value)) < 600


def test_a_file_without_manifest_is_not_claimed(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"without a\.jsonl\.manifest\.json"):
        claim(tmp_path / "a.jsonl", "k", {})
    (tmp_path / "empty.jsonl").touch()
    assert claim(tmp_path / "empty.jsonl", "k", {}) is False


def test_a_hash_does_not_depend_on_order():
    assert hash_config({"a": 1, "b": [2]}) == hash_config({"b": [2], "a": 1})
    assert hash_config({"a": 1}) != hash_config({"a": 2})
