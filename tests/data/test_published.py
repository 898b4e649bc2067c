import json
from pathlib import Path
from typing import Any

import pytest

from lenvm.data.prompts import Prompt
from lenvm.data.published import export_published, import_published, to_published
from lenvm.data.trajectory import read_trajectories
from lenvm.errors import DataError


class WordEncoder:
    eos_token_id = 2

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return [1, len(str(prompt.conversation))]

    def encode_text(self, text: str) -> list[int]:
        return [3 + len(word) for word in text.split()]


def row(question: str, answer: str, idx: int = 0, length: int | None = None, **fields: Any) -> Any:
    return {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ],
        "meta_info": {
            "answer_token_length": len(answer.split()) + 1 if length is None else length,
            "lenvm_idx": idx,
            "split": "train",
            "dataset_name": "zwhe99/DeepMath-103K",
            "model_name": "Qwen/Qwen2.5-7B-Instruct",
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": None,
            "max_tokens": 6,
        },
        "source_fields": {"final_answer": "4", "topic": "Algebra"},
        **fields,
    }


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_an_import_has_ids_reasons_and_one_prompt_for_equal_texts(tmp_path: Path):
    source = write(
        tmp_path / "p.jsonl",
        row("What is 2+2?", "It is four", 0),
        row("What is 2+2?", "Four", 0),
        row("what is  2+2?", "4", 7),
        row("Count.", "one two three four five six", 1, length=6),
        row("Say.", "", 2),
        row("Sing.", "la la", 3, length=9),
    )
    report = import_published([source], tmp_path / "t.jsonl", WordEncoder(), split="test")
    assert (report.num_written, report.num_truncated, report.num_mismatched) == (5, 2, 1)
    assert "1 left out: empty answer" in str(report)
    rows = list(read_trajectories(tmp_path / "t.jsonl"))
    assert [t.sample_index for t in rows] == [0, 1, 2, 0, 0]
    assert len({t.prompt_hash for t in rows}) == 3
    first = rows[0]
    assert first.completion_token_ids == [5, 5, 7, 2]
    assert (first.domain, first.split, first.finish_reason) == ("math", "test", "stop")
    assert first.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2+2?"},
    ]
    assert first.sampling == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6}
    assert first.metadata["final_answer"] == "4"
    assert (rows[3].finish_reason, rows[3].length) == ("length", 6)


def test_splits_go_by_prompt_hash_unless_named(tmp_path: Path):
    source = write(tmp_path / "p.jsonl", *(row(f"Q{i // 2}", "a b") for i in range(200)))
    import_published([source], tmp_path / "t.jsonl", WordEncoder())
    sides: dict[str, set[str]] = {}
    for t in read_trajectories(tmp_path / "t.jsonl"):
        sides.setdefault(t.prompt_hash, set()).add(t.split)
    assert all(len(s) == 1 for s in sides.values())
    assert {s for side in sides.values() for s in side} == {"train", "validation", "test"}


def test_an_export_groups_prompts_and_reads_back(tmp_path: Path):
    rows = [row(f"Question {i % 3}", f"answer {i}", i % 3) for i in range(9)]
    source = write(tmp_path / "raw.jsonl", *rows)
    import_published([source], tmp_path / "t.jsonl", WordEncoder(), split="train")
    export_published([tmp_path / "t.jsonl"], tmp_path / "grouped.jsonl")
    grouped = [json.loads(line) for line in (tmp_path / "grouped.jsonl").read_text().splitlines()]
    assert [g["meta_info"]["lenvm_idx"] for g in grouped] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sorted(map(str, grouped)) == sorted(map(str, rows))
    export_published([tmp_path / "t.jsonl"], tmp_path / "raw2.jsonl", grouped=False)
    assert [json.loads(x) for x in (tmp_path / "raw2.jsonl").read_text().splitlines()] == rows
    export_published([tmp_path / "t.jsonl"], tmp_path / "shuffled.jsonl", seed=1)
    shuffled = [json.loads(line) for line in (tmp_path / "shuffled.jsonl").read_text().splitlines()]
    order = [g["meta_info"]["lenvm_idx"] for g in shuffled]
    assert order != sorted(order)
    assert len([i for i in range(1, 9) if order[i] != order[i - 1]]) == 2
    import_published([tmp_path / "grouped.jsonl"], tmp_path / "t2.jsonl", WordEncoder())
    assert {t.id for t in read_trajectories(tmp_path / "t2.jsonl")} == {
        t.id for t in read_trajectories(tmp_path / "t.jsonl")
    }


def test_images_keep_their_place(tmp_path: Path):
    published = row("<image>What is it?", "A cat", images=["images/1.png"])
    source = write(tmp_path / "v.jsonl", published)
    import_published([source], tmp_path / "t.jsonl", WordEncoder())
    (found,) = read_trajectories(tmp_path / "t.jsonl")
    assert found.images == [str(tmp_path / "images" / "1.png")]
    assert found.messages is not None
    assert found.messages[1]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What is it?"},
    ]
    back = to_published(found, 0)
    assert back["conversations"] == published["conversations"]
    assert back["images"] == found.images


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "x"}, "p.jsonl:2: a published row has conversations and meta_info"),
        ({**row("a", "b"), "conversations": [{"from": "bot", "value": "x"}]}, "p.jsonl:2: a turn"),
        (
            {**row("a", "b"), "conversations": [{"from": "human", "value": "x"}]},
            "p.jsonl:2: the conversation does not end with an answer",
        ),
    ],
)
def test_rows_of_another_form_are_named_and_nothing_is_left(tmp_path: Path, bad: Any, message: str):
    source = write(tmp_path / "p.jsonl", row("a", "b"), bad)
    with pytest.raises(DataError, match=message):
        import_published([source], tmp_path / "t.jsonl", WordEncoder())
    assert not (tmp_path / "t.jsonl").exists()
    assert not list(tmp_path.glob(".*.part"))
    with pytest.raises(DataError, match="no row to import"):
        import_published([write(tmp_path / "e.jsonl")], tmp_path / "u.jsonl", WordEncoder())
