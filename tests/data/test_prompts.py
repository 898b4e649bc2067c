import base64
import json
from collections import Counter
from pathlib import Path

import pytest

from lenvm.data.prompts import Prompt, load_bundled_prompts, load_prompts, shard_of
from lenvm.errors import DataError, InputError

ROWS = [{"question": f"What is {i}?", "level": i % 3} for i in range(200)]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(str(r["question"]) for r in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, suffix: str):
    prompts = load_prompts(write(tmp_path / f"p{suffix}", ROWS))
    assert [p.text for p in prompts] == [r["question"] for r in ROWS]
    assert {p.split for p in prompts} == {"train", "validation", "test"}


def test_duplicates_go_by_normalised_text(tmp_path: Path):
    rows: list[dict[str, object]] = [{"prompt": t} for t in ("Add 1  and 2", "add 1 and 2 ", "Sub")]
    assert [p.text for p in load_prompts(write(tmp_path / "p.jsonl", rows))] == [
        "Add 1  and 2",
        "Sub",
    ]


def test_a_prompt_keeps_its_split_whatever_else_is_in_the_file(tmp_path: Path):
    everything = {p.text: p.split for p in load_prompts(write(tmp_path / "a.jsonl", ROWS))}
    for prompt in load_prompts(write(tmp_path / "b.jsonl", ROWS[50:80])):
        assert everything[prompt.text] == prompt.split


def test_limit_seed_filter_and_domain(tmp_path: Path):
    source = write(tmp_path / "p.jsonl", ROWS)
    first = load_prompts(source, limit=5, seed=1, domain="math")
    assert first == load_prompts(source, limit=5, seed=1, domain="math")
    assert first != load_prompts(source, limit=5, seed=2, domain="math")
    assert {p.domain for p in first} == {"math"}
    kept = load_prompts(source, keep=lambda p: p.metadata["level"] == 2)
    assert len(kept) == len([r for r in ROWS if r["level"] == 2])


def test_messages_and_instruction_with_input(tmp_path: Path):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (first,) = load_prompts(write(tmp_path / "p.jsonl", [{"messages": turns}]))
    assert first.text == "Be kind.\nHi"
    row: dict[str, object] = {"instruction": "Translate", "input": "Bonjour"}
    assert load_prompts(write(tmp_path / "q.jsonl", [row]))[0].text == "Translate\n\nBonjour"
    cell: dict[str, object] = {"messages": json.dumps(turns)}
    assert load_prompts(write(tmp_path / "m.csv", [cell]))[0].messages == turns


def test_fields_are_mapped_and_texts_may_stay_plain(tmp_path: Path):
    rows: list[dict[str, object]] = [{"q": "Why?", "subject": "logic", "part": "test", "x": 1}]
    source = write(tmp_path / "p.jsonl", rows)
    fields = {"prompt": "q", "domain": "subject", "split": "part"}
    (prompt,) = load_prompts(source, fields=fields, plain=True)
    assert (prompt.prompt_text, prompt.messages) == ("Why?", None)
    assert (prompt.domain, prompt.split, prompt.metadata) == ("logic", "test", {"x": 1})
    with pytest.raises(InputError, match="'colour'"):
        load_prompts(source, fields={"colour": "q"})


def test_what_is_left_out_is_counted(tmp_path: Path):
    rows: list[dict[str, object]] = [{"prompt": t} for t in ("a", "A ", "b", "c")]
    counts: Counter[str] = Counter()
    source = write(tmp_path / "p.jsonl", rows)
    load_prompts(source, keep=lambda p: p.text != "b", counts=counts)
    assert counts == {"rows": 4, "duplicates": 1, "filtered": 1}


def test_shards_are_disjoint_and_whole(tmp_path: Path):
    prompts = load_prompts(write(tmp_path / "p.jsonl", ROWS))
    parts = [shard_of(prompts, i, 3) for i in range(3)]
    assert sorted(p.text for part in parts for p in part) == sorted(p.text for p in prompts)
    assert all(len(part) > 40 for part in parts)
    with pytest.raises(InputError, match="shard 3/3"):
        shard_of(prompts, 3, 3)


def test_a_folder_holds_a_prompt_a_file(tmp_path: Path):
    (tmp_path / "b.txt").write_text("Two\nlines")
    (tmp_path / "a.md").write_text("# One")
    assert [p.text for p in load_prompts(str(tmp_path))] == ["# One", "Two\nlines"]


def test_image_paths_are_absolute_and_embedded_images_are_saved(tmp_path: Path):
    png = b"\x89PNG fake"
    rows: list[dict[str, object]] = [
        {"question": "What is it?", "image": "pictures/1.png"},
        {"question": "And that?", "image": base64.b64encode(png).decode()},
    ]
    rows[1]["image"] = "data:image/png;base64," + str(rows[1]["image"])
    source = write(tmp_path / "p.jsonl", rows)
    first, second = load_prompts(source, image_dir=tmp_path / "saved")
    assert first.images == (str(tmp_path / "pictures" / "1.png"),)
    assert Path(second.images[0]).read_bytes() == png
    with pytest.raises(InputError, match=r"p.jsonl:2 holds an image itself"):
        load_prompts(source)
    moved = load_prompts(write(tmp_path / "elsewhere.jsonl", rows[:1]))
    assert moved[0].prompt_hash == first.prompt_hash


def test_bundled_prompts_are_real_and_cover_three_domains_and_splits():
    prompts = load_bundled_prompts()
    assert len(prompts) >= 350
    assert {p.domain for p in prompts} == {"math", "code", "instructions"}
    assert {p.split for p in prompts} == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{broken}\n', "p.jsonl:2"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "p.jsonl:2"),
        ("p.jsonl", '{"colour": "b"}\n', "p.jsonl:1: no prompt.*colour"),
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}\n', "p.jsonl:2: mixed schema.*question"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "a", "tone": 1}]}\n', "'tone'"),
        ("p.jsonl", '{"messages": [{"role": "bot", "content": "a"}]}\n', "role is 'bot'"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": " "}]}\n', "hold no text"),
        ("p.jsonl", '{"prompt": "a", "image": 5}\n', "an image must be"),
        ("p.csv", 'prompt\n"a', "not CSV"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", '{"prompt": ""}\n', "must be text"),
        ("p.jsonl", '{"prompt": "a", "split": "dev"}\n', "split is 'dev'"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', "role and content"),
        ("p.json", '{"prompt": "a"}', "expected a list"),
        ("p.json", "nonsense", "not JSON"),
        ("p.csv", "prompt,level\na\n", "columns"),
        ("p.parquet", "nonsense", "not Parquet"),
        ("p.xyz", "a", "not a prompt file"),
    ],
)
def test_bad_files_name_the_place(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_prompts(str(tmp_path / name))


def test_missing_file_and_bad_shares(tmp_path: Path):
    with pytest.raises(DataError, match="no prompt file"):
        load_prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="shares"):
        load_prompts(str(tmp_path / "none.jsonl"), validation=0.9, test=0.2)
    with pytest.raises(InputError, match="empty"):
        Prompt.from_text(" ")
