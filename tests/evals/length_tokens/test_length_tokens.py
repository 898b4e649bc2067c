"""Length tokens: sign, events, merging, specials, contexts, visible white space, resuming."""

import json

import pytest
import torch

from evals.prediction.test_prediction import write
from lenvm.data.trajectory import read_trajectories
from lenvm.errors import DataError, InputError
from lenvm.evals.length_tokens.run import (
    LengthTokensConfig,
    read_gains,
    regrade_length_tokens,
    run_length_tokens,
)
from lenvm.evals.length_tokens.statistics import build_tables, count_tokens
from lenvm.evals.length_tokens.tokens import make_visible, merge_key, split_text, token_texts
from lenvm.evals.prediction.predictors import ValueModelPredictor
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.returns import compute_td_residuals, length_to_value
from tiny import EOS, tiny_backbone, tiny_tokenizer

GAMMA = 0.99


class Oracle:
    """Expects `plan[i]` more tokens at the i-th state of every completion."""

    name, gamma, head = "oracle", GAMMA, "scalar"

    def __init__(self, plan):
        self.plan, self.count = plan, 0

    def read(self, sequences, positions, images=None):
        self.count += len(sequences)
        values = length_to_value(torch.tensor([float(n) for n in self.plan]), GAMMA).tolist()
        return [[{"value": values[i]} for i in range(len(p))] for p in positions]


def test_a_token_that_lengthens_has_a_positive_gain(tmp_path):
    path = write(tmp_path / "t.jsonl", [(0, "m", "test", 5, "stop")])
    (trajectory,) = read_trajectories(path)
    # expected: 5, 4, then the third token raises it to 30, then back to 2, 1
    (record,) = read_gains([trajectory], Oracle([5, 4, 30, 2, 1]), tiny_tokenizer())
    assert record["gains"][0] == pytest.approx(0, abs=1e-6)  # 5 -> 4: as expected
    assert record["gains"][1] > 0.1  # 4 -> 30 although 3 were expected
    assert record["gains"][2] < -0.1  # 30 -> 2
    assert record["gains"][3:] == pytest.approx([0, 0], abs=1e-6)
    assert record["tokens"][-1] == "</s>"


def test_gains_are_minus_the_td_residuals_of_the_model(tmp_path):
    torch.manual_seed(0)
    model = LengthValueModel.build(
        tiny_backbone(), LenVMConfig(gamma=GAMMA, head="scalar", eos_token_ids=[EOS])
    )
    path = write(tmp_path / "t.jsonl", [(0, "m", "test", 9, "stop"), (1, "m", "test", 6, "length")])
    complete, cut = read_trajectories(path)
    records = read_gains([complete, cut], ValueModelPredictor(model, "tiny"), tiny_tokenizer())
    (raw,) = model.read([[*complete.prompt_token_ids, *complete.completion_token_ids]])
    values = model.belief(raw[2:-1]).value()
    expected = (-compute_td_residuals(values, GAMMA)).tolist()
    assert records[0]["gains"] == pytest.approx(expected, abs=1e-5)
    assert records[1]["gains"][-1] is None
    assert None not in records[1]["gains"][:-1]


def record(name, *rows):
    ids, tokens, gains = zip(*rows, strict=True)
    return {"id": name, "token_ids": list(ids), "tokens": list(tokens), "gains": list(gains)}


RECORDS = {
    "a": record("a", (1, "So", 0.0), (2, " Wait", 0.5), (3, ",", -0.002), (9, "</s>", -0.9)),
    "b": record("b", (2, " wait", 0.3), (4, "wait", -0.2), (5, "\n\n", -0.05), (6, "x", None)),
}


def tables(merge=True, threshold=0.01, min_count=1, specials=frozenset({9}), contexts=3):
    counts = count_tokens(
        RECORDS.values(),
        threshold=threshold,
        merge=merge,
        special_ids=specials,
        num_contexts=contexts,
    )
    return counts, build_tables(counts, RECORDS, min_count=min_count, top=10)


def test_events_and_means_by_hand():
    counts, found = tables()
    assert counts["wait"].num == 3
    (longer,) = found["longer_by_event"]
    assert (longer["token"], longer["num"], longer["num_events"]) == ("wait", 3, 2)
    assert longer["mean_gain"] == pytest.approx(0.2)
    assert longer["mean_event_gain"] == pytest.approx(0.4)
    assert longer["event_share"] == pytest.approx(2 / 3)
    assert [r["token"] for r in found["shorter_by_event"]] == ["wait", "\\n\\n"]
    assert [r["token"] for r in found["shorter_by_mean"]] == ["\\n\\n", ","]


def test_special_tokens_and_tokens_without_a_gain_are_out():
    counts, _ = tables()
    assert "</s>" not in counts
    assert "x" not in counts
    assert "</s>" in tables(specials=frozenset())[0]


def test_without_merging_forms_stay_apart_and_spaces_show():
    counts, found = tables(merge=False)
    assert counts[" wait"].num == counts["wait"].num == counts[" Wait"].num == 1
    assert [r["token"] for r in found["longer_by_event"]] == ["␣Wait", "␣wait"]


def test_the_threshold_decides_what_an_event_is():
    assert tables(threshold=0.001)[0][","].num_events[-1] == 1
    assert tables(threshold=0.01)[0][","].num_events[-1] == 0
    assert tables(threshold=0.4)[0]["wait"].num_events[1] == 1


def test_rare_tokens_have_no_mean():
    assert [r["token"] for r in tables(min_count=3)[1]["longer_by_mean"]] == ["wait"]
    assert tables(min_count=4)[1]["longer_by_mean"] == []


def test_contexts_are_the_strongest_and_read_as_text():
    _, found = tables(contexts=1)
    (context,) = found["longer_by_event"][0]["contexts"]
    assert context == {
        "id": "a",
        "step": 2,
        "token": " Wait",
        "gain": 0.5,
        "before": "So",
        "after": ",</s>",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" the", "␣the"), ("\n\n", "\\n\\n"), ("  ", "␣␣"), ("a b", "a b"), ("\tx\n", "\\tx\\n")],
)
def test_white_space_is_visible(text, shown):
    assert make_visible(text) == shown


@pytest.mark.parametrize(
    ("text", "key"), [(" Wait", "wait"), ("WAIT", "wait"), ("\n", "\n"), ("  ", "  ")]
)
def test_keys(text, key):
    assert merge_key(text) == key


class Pieces:
    """A tokenizer with SentencePiece names and a token that is half a character."""

    names = ("▁the", "cat", "Ã", "<0x0A>")
    decoded = ("the", "cat", "\ufffd", "\n")

    def convert_ids_to_tokens(self, ids):
        return [self.names[i] for i in ids]

    def decode(self, ids, skip_special_tokens):
        return self.decoded[ids[0]]


def test_tokens_keep_their_space_and_their_bytes():
    assert token_texts(Pieces(), [0, 1, 2, 3]) == [" the", "cat", "Ã", "\n"]


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, ids):
        return [f"<{i:02X}>" for i in ids]


@pytest.mark.parametrize("text", ["a é b", "👩\u200d🔬!", "日本", "plain"])
def test_tokens_of_a_character_have_its_text_at_the_last_and_lose_nothing(text):
    pieces = split_text(Bytes(), list(text.encode()))
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode())


def test_bytes_that_end_in_no_character_are_named():
    assert split_text(Bytes(), [0x61, 0xF0])[0] == "a"
    assert split_text(Bytes(), [0x61, 0xF0])[1] == "<F0>"


def test_a_run_continues_and_counts_again_without_reading(tmp_path):
    path = write(tmp_path / "t.jsonl", [(i, "m", "test", 5, "stop") for i in range(6)])
    plan = [5, 4, 30, 2, 1]

    class Dies(Oracle):
        def read(self, sequences, positions, images=None):
            if self.count >= 2:
                raise KeyboardInterrupt
            return super().read(sequences, positions)

    config = LengthTokensConfig((path,), chunk=2, min_count=1)
    with pytest.raises(KeyboardInterrupt):
        run_length_tokens(config, Dies(plan), tiny_tokenizer(), tmp_path / "o")
    rest = Oracle(plan)
    summary = run_length_tokens(config, rest, tiny_tokenizer(), tmp_path / "o")
    assert rest.count == 4
    assert (summary["num_completions"], summary["num_tokens"]) == (6, 24)  # EOS is special
    assert summary["longer_by_event"][0]["token"] == "w7"
    assert regrade_length_tokens(tmp_path / "o", config) == summary
    strict = LengthTokensConfig((path,), threshold=0.9)
    assert regrade_length_tokens(tmp_path / "o", strict)["longer_by_event"] == []
    grades = (tmp_path / "o" / "grades.jsonl").read_text().splitlines()
    assert json.loads(grades[0])["token"] == "w7"


def test_a_limit_is_spread_over_the_file(tmp_path):
    """Samplers append what ends first: the first completions are the short ones."""
    path = write(tmp_path / "t.jsonl", [(i, "m", "test", i + 2, "stop") for i in range(9)])
    config = LengthTokensConfig((path,), limit=3)
    run_length_tokens(config, Oracle([5] * 12), tiny_tokenizer(), tmp_path / "o")
    rows = map(json.loads, (tmp_path / "o" / "records.jsonl").read_text().splitlines())
    assert [len(row["token_ids"]) for row in rows] == [2, 5, 8]


def test_nothing_to_read_and_nonsense_are_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", [(0, "m", "train", 5, "stop")])
    with pytest.raises(DataError, match="no unguided completion"):
        run_length_tokens(
            LengthTokensConfig((path,)), Oracle([5] * 5), tiny_tokenizer(), tmp_path / "o"
        )
    with pytest.raises(InputError, match="split"):
        LengthTokensConfig((path,), split="dev")
    with pytest.raises(InputError, match="threshold"):
        LengthTokensConfig((path,), threshold=-1)
