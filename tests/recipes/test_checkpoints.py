"""The value models under checkpoints/: what can be known of them without their base."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lenvm.model.head import DistributionHead, LengthBins
from lenvm.model.value_model import LengthValueModel

FOLDERS = sorted((Path(__file__).parents[2] / "checkpoints").glob("*/lenvm.json"))


@pytest.mark.parametrize("config", FOLDERS, ids=lambda path: path.parent.name)
def test_a_shipped_value_model_is_small_whole_and_names_a_public_base(config: Path):
    folder = config.parent
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 20_000_000
    own = json.loads(config.read_text(encoding="utf-8"))
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert own["base_model"] == adapter["base_model_name_or_path"]
    assert own["base_model"].startswith("Qwen/")
    bins = LengthBins(own["num_single_bins"], own["bin_growth"])
    head = DistributionHead(896, bins)
    tensors = load_file(folder / "value_head.safetensors")
    expected = {k: v.shape for k, v in head.state_dict().items()}
    assert {k.removeprefix("v_head."): v.shape for k, v in tensors.items()} == expected
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) > 0
    assert all(x.isfinite().all() for x in [*weights.values(), *tensors.values()])
    assert "/root" not in config.read_text() + (folder / "adapter_config.json").read_text()


def test_a_base_that_is_not_there_is_named(monkeypatch):
    folder = str(FOLDERS[0].parent)
    with pytest.raises(Exception, match=r"no model folder"):
        LengthValueModel.from_pretrained(f"{folder}@/nowhere/base")
