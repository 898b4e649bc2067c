"""`lenvm merge`, and what an engine's front end knows of an adapter without its weights."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lenvm.cli import main
from lenvm.engines.settings import GuidanceSettings
from lenvm.errors import CheckpointError
from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import Guided
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import VOCAB_SIZE, tiny_backbone, tiny_pair, tiny_tokenizer

IDS = [[1, 5, 9, 4]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tiny_backbone(seed=3).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    config = LenVMConfig(gamma=0.98, head="distribution", base_model=str(folder / "base"))
    model = LengthValueModel(get_peft_model(tiny_backbone(seed=3), lora), config)
    model.save_pretrained(folder / "m")
    return folder


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lenvm", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_merged_adapter_is_a_whole_checkpoint_of_the_same_values(adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["lenvm", "merge", str(adapter / "m"), "-o", str(tmp_path / "w")]
    )
    main()
    whole = LengthValueModel.from_pretrained(tmp_path / "w")
    assert (tmp_path / "w" / "config.json").exists()
    assert (tmp_path / "w" / "tokenizer.json").exists()
    own = LengthValueModel.from_pretrained(adapter / "m")
    torch.testing.assert_close(whole.read(IDS)[0], own.read(IDS)[0], rtol=1e-4, atol=1e-5)
    command = ["merge", str(adapter / "m"), "-o"]
    assert run(monkeypatch, *command, str(tmp_path / "w")) == 2
    (tmp_path / "file").touch()
    assert run(monkeypatch, *command, str(tmp_path / "file")) == 2


def test_a_guide_is_merged_along(adapter, monkeypatch, tmp_path):
    shutil.copytree(adapter / "m", tmp_path / "m")
    backbone = get_peft_model(
        tiny_backbone(seed=3), LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    )
    config = LengthValueModel.from_pretrained(adapter / "m").config
    LengthValueModel(backbone, config).save_pretrained(tmp_path / "m" / "guide")
    pair = LengthValueModel.from_pretrained(tmp_path / "m")
    run_merge = ["lenvm", "merge", str(tmp_path / "m"), "-o", str(tmp_path / "w")]
    monkeypatch.setattr(sys, "argv", run_merge)
    main()
    assert not list((tmp_path / "w").rglob("adapter_config.json"))
    whole = LengthValueModel.from_pretrained(tmp_path / "w")
    for merged, own in ((whole, pair), (whole.guide, pair.guide)):
        assert merged.config.base_model is None
        torch.testing.assert_close(merged.read(IDS)[0], own.read(IDS)[0], rtol=1e-4, atol=1e-5)


def test_an_engine_scores_by_the_guide_and_predicts_by_the_model(tmp_path):
    pair = tiny_pair()
    pair.save_pretrained(tmp_path / "m")
    settings = GuidanceSettings(str(tmp_path / "m"), max_requests=2)
    assert settings.failure_token_id == VOCAB_SIZE - 1
    session = settings.load_session(torch.device("cpu"))
    session.add({"r": Guided(IDS[0], LengthControl(shortest=0.5))})
    raw = session.scorer.score_raw(["r"], torch.tensor([[7]]))[0]
    (expected,) = pair.guide.read([[*IDS[0], 7]])
    torch.testing.assert_close(raw, expected[-1:], rtol=1e-4, atol=1e-5)
    assert session.prediction("r") == pytest.approx(float(pair.read_ends(IDS).length()))


def test_an_adapter_on_a_base_of_another_size_is_refused_with_the_weight(adapter, tmp_path):
    tiny_backbone(hidden_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"does not fit .*other: size mismatch for .*lora_A"):
        LengthValueModel.from_pretrained(f"{adapter / 'm'}@{tmp_path / 'other'}")


def test_a_front_end_knows_an_adapter_by_its_base(adapter):
    settings = GuidanceSettings(str(adapter / "m"))
    assert settings._facts.has_distribution
    assert settings._facts.gamma == 0.98
    assert settings.failure_token_id == tiny_backbone().config.vocab_size - 1
    named = GuidanceSettings(f"{adapter / 'm'}@{adapter / 'base'}")
    assert named.failure_token_id == settings.failure_token_id
    with pytest.raises(CheckpointError, match="no model folder /nowhere"):
        GuidanceSettings(f"{adapter / 'm'}@/nowhere").failure_token_id  # noqa: B018


def test_counting_is_a_setting():
    environ = GuidanceSettings("m", count_candidates=True).to_env()
    assert environ["LENVM_COUNT_CANDIDATES"] == "1"
    found = GuidanceSettings.from_env(environ)
    assert found is not None
    assert found.count_candidates
