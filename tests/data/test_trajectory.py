import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lenvm.data.trajectory import IdCheck, Trajectory, read_trajectories
from lenvm.errors import DataError

ROW: dict[str, Any] = {
    "schema": "lenvm.trajectory/1",
    "id": "p-0",
    "prompt_hash": "p",
    "sample_index": 0,
    "prompt_token_ids": [1],
    "completion_token_ids": [5, 2],
    "completion_text": "é\n",
    "finish_reason": "stop",
    "model": "m",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_record_reads_back_as_it_was_written(tmp_path: Path):
    rows = [Trajectory(**ROW), Trajectory(**ROW | {"finish_reason": "length", "images": ["a.png"]})]
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"".join(t.to_json_line() + b"\n" for t in rows))
    found = list(read_trajectories(path, path))
    assert found == rows + rows
    assert [t.is_complete for t in rows] == [True, False]
    assert [t.length for t in rows] == [2, 2]
    assert json.loads(rows[0].to_json_line()) == rows[0].to_json()


def test_an_unfinished_last_line_is_passed_over(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", ROW)
    path.write_text(path.read_text() + json.dumps(ROW)[:50])
    assert len(list(read_trajectories(path))) == 1
    path.write_text(json.dumps(ROW))
    assert len(list(read_trajectories(path))) == 1
    for unfinished in (json.dumps(ROW).encode()[:50], b"\x1f\x8b\x00\xff" * 9):
        path.write_bytes(unfinished)
        with pytest.raises(DataError, match=r"t\.jsonl holds no trajectories, only an unfinished"):
            list(read_trajectories(path))


def test_repeated_ids_of_a_file_are_counted(tmp_path: Path):
    rows = [Trajectory(**ROW | {"id": name}) for name in ("a", "b", "a", "c", "a")]
    check = IdCheck(tmp_path / "t.jsonl")
    assert list(check.watch(rows)) == rows
    assert (check.num_repeated, check.first) == (2, "a")
    assert "t.jsonl: 2 completions have an id that an earlier line has" in check.warning
    alone = IdCheck(tmp_path / "t.jsonl")
    assert list(alone.watch(rows[:2])) == rows[:2]
    assert alone.warning == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x"}, r"t\.jsonl:2: schema is None, expected 'lenvm\.trajectory/1'"),
        (ROW | {"schema": "lenvm.trajectory/2"}, "schema is 'lenvm.trajectory/2'"),
        (ROW | {"colour": 1}, r"t\.jsonl:2: colour: Extra inputs"),
        (ROW | {"sample_index": -1}, "sample_index: Input should be greater"),
        (ROW | {"completion_token_ids": ["a"]}, r"completion_token_ids\.0: "),
        (ROW | {"completion_token_ids": []}, "at least an ending token"),
        (ROW | {"prompt_token_ids": []}, "at least one prompt token"),
        ([1], "expected a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, message: str):
    with pytest.raises(DataError, match=message):
        list(read_trajectories(write(tmp_path / "t.jsonl", ROW, row)))


def test_bad_files_are_named(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        list(read_trajectories(path))
    with pytest.raises(DataError, match="is a folder"):
        list(read_trajectories(tmp_path))
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no trajectories"):
        list(read_trajectories(path))
    path.write_text("{broken}\n" + json.dumps(ROW) + "\n")
    with pytest.raises(DataError, match=r"t\.jsonl:1: not JSON"):
        list(read_trajectories(path))


def test_a_trajectory_does_not_change():
    trajectory = Trajectory(**ROW)
    with pytest.raises(ValidationError):
        trajectory.model = "other"  # type: ignore[misc]
