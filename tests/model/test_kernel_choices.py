"""Which kernels a step runs: what the file says of that GPU and shape, else the plain ones."""

import itertools
import json

import pytest
import torch

from lenvm.model import kernel_choices
from lenvm.model.kernel_choices import (
    PLAIN,
    AttentionChoice,
    Choices,
    LayerShape,
    Tile,
    TrimHint,
    choose,
)

SHAPE = LayerShape(hidden=64, inner=96, num_heads=4, num_kv_heads=2, head_size=16)
CPU = torch.device("cpu")
FEW = Choices(out=Tile(64, 64, splits=2), pdl=True)
MANY = Choices(attention=AttentionChoice(waves=4, merges=True))
EVERY = dict.fromkeys(("qkv", "out", "gate_up", "down"), Tile(64, 32))
TRIMMED = Choices(**EVERY, trims=True)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    few, many, trimmed = (
        {
            "device_kind": "cpu",
            "shape": vars(SHAPE),
            "num_tokens": n,
            "choices": c.to_json(),
            "step_us": 1.0,
        }
        for n, c in ((16, FEW), (256, MANY), (256, TRIMMED))
    )
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"records": [few, many], "trimmed_records": [trimmed]}))
    monkeypatch.setattr(kernel_choices, "PATH", path)
    kernel_choices._records.cache_clear()
    yield
    kernel_choices._records.cache_clear()


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1, FEW), (7, FEW), (32, FEW), (33, PLAIN), (128, MANY), (512, MANY), (513, PLAIN)],
)
def test_the_nearest_measurement_within_twice_counts(measured, num_tokens, expected):
    """Of fewer tokens than a tile has rows, that of the fewest."""
    assert choose(CPU, SHAPE, num_tokens) == expected


@pytest.mark.parametrize(("num_tokens", "expected"), [(16, PLAIN), (128, TRIMMED), (512, TRIMMED)])
def test_trimmed_kernels_have_records_of_their_own(measured, num_tokens, expected):
    assert choose(CPU, SHAPE, num_tokens, trims=True) == expected


@pytest.mark.parametrize("hopper", [False, True])
def test_prefixes_are_cut_into_a_power_of_two(hopper):
    for programs, waves, most in itertools.product((1, 2, 7, 128, 999), (1, 2, 4), (1, 3, 5, 100)):
        choice = AttentionChoice(waves=waves, stages=4, hopper=hopper)
        splits = choice.count_splits(programs, 132, most)

        def fits(n, programs=programs, waves=waves, most=most):
            units = 66 if hopper and n >= 4 else 132
            return n <= min(most, 8 if hopper else 32) and programs * n <= waves * units

        assert splits & splits - 1 == 0
        assert splits == 1 or fits(splits)
        assert not fits(2 * splits)


def test_clusters_of_four_and_more_leave_half_of_the_gpu():
    choice = AttentionChoice(128, hopper=True)
    splits = {n: choice.count_splits(2 * n, 132, 16) for n in (1, 4, 8, 16, 32, 64, 128)}
    assert splits == {1: 8, 4: 8, 8: 4, 16: 2, 32: 2, 64: 1, 128: 1}


def test_a_proposal_is_taken_to_be_measured_only(measured, monkeypatch):
    told = json.loads(kernel_choices.PATH.read_text())
    del told["trimmed_records"][0]["step_us"]
    kernel_choices.PATH.write_text(json.dumps(told))
    for setting, expected in (("0", PLAIN), ("1", TRIMMED)):
        monkeypatch.setenv("LENVM_TRY_KERNELS", setting)
        kernel_choices._records.cache_clear()
        assert choose(CPU, SHAPE, 256, trims=True) == expected


def test_a_trimmed_step_fuses_all_products():
    with pytest.raises(ValueError, match=r"trims needs .* got \('qkv', 'gate_up', 'down'\)"):
        Choices(**{**EVERY, "out": None}, trims=True)


def test_the_hint_follows_lasting_shares_and_does_not_flip_between_its_bounds():
    hint = TrimHint()
    said = []
    for share in (0.1, 1.0, 0.3, 0.7, 0.9, 0.7):
        for _ in range(1 if share == 0.1 else 40):  # one odd step is no change
            hint.note(share)
        said.append(hint.trims)
    assert said == [False, False, True, True, False, False]


def test_another_shape_or_device_runs_plain_kernels(measured):
    other = LayerShape(hidden=128, inner=96, num_heads=4, num_kv_heads=2, head_size=32)
    assert choose(CPU, other, 16) == PLAIN
    assert choose(torch.device("meta"), SHAPE, 16) == PLAIN


def test_the_shipped_file_reads():
    kernel_choices._records.cache_clear()
    for by_tokens in kernel_choices._records().values():
        assert all(isinstance(choices, Choices) for choices in by_tokens.values())
