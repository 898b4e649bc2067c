"""The file format, the phrasing in both languages, and what is refused."""

import json
from itertools import product
from pathlib import Path

import pytest

from lenvm.errors import DataError
from lenvm.evals.lifebench.items import (
    CONSTRAINTS,
    TARGETS,
    UNITS,
    LifebenchItem,
    load_lifebench,
    measure_length,
)

SHARED = Path("/work/shared/data/lifebench/data_en.jsonl")
EN = {
    "id": 1,
    "category": "qa",
    "type": "Health",
    "lang": "en",
    "task": "Why {x}?\nYour answer must be {word_count_type} {word_count} words long.",
    "raw_data": "Why?",
}
CN = {
    "id": 2,
    "category": "create",
    "type": "新闻写作",
    "lang": "cn",
    "task": "[指令]写一篇新闻。[要求]新闻的长度必须{word_count_type}{word_count}个字。",
    "raw_data": "",
}


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return path


def test_english_and_chinese_phrasing(tmp_path):
    en, cn = load_lifebench(write(tmp_path / "x.jsonl", EN, CN))
    assert en.prompt("equal_to", 64, "words").endswith("must be equal to 64 words long.")
    assert en.prompt("at_most", 64, "tokens").endswith("must be at most 64 tokens long.")
    assert en.prompt("at_least", 8192, "characters").endswith("at least 8192 characters long.")
    assert en.prompt("at_most", 64, "words").startswith("Why {x}?")
    assert cn.prompt("equal_to", 64, "words").endswith("必须等于64个字。")
    assert cn.prompt("at_most", 64, "tokens").endswith("必须至多有64个token。")
    assert cn.prompt("at_least", 64, "characters").endswith("必须至少有64个字符。")
    assert (en.language, cn.language) == ("en", "zh")


def test_a_unit_that_the_task_does_not_name_is_added():
    item = LifebenchItem("1", "qa", "x", "en", "Write {word_count_type} {word_count}.", "")
    assert item.prompt("equal_to", 9, "tokens") == "Write equal to 9.\n(Count tokens.)"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data folder is not here")
def test_the_whole_english_half_loads_and_takes_every_target():
    items = load_lifebench(SHARED)
    assert len(items) == 160
    for item in items:
        text = item.prompt("at_most", 8192, "tokens")
        assert text.endswith("at most 8192 tokens long.")
        assert "{word_count" not in text


def test_all_360_items_load_and_take_every_target_constraint_and_unit(tmp_path):
    rows = [{**(EN if i < 180 else CN), "id": i} for i in range(360)]
    items = load_lifebench(write(tmp_path / "all.jsonl", *rows))
    assert [sum(item.language == name for item in items) for name in ("en", "zh")] == [180, 180]
    for item, constraint, target, unit in product(items[::179], CONSTRAINTS, TARGETS, UNITS):
        text = item.prompt(constraint, target, unit)
        assert str(target) in text
        assert "{word_count" not in text


def test_a_limit_is_spread_over_the_file(tmp_path):
    rows = [{**EN, "id": i, "category": f"c{i // 3}"} for i in range(12)]
    items = load_lifebench(write(tmp_path / "x.jsonl", *rows), limit=4)
    assert [item.category for item in items] == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize("field", ["id", "category", "type", "lang", "task", "raw_data"])
def test_a_missing_field_is_named_with_its_line(tmp_path, field):
    bad = {k: v for k, v in EN.items() if k != field}
    with pytest.raises(DataError, match=rf":2: field '{field}' missing"):
        load_lifebench(write(tmp_path / "x.jsonl", CN, bad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lang": "fr"}, "lang is 'fr'"),
        ({"task": "no place for a length"}, "word_count_type"),
        ({"task": "{word_count_type} {word_count} {word_count}"}, "2 times"),
        ({"task": 5}, "task is int"),
    ],
)
def test_items_that_cannot_be_used_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        load_lifebench(write(tmp_path / "x.jsonl", EN | change))


def test_an_id_twice_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="id '1' occurs twice"):
        load_lifebench(write(tmp_path / "x.jsonl", EN, EN))
    with pytest.raises(DataError, match="holds no LIFEBench items"):
        load_lifebench(write(tmp_path / "y.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        load_lifebench(tmp_path / "z.jsonl")


def test_lengths_in_every_unit():
    assert measure_length("a bc\n", 7, "tokens") == 7
    assert measure_length("a bc\n", 7, "words") == 2
    assert measure_length("a bc\n", 7, "characters") == 3
    assert measure_length("你好 a", 7, "words") == 3
