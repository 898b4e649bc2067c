"""Which kernels a step runs: what the file says of that GPU and shape, else the plain ones."""

import json

import pytest
import torch

from lenvm.model import kernel_choices
from lenvm.model.kernel_choices import PLAIN, AttentionChoice, Choices, LayerShape, Tile, choose

SHAPE = LayerShape(hidden=64, inner=96, num_heads=4, num_kv_heads=2, head_size=16)
CPU = torch.device("cpu")
FEW = Choices(out=Tile(64, 64, splits=2), pdl=True)
MANY = Choices(attention=AttentionChoice(waves=4, merges=True))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    records = [
        {"device_kind": "cpu", "shape": vars(SHAPE), "num_tokens": n, "choices": c.to_json()}
        for n, c in ((16, FEW), (256, MANY))
    ]
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"records": records}))
    monkeypatch.setattr(kernel_choices, "PATH", path)
    kernel_choices._records.cache_clear()
    yield
    kernel_choices._records.cache_clear()


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(7, PLAIN), (8, FEW), (32, FEW), (33, PLAIN), (128, MANY), (512, MANY), (513, PLAIN)],
)
def test_the_nearest_measurement_within_twice_counts(measured, num_tokens, expected):
    assert choose(CPU, SHAPE, num_tokens) == expected


def test_another_shape_or_device_runs_plain_kernels(measured):
    other = LayerShape(hidden=128, inner=96, num_heads=4, num_kv_heads=2, head_size=32)
    assert choose(CPU, other, 16) == PLAIN
    assert choose(torch.device("meta"), SHAPE, 16) == PLAIN


def test_the_shipped_file_reads():
    kernel_choices._records.cache_clear()
    for by_tokens in kernel_choices._records().values():
        assert all(isinstance(choices, Choices) for choices in by_tokens.values())
