"""What only a GPU shows: the flash kernel over packed batches, fp16, Liger, compiled layers."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lenvm.data.dataset import Sequences, TokenStore
from lenvm.data.packing import pack, pad
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.training.model import PackedModel
from lenvm.training.objective import Objective, States
from lenvm.training.trainer import train
from tiny import tiny_backbone, tiny_generator, tiny_tokenizer
from training.test_equivalence import family
from training.test_trainer import config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # dynamo and the loss scaler warn of what is meant
]


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_generator(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_flash_kernel_reads_packed_batches_as_fp32_reads_single_sequences(
    kind: str, dtype: torch.dtype
):
    sequences = family(num_prompts=4, per_prompt=4)
    rows = list(range(len(sequences)))
    backbone = tiny_backbone(kind, hidden_size=64, num_hidden_layers=2)
    model = PackedModel(LengthValueModel.build(backbone, LenVMConfig(gamma=0.95))).cuda()
    objective, found = Objective(censoring="one_sided"), {}
    ways = {
        "single": [pack(sequences, [i]) for i in rows],
        "packed": [pack(sequences, rows)],
        "padded": [pad(sequences, rows)],
        "shared": [pack(sequences, rows, share_prompts=True)],
    }
    for name, batches in ways.items():
        model.zero_grad()
        total = 0.0
        for batch in batches:
            batch = batch.to("cuda")
            with torch.autocast("cuda", dtype, enabled=name != "single"):
                raw = model(batch)
            loss = objective.sum(model.value_model.head, raw, States.of(batch), 0.95)
            loss.backward()
            total += loss.item()
        gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[name] = total, torch.cat(gradient)
    truth, exact = found.pop("single")
    for total, gradient in found.values():
        assert total == pytest.approx(truth, rel=1e-2)
        assert (gradient - exact).norm() < 3e-2 * exact.norm()


def test_precisions_and_faster_layers_end_where_fp32_does(tmp_path: Path, base: str):
    """Liger is one of them: install liger-kernel to run this test."""
    assert importlib.util.find_spec("liger_kernel"), "pip install liger-kernel"
    ways = {
        "fp32": {"precision": "fp32"},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
        "checkpointing": {"gradient_checkpointing": True},
        "compiled": {"compile": True},
        "liger": {"liger": True},
    }
    losses, first = {}, 0.0
    for name, fields in ways.items():
        settings = config(
            tmp_path, base, head="scalar", epochs=4, evals=1, output=str(tmp_path / name), **fields
        )
        result = train(settings)
        losses[name], first = result.val_loss_last, result.val_loss_first
        assert result.val_loss_last < 0.7 * result.val_loss_first, name
        model = LengthValueModel.from_pretrained(tmp_path / name, dtype=torch.float32)
        sequences = Sequences.select([TokenStore.load(tmp_path / "t.jsonl")], "validation")
        packed, total = PackedModel(model).cuda(), 0.0  # Liger has patched the model's classes
        with torch.no_grad():
            for i in range(len(sequences)):
                batch = pack(sequences, [i]).to("cuda")
                raw = packed(batch)
                states = States.of(batch)
                total += Objective().sum(model.head, raw, states, model.config.gamma).item()
        # the checkpoint in fp32 gives the loss that training said
        mean = total / int(sequences.lengths.sum())
        assert mean == pytest.approx(losses[name], rel=5e-2, abs=0.02 * first), name
    for name, loss in losses.items():
        assert abs(loss - losses["fp32"]) < 0.1 * (first - losses["fp32"]), (name, losses)
