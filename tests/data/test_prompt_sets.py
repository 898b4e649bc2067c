import base64
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lenvm.data import prompt_sets
from lenvm.data.prompts import load_prompts
from lenvm.errors import DataError, EndpointError, InputError


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_deepmath_has_its_prompt_form_and_keeps_the_answer(tmp_path: Path):
    row = {"question": "Compute $1+{1}$.", "final_answer": "2", "r1_solution_1": "long"}
    (prompt,) = load_prompts("DeepMath-103K:" + write(tmp_path / "d.jsonl", row))
    assert prompt.text == (
        "Please reason step by step, and put your final answer within \\boxed{}.\n\n"
        "Compute $1+{1}$."
    )
    assert (prompt.domain, prompt.metadata) == ("math", {"final_answer": "2"})


def test_wildchat_takes_the_first_turn_of_its_language(tmp_path: Path):
    def row(text: str, language: str, role: str = "user") -> dict[str, Any]:
        return {"conversation": [{"role": role, "content": text}], "language": language}

    source = write(
        tmp_path / "w.jsonl",
        row("Hello", "English"),
        row("你好", "Chinese"),
        row("", "English"),
        row("I am", "English", "assistant"),
    )
    (english,) = load_prompts(f"wildchat-en:{source}")
    assert english.text == "Please follow the instructions below.\n\nHello"
    assert [p.text[-2:] for p in load_prompts(f"wildchat-zh:{source}")] == ["你好"]
    assert len(load_prompts(f"wildchat:{source}")) == 2


def test_code_questions_are_taken_from_the_set_they_point_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Any] = []

    def read(repo: str, split: str, config: str | None = None, *, revision: str | None = None):
        asked.append((repo, split))
        yield "x", {"description": None}
        example = {"input": "1", "output": "2"}
        yield "y", {"description": "Add one.", "input_format": "n", "examples": [example]}

    monkeypatch.setattr(prompt_sets, "read_hub_rows", read)
    prompt_sets._load_questions.cache_clear()
    row = {"question": "-", "dataset": "open-r1/codeforces", "split": "train", "index": "1"}
    rows = [row, {**row, "index": "0"}, {"question": "Sort.", "split": "test"}]
    source = write(tmp_path / "c.jsonl", *rows)
    first, second = load_prompts(f"opencodereasoning-2-cpp:{source}")
    assert first.text.endswith(
        "C++ code block.\n\nAdd one.\n\nInput\n\nn\n\nExamples\n\nInput\n\n1\n\nOutput\n\n2"
    )
    assert second.metadata == {"source_split": "test"}
    assert asked == [("open-r1/codeforces", "train")]
    with pytest.raises(DataError, match=r"c.jsonl:1: index 7 is outside"):
        load_prompts("opencodereasoning-2-cpp:" + write(tmp_path / "c.jsonl", {**row, "index": 7}))


def test_onevision_saves_its_image_and_asks_by_kind_of_question(tmp_path: Path):
    image = base64.b64encode(b"\x89PNG" + bytes(2000)).decode()

    def row(text: str) -> dict[str, Any]:
        return {"id": "7", "image": image, "conversations": [{"from": "human", "value": text}]}

    source = write(
        tmp_path / "v.jsonl",
        row(
            "<image>\nHint: Please answer the question and provide the correct option letter.\nWhy?"
        ),
        row("<image>What is shown?"),
    )
    choice, free = load_prompts(f"r1-onevision:{source}", image_dir=tmp_path / "images")
    assert choice.text.endswith("within \\boxed{}.\n\nWhy?")
    assert free.text.endswith("at the end.\n\nWhat is shown?")
    assert choice.images == free.images
    assert Path(free.images[0]).read_bytes().startswith(b"\x89PNG")


def test_a_wrong_local_copy_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"d.jsonl:1: no text in 'question'.*colour"):
        load_prompts("deepmath-103k:" + write(tmp_path / "d.jsonl", {"colour": 1}))
    with pytest.raises(DataError, match="deepmath-103k, wildchat"):
        load_prompts("deepmaths")


def test_hub_names_need_datasets_and_say_what_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_prompts("someone/something")

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        if name == "gone/away":
            raise FileNotFoundError("no such data set")
        return [{"question": f"{name} {config} {options['split']}"}]

    stand_in = ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    (prompt,) = load_prompts("someone/something", hub_split="dev")
    assert prompt.text == "someone/something None dev"
    (prompt,) = load_prompts("deepmath-103k")
    assert prompt.text.endswith("zwhe99/DeepMath-103K None train")
    with pytest.raises(EndpointError, match="gone/away: no such data set"):
        load_prompts("gone/away")
