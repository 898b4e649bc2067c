"""The token store, and the sequences chosen from it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lenvm.data.dataset import Sequences, TokenStore, mixing_weights, repetition, spells
from lenvm.errors import DataError, DataWarning, InputError
from tiny import tiny_tokenizer
from training.test_trainer import trajectory, write_rows


def store(tmp_path: Path, num: int = 30, name: str = "t.jsonl", per_prompt: int = 1) -> TokenStore:
    rows = [
        trajectory(
            i,
            5 + i % 7,
            "validation" if i % 5 == 0 else "train",
            id=f"{i:016x}-{k}",
            sample_index=k,
            domain=("math", "code")[i % 2],
        )
        for i in range(num)
        for k in range(per_prompt)
    ]
    return TokenStore.load(Path(write_rows(tmp_path / name, rows)))


def test_tokens_are_mapped_as_they_stand_in_the_file(tmp_path: Path):
    found = store(tmp_path)
    assert isinstance(found.tokens, np.memmap)
    sequences = Sequences.select([found], "train")
    rows = [json.loads(x) for x in (tmp_path / "t.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["split"] == "train"]
    assert len(rows) == len(sequences)
    for i, row in enumerate(rows):
        ids = row["prompt_token_ids"] + row["completion_token_ids"]
        assert sequences.tokens(i).tolist() == ids
        assert sequences.lengths[i] == len(row["completion_token_ids"])
        assert sequences.domains[sequences.domain[i]] == row["domain"]


def test_a_file_is_parsed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import lenvm.data.dataset as dataset

    store(tmp_path)
    path = tmp_path / "t.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_trajectories", None)
        TokenStore.load(path)
        os.utime(path, (1, 1))  # touched, the same content
        TokenStore.load(path)
    write_rows(path, [trajectory(0, 9, "train")])
    assert len(TokenStore.load(path).index) == 1


def test_a_store_that_a_kill_left_half_written_is_built_again(tmp_path: Path):
    store(tmp_path)
    folder = tmp_path / ".t.jsonl.tokens"
    (folder / "meta.json").unlink()
    assert len(TokenStore.load(tmp_path / "t.jsonl").index) == 30


def test_missing_and_malformed_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"no trajectory file .*x\.jsonl"):
        TokenStore.load(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"y\.jsonl:1"):
        TokenStore.load(tmp_path / "y.jsonl")
    assert not list(tmp_path.glob(".y.jsonl*.part"))


def test_a_file_with_an_unfinished_line_alone_is_named(tmp_path: Path):
    whole = json.dumps(trajectory(0, 300, "train").to_json())
    (tmp_path / "x.jsonl").write_text(whole[:300])
    with pytest.raises(DataError, match=r"x\.jsonl holds no trajectories, only an unfinished"):
        TokenStore.load(tmp_path / "x.jsonl")
    assert not (tmp_path / ".x.jsonl.tokens").exists()


def spelt(tmp_path: Path, num: int, *, wrong: set[int]) -> TokenStore:
    """Completions whose texts their tokens spell, but for those of `wrong`."""
    rows = []
    for i in range(num):
        ids = np.random.default_rng(i).integers(3, 60, 12).tolist()
        text = " ".join(f"w{n + (i in wrong)}" for n in ids)
        fields = {"completion_token_ids": [*ids, 2], "completion_text": text}
        rows.append(trajectory(i, 13, "train", **fields))
    return TokenStore.load(Path(write_rows(tmp_path / "t.jsonl", rows)))


@pytest.mark.parametrize("num", [200, 4000])
def test_a_tenth_of_another_generators_rows_is_found(tmp_path: Path, num: int):
    spelt(tmp_path, num, wrong=set()).check_tokenizer(tiny_tokenizer(), "base")
    mixed = spelt(tmp_path, num, wrong=set(range(0, num, 10)))
    assert len(mixed.texts) == min(num, 256)
    assert max(row for row, _ in mixed.texts) > 0.9 * num
    with pytest.raises(DataError, match=r"t\.jsonl: \d+ of \d+ completions looked at .* of base: "):
        mixed.check_tokenizer(tiny_tokenizer(), "base")
    with pytest.raises(DataError, match="sampled with another tokenizer"):
        spelt(tmp_path, num, wrong=set(range(num))).check_tokenizer(tiny_tokenizer(), "base")


def test_a_single_text_that_is_not_spelt_is_told(tmp_path: Path):
    one = spelt(tmp_path, 100, wrong={60})
    with pytest.warns(DataWarning, match=r"1 of 100 .*completion 61 of the file"):
        one.check_tokenizer(tiny_tokenizer(), "base")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    return found


def test_texts_as_servers_have_them_from_tokens_are_spelt():
    tokenizer = byte_tokenizer()

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    end, call = tokenizer.convert_tokens_to_ids(["</s>", "<|call|>"])
    story = "Once upon a time there was a length."
    ids = encode(story)
    for given, text in [
        ([*ids, end], story),
        ([*encode("  "), *ids, *encode("\n\n"), end], story),  # trimmed
        ([*ids[:9], call, *ids[9:], end], story),  # a special token skipped
        ([*ids, end], story + "</s>"),  # or kept
        ([*encode("<think>Hm. Hm.</think>"), *ids, end], story),  # a chain of thought left out
        ([*ids[:10], *encode("<tool>x</tool>"), *ids[10:]], story),  # or a part of the middle
        (encode("né")[:-1], "n\ufffd"),  # cut in the middle of a character
        (encode("né")[:-1], "n"),
        (encode("日本語のテキスト")[:-2], "日本語のテキス\ufffd"),
        ([*encode("x" * 5000), *ids], story),
    ]:
        assert spells(tokenizer, given, text), text
    assert not spells(tokenizer, [*[(i + 1) % 256 for i in ids], end], story)


def test_repeated_ids_are_told(tmp_path: Path):
    rows = [trajectory(i, 5, "train") for i in (0, 1, 1, 2)]
    found = TokenStore.load(Path(write_rows(tmp_path / "t.jsonl", rows)))
    assert found.repeated == (1, rows[1].id)
    with pytest.warns(DataWarning, match=r"1 completions have an id .*keep the completions of ano"):
        found.warn_of_repeated()
    store(tmp_path, name="u.jsonl").warn_of_repeated()


def test_truncated_and_too_long_are_dropped_and_counted():
    rows = [
        trajectory(0, 5, "train"),
        trajectory(1, 5, "train", finish_reason="length"),
        trajectory(2, 50, "train"),
    ]
    found = Sequences.from_trajectories(rows, max_tokens=20)
    assert len(found) == 1
    assert found.dropped == {"truncated": 1, "too_long": 1}
    kept = Sequences.from_trajectories(rows, censoring="one_sided")
    assert kept.complete.tolist() == [True, False, True]


def test_loops_are_found_and_kept():
    loop, text = [7, 8, 9, 10] * 10, list(range(10, 50))
    whole = [
        trajectory(i, 40, "train", completion_token_ids=ids, finish_reason=reason)
        for i, (ids, reason) in enumerate(
            [(loop, "stop"), (loop, "length"), (text, "stop"), (text, "length")]
        )
    ]
    found = Sequences.from_trajectories(whole, loops_above=0.5)
    assert found.is_endless.tolist() == [True, True, False]
    assert found.complete.tolist() == [False, False, True]
    assert found.dropped == {"truncated": 1}
    assert not Sequences.from_trajectories(whole).is_endless.any()


def test_answers_of_a_low_reward_never_end():
    rows = [
        trajectory(i, 20, "train", finish_reason=reason, **({} if r is None else {"reward": r}))
        for i, (r, reason) in enumerate(
            [(1.0, "stop"), (0.0, "stop"), (None, "stop"), (0.0, "length"), (1.0, "length")]
        )
    ]
    found = Sequences.from_trajectories(rows, rewards_below=0.5)
    assert found.is_endless.tolist() == [False, True, False, True]
    assert found.complete.tolist() == [True, False, True, False]
    assert found.dropped == {"truncated": 1}
    with pytest.raises(DataError, match=r"rewards_below is 0\.5, and no completion has a reward"):
        Sequences.from_trajectories(rows[2:3], rewards_below=0.5)


def test_repetition_is_the_share_of_four_grams_that_stood_before():
    assert repetition(np.arange(40)) == repetition(np.array([1, 1, 1])) == 0
    assert repetition(np.array([1, 2, 3, 4] * 3)) == pytest.approx(1 - 4 / 9)
    assert repetition(np.full(100, 5)) == pytest.approx(1 - 1 / 97)


def test_a_smaller_sample_is_part_of_a_larger_one(tmp_path: Path):
    found = store(tmp_path, 40, per_prompt=4)

    def sample(prompts: int | None, per_prompt: int | None) -> set[int]:
        chosen = Sequences.select(
            [found], None, max_prompts=prompts, max_per_prompt=per_prompt, seed=3
        )
        return set(chosen.start.tolist())

    assert sample(10, 1) < sample(10, 2) < sample(20, 2) < sample(20, 4) < sample(None, None)
    assert len(sample(10, 2)) == 20
    assert sample(40, 4) == sample(None, None)


def test_files_of_different_domains_share_numbers(tmp_path: Path):
    one = store(tmp_path)
    rows = [trajectory(100 + i, 5, "train", domain="poems") for i in range(3)]
    two = TokenStore.load(Path(write_rows(tmp_path / "u.jsonl", rows)))
    both = Sequences.select([one, two], "train")
    assert both.domains == ("code", "math", "poems")
    names = [both.domains[d] for d in both.domain]
    assert names.count("poems") == 3
    assert both.tokens(len(both) - 1).tolist() == [4, 40, 40, 8, 8, 8, 8, 2]


def test_weights_name_files(tmp_path: Path):
    stores = [store(tmp_path), store(tmp_path, name="u.jsonl")]
    assert mixing_weights({"u.jsonl": 0.5}, stores).tolist() == [1.0, 0.5]
    for bad in ({"v.jsonl": 1.0}, {"u.jsonl": 0.0}, {"u.jsonl": float("inf")}):
        with pytest.raises(InputError, match=next(iter(bad))):
            mixing_weights(bad, stores)


def test_a_token_outside_the_vocabulary_is_found(tmp_path: Path):
    sequences = Sequences.select([store(tmp_path)], "train")
    sequences.check_vocabulary(64)
    with pytest.raises(DataError, match="token 40"):
        sequences.check_vocabulary(40)
