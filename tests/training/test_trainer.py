import json
from pathlib import Path

import pytest
import torch

from lenvm.data.dataset import TokenStore, pack, plan_batches
from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError, InputError, TrainingError
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.training.attention import use_packed_attention
from lenvm.training.config import TrainingConfig
from lenvm.training.objective import sum_loss
from lenvm.training.trainer import train
from tiny import EOS, tiny_generator, tiny_tokenizer


def trajectory(i: int, length: int, split: str, **fields: object) -> Trajectory:
    """The second prompt token, and those of the completion, tell long from short."""
    values: dict[str, object] = {
        "id": f"{i:016x}-0",
        "prompt_hash": f"{i:016x}",
        "sample_index": 0,
        "split": split,
        "prompt_text": "p",
        "prompt_token_ids": [4, 40 + length // 15, 40 + length // 15],
        "completion_token_ids": [8 + length // 15] * (length - 1) + [EOS],
        "completion_text": "c",
        "finish_reason": "stop",
        "model": "tiny",
        **fields,
    }
    return Trajectory.model_validate(values)


def write_data(path: Path, num: int = 250) -> str:
    rows = [
        trajectory(i, 4 + 24 * (i % 2) + i % 3, "validation" if i % 5 == 0 else "train")
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(t.to_json()) + "\n" for t in rows))
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_generator(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def config(tmp_path: Path, base: str, **fields: object) -> TrainingConfig:
    data = tmp_path / "t.jsonl"
    if not data.exists():
        write_data(data)
    values = {
        "data": [str(data)],
        "output": str(tmp_path / "model"),
        "backbone": base,
        "learning_rate": 4e-3,
        "batch_tokens": 256,
        "epochs": 6,
        **fields,
    }
    return TrainingConfig.parse(values)


@pytest.mark.parametrize("head", ["scalar", "distribution"])
@pytest.mark.parametrize("trainable", ["full", "last", "lora", "head"])
def test_training_learns_and_saves_what_it_learned(
    tmp_path: Path, base: str, head: str, trainable: str
):
    fields = {"last_layers": 2} if trainable == "last" else {}
    settings = config(tmp_path, base, head=head, trainable=trainable, **fields)
    result = train(settings)
    assert result.val_loss_last < result.val_loss_first
    assert train(settings) == result  # finished: returns at once
    model = LengthValueModel.from_pretrained(tmp_path / "model")
    assert model.config.generator == base
    rows = (tmp_path / "model.metrics.jsonl").read_text().splitlines()
    assert "eval_loss" in json.loads(rows[-1])
    if trainable == "full":
        raw = torch.stack([r[-1] for r in model.read([[4, 40, 40], [4, 41, 41]])])
        lengths = model.belief(raw).length()
        assert lengths[0] < 12 < lengths[1]


def test_last_layers_with_kept_hidden_states_equal_a_full_forward(tmp_path: Path, base: str):
    """After training, the checkpoint's loss on validation is what the trainer saw last."""
    result = train(config(tmp_path, base, trainable="last", last_layers=2, head="scalar"))
    model = LengthValueModel.from_pretrained(tmp_path / "model")
    from lenvm.data.trajectory import read_trajectories

    rows = (t for t in read_trajectories(tmp_path / "t.jsonl") if t.split == "validation")
    store = TokenStore.build(rows)
    total, count = 0.0, 0
    for i in range(len(store)):
        batch = pack(store, [i])
        labels = batch["labels"][0]
        raw = model(batch["input_ids"])[0][labels != -100]
        n = labels[labels != -100]
        total += sum_loss(model.head, raw, n, torch.ones(len(n)).bool(), result.gamma).item()
        count += len(n)
    assert total / count == pytest.approx(result.val_loss_last, rel=2e-2)  # kept in bf16


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_and_single_sequences_give_the_same_loss_and_gradients(family: str):
    from tiny import tiny_backbone

    store = TokenStore.build(trajectory(i, n, "train") for i, n in enumerate((5, 17, 9, 30)))
    model = LengthValueModel.build(tiny_backbone(family), LenVMConfig(gamma=0.95))
    use_packed_attention(model.backbone)

    def gradients(batches: list[list[int]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for indices in batches:
            batch = pack(store, indices)
            labels, complete = batch.pop("labels")[0], batch.pop("is_complete")[0]
            batch.pop("shift_labels")
            raw = model(**batch)[0]
            on = labels != -100
            loss = sum_loss(model.head, raw[on], labels[on], complete[on], 0.95)
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed, packed_grads = gradients([[0, 1, 2, 3]])
    single, single_grads = gradients([[0], [1], [2], [3]])
    assert packed == pytest.approx(single, rel=1e-5)
    for a, b in zip(packed_grads, single_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_labels_count_s_0_to_s_l_minus_1():
    store = TokenStore.build([trajectory(0, 4, "train")])
    assert pack(store, [0])["labels"].tolist() == [[-100, -100, 4, 3, 2, 1, -100]]


def test_plans_cover_every_sequence_once_within_the_budget():
    lengths = [5, 50, 20, 20, 100, 3]
    batches = plan_batches(lengths, 60, seed=1)
    assert sorted(i for b in batches for i in b) == list(range(6))
    assert all(sum(lengths[i] for i in b) <= 60 or len(b) == 1 for b in batches)
    assert batches == plan_batches(lengths, 60, seed=1) != plan_batches(lengths, 60, seed=2)


def test_truncated_and_too_long_are_dropped_and_counted():
    rows = [
        trajectory(0, 5, "train"),
        trajectory(1, 5, "train", finish_reason="length"),
        trajectory(2, 50, "train"),
    ]
    store = TokenStore.build(rows, max_tokens=20)
    assert len(store) == 1
    assert store.dropped == {"truncated": 1, "too_long": 1}
    assert len(TokenStore.build(rows, censoring="one_sided")) == 3


def test_a_censored_state_is_penalised_for_predicting_less_only():
    from lenvm.model.head import DistributionHead, LengthBins, ValueHead

    n, cut = torch.tensor([10]), torch.tensor([False])
    head = ValueHead(8)
    assert sum_loss(head, torch.tensor([[9.0]]), n, cut, 0.9) == 0.0
    assert sum_loss(head, torch.tensor([[-9.0]]), n, cut, 0.9) > 0.0
    distribution = DistributionHead(8, LengthBins())
    far, near = (torch.full((1, len(LengthBins())), -9.0) for _ in range(2))
    far[0, 20:], near[0, :5] = 9.0, 9.0
    losses = [sum_loss(distribution, raw, n, cut, 0.9).item() for raw in (far, near)]
    assert losses[0] < 0.01 < losses[1]


def test_a_run_that_was_killed_continues_to_the_same_end(tmp_path: Path, base: str):
    whole = train(config(tmp_path, base, output=str(tmp_path / "whole")))

    class Killed(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        train(config(tmp_path, base), stop)
    continued = train(config(tmp_path, base))
    assert continued.val_loss_last == pytest.approx(whole.val_loss_last, rel=1e-6)
    assert continued.val_loss_first == whole.val_loss_first


def test_changed_data_or_settings_are_refused(tmp_path: Path, base: str):
    train(config(tmp_path, base, epochs=1))
    with pytest.raises(InputError, match="epochs"):
        train(config(tmp_path, base, epochs=2))
    write_data(tmp_path / "t.jsonl", num=260)
    with pytest.raises(InputError, match="data_bytes"):
        train(config(tmp_path, base, epochs=1))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, base: str):
    with pytest.raises(TrainingError, match="learning_rate"):
        train(config(tmp_path, base, learning_rate=1e30, warmup_ratio=0))


def test_no_usable_sequence_and_other_tokenizers(tmp_path: Path, base: str):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(trajectory(0, 5, "train").to_json()) + "\n")
    with pytest.raises(DataError, match="validation"):
        train(config(tmp_path, base))
    rows = [
        trajectory(i, 5, s, prompt_token_ids=[999]) for i, s in enumerate(("train", "validation"))
    ]
    path.write_text("".join(json.dumps(t.to_json()) + "\n" for t in rows))
    with pytest.raises(DataError, match="another tokenizer"):
        train(config(tmp_path, base, output=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "override", ["gamma=1.5", "gamma=0", "epochs=-1", "colour=1", "head=vector"]
)
def test_bad_settings_are_named(override: str):
    with pytest.raises(InputError, match=override.split("=")[0]):
        TrainingConfig.load(None, ['data=["a"]', "output=o", override])
