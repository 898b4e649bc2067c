"""lenvm.trace/1: what is accepted, what is refused and how that is said, gains, the table."""

import json
import math

import pytest

from lenvm.errors import DataError
from lenvm.reports.traces import TokenTrace, make_visible, markdown_table, read_traces
from lenvm.returns import compute_td_residuals
from reports.made_up import GAMMA, make_trace, write_jsonl


def trace(**changes) -> TokenTrace:
    row = {
        "schema": "lenvm.trace/1",
        "prompt": "Say it",
        "tokens": ["a", " b"],
        "token_ids": [5, 6],
        "gamma": 0.5,
        "values": [-0.75, -0.5, 0.0],
        "remaining_predicted": [2.0, 1.0, 0.0],
        "remaining_true": [2, 1, 0],
    }
    return TokenTrace.model_validate(row | changes)


def test_gains_by_hand_positive_is_longer():
    # gamma 0.5: 2 tokens to come = -(1 - 0.25); as expected: no gain
    assert trace().gains() == pytest.approx([0, 0])
    # after the first token 3 more are expected (V = -0.875) where 1 was: longer
    gain, back = trace(values=[-0.75, -0.875, 0.0]).gains()
    assert gain == pytest.approx(0.5 + 0.5 * 0.875 - 0.75)
    assert gain > 0 > back
    assert trace(remaining_predicted=[2, 3, 0]).length_gains() == [2, -2]


def test_gains_are_minus_the_td_residuals():
    import torch

    one = TokenTrace.model_validate(make_trace("math"))
    residuals = compute_td_residuals(torch.tensor(one.values[:-1]), GAMMA)
    assert one.gains() == pytest.approx((-residuals).tolist(), abs=1e-6)


def test_states_become_columns_and_a_file_reads_back(tmp_path):
    states = [
        {"step": 0, "value": -0.75, "length": 2.0, "p10": 1.0, "p90": 4.0, "remaining_true": None},
        {"step": 1, "value": -0.5, "length": 1.0, "p10": 0.5, "p90": 2.0, "remaining_true": None},
    ]
    made = TokenTrace.from_states("Say", ["x"], [9], states, 0.5, model="m", finish_reason="length")
    assert (made.remaining_low, made.remaining_true) == ([1.0, 0.5], None)
    write_jsonl(tmp_path / "t.jsonl", [made.to_json()])
    assert read_traces(tmp_path / "t.jsonl") == [made]
    row = {**make_trace("math"), "states": states}  # as the demo writes them
    row = {k: row[k] for k in ("schema", "prompt", "gamma", "states")}
    write_jsonl(tmp_path / "s.jsonl", [{**row, "tokens": ["x"], "token_ids": [9]}])
    assert read_traces(tmp_path / "s.jsonl")[0].values == [-0.75, -0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "lenvm.trace/9"}, "schema"),
        ({"values": [-0.5]}, "values has 1 entries"),
        ({"token_ids": [1]}, "1 token_ids for"),
        ({"gamma": 1.0}, "gamma"),
        ({"values": [0.5, 0, 0]}, "values"),
        ({"remaining_low": [0, 0, 0]}, "go together"),
        ({"colour": "red"}, "colour"),
        ({"tokens": []}, "tokens"),
    ],
)
def test_what_is_no_trace_is_refused_with_file_and_line(tmp_path, changes, message):
    good = trace().to_json()
    write_jsonl(tmp_path / "t.jsonl", [good, good | changes])
    with pytest.raises(DataError, match=message) as caught:
        read_traces(tmp_path / "t.jsonl")
    assert "t.jsonl:2" in str(caught.value)


def test_values_that_are_not_finite_are_refused(tmp_path):
    row = trace().to_json() | {"remaining_predicted": [math.inf, 1, 0]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="remaining_predicted"):
        read_traces(tmp_path / "t.jsonl")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no trace"):
        read_traces(tmp_path / "t.jsonl")


def test_the_markdown_table_is_whole_and_on_one_line_per_step():
    table = markdown_table(trace(tokens=["a|`\n", " "], remaining_predicted=[3, 1, 0]))
    assert table.splitlines() == [
        "| step | token | value | predicted | true | relative error |",
        "|---:|---|---:|---:|---:|---:|",
        "| 0 | (prompt) | -0.7500 | 3.0 | 2 | +50.0% |",
        "| 1 | `a\\|\u02cb⏎` | -0.5000 | 1.0 | 1 | +0.0% |",
        "| 2 | `␣` | 0.0000 | 0.0 | 0 | - |",
    ]


def test_a_cut_answer_has_no_truth_and_no_error():
    cut = trace(remaining_true=None)
    assert cut.relative_errors() == [None] * 3
    assert markdown_table(cut).count("| - | - |") == 3


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n", "⏎\n"),
        ("a\tb", "a⇥\tb"),
        ("\u202eevil", "⟨202E⟩evil"),
        ("\u200d", "⟨200D⟩"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("", "⋯"),
        ("\x1b", "␛"),
        (" مرحبا", " مرحبا"),
    ],
)
def test_what_cannot_be_seen_is_shown(token, shown):
    assert make_visible(token) == shown
