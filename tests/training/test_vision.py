"""A tiny Qwen2.5-VL trains on real images, and training sees what inference sees."""

import json
from pathlib import Path

import pytest
import torch

from lenvm.data.dataset import Sequences
from lenvm.data.images import read_with_images
from lenvm.data.packing import BatchPlan, pack
from lenvm.errors import DataError, InputError
from lenvm.files import read_json
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.training.config import TrainingConfig
from lenvm.training.model import PackedModel
from lenvm.training.trainer import train
from tiny import tiny_generator, tiny_tokenizer
from tiny_vlm import EOS, IMAGE, VISION_END, VISION_START, save_tiny_vlm

IMAGES = sorted((Path(__file__).parents[1] / "images").glob("*.jpg"))
LENGTHS = (3, 12, 40)
"""How long the answer about each picture is: the words are the same, so only the picture tells."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm") / "base")


@pytest.fixture(scope="module")
def reader(base: str):
    return LengthValueModel.build(base, LenVMConfig(gamma=0.95)).images


def write(folder: Path, reader, num: int = 60) -> Path:
    """Every fourth prompt is text alone; image paths are relative to the file."""
    for image in IMAGES:
        (folder / image.name).write_bytes(image.read_bytes())
    rows = []
    for i in range(num):
        which = i % 4
        files = [IMAGES[which].name] if which < 3 else []
        mark = [VISION_START, IMAGE, VISION_END] if files else []
        full = [str(folder / name) for name in files]
        length = LENGTHS[which] if files else 7
        rows.append(
            {
                "schema": "lenvm.trajectory/1",
                "id": f"{i:016x}-0",
                "prompt_hash": f"{i:016x}",
                "sample_index": 0,
                "split": "validation" if i >= num - 16 else "train",
                "messages": [{"role": "user", "content": "w9"}],
                "prompt_token_ids": reader.expand([4, *mark, 9, 5], full),
                "completion_token_ids": [8] * (length - 1) + [EOS],
                "completion_text": "",
                "finish_reason": "stop",
                "model": "tiny",
                "images": files,
            }
        )
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp_path: Path, base: str, data: Path, **fields: object) -> TrainingConfig:
    values = {
        "data": [str(data)],
        "output": str(tmp_path / "model"),
        "backbone": base,
        "head": "scalar",
        "gamma": 0.95,
        "learning_rate": 5e-3,
        "batch_tokens": 512,
        "epochs": 16,
        **fields,
    }
    return TrainingConfig.parse(values)


def test_packed_training_batches_read_as_single_sequences_do(base, reader, tmp_path: Path):
    rows = list(read_with_images(write(tmp_path, reader, 20)))
    model = LengthValueModel.build(
        base, LenVMConfig(gamma=0.95, head="scalar"), dtype=torch.float32
    ).eval()
    store = Sequences.from_trajectories(rows)
    sequences = [[*t.prompt_token_ids, *t.completion_token_ids] for t in rows]
    single = [model.read([s], images=[t.images])[0] for s, t in zip(sequences, rows, strict=True)]
    padded = model.read(sequences, images=[t.images for t in rows])
    packed = PackedModel(model)
    plan = BatchPlan(store, 400)
    (batches,) = plan.micro_batches(plan.order(0))
    assert len(batches) > 1
    seen = 0
    for members in batches:
        with torch.no_grad():
            raw = packed(pack(store, members, add_images=model.images.batch))
        states = raw.split((store.lengths[members] + 1).tolist())
        for part, row in zip(states, members, strict=True):
            first = int(store.prompt_lengths[row]) - 1
            torch.testing.assert_close(part, single[row][first:], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(part, padded[row][first:], rtol=1e-5, atol=2e-6)
            seen += 1
    assert seen == len(rows)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_training_learns_from_the_picture_and_leaves_the_tower_alone(
    base, reader, tmp_path: Path, trainable: str
):
    data = write(tmp_path, reader)
    result = train(settings(tmp_path, base, data, trainable=trainable))
    assert result.val_loss_last < result.val_loss_first / 3
    model = LengthValueModel.from_pretrained(tmp_path / "model")
    before = LengthValueModel.build(base, LenVMConfig(gamma=0.95), dtype=torch.float32)
    for name, value in before.backbone.visual.state_dict().items():
        assert torch.equal(value, model.backbone.visual.state_dict()[name]), name
    assert not torch.equal(
        model.backbone.language_model.layers[0].self_attn.q_proj.weight,
        before.backbone.language_model.layers[0].self_attn.q_proj.weight,
    )
    files = [[str(image)] for image in IMAGES]
    ids = [model.images.expand([4, VISION_START, IMAGE, VISION_END, 9, 5], f) for f in files]
    last = torch.stack([raw[-1] for raw in model.read(ids, images=files)])
    lengths = model.belief(last).length()
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[0] < 7 < 20 < lengths[2]
    written = map(json.loads, (tmp_path / "model.metrics.jsonl").read_text().splitlines())
    losses = [row["eval_loss"] for row in written if "eval_loss" in row]
    assert losses[-1] == pytest.approx(read_json(tmp_path / "model.result.json")["val_loss_last"])


def test_the_tower_trains_where_it_is_asked_to(base, reader, tmp_path: Path):
    data = write(tmp_path, reader, 24)
    train(settings(tmp_path, base, data, train_vision=True, epochs=1))
    after = LengthValueModel.from_pretrained(tmp_path / "model").backbone.visual.state_dict()
    before = LengthValueModel.build(base, LenVMConfig(gamma=0.95)).backbone.visual.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in before)


def test_bad_image_data_is_refused_before_the_first_step(base, reader, tmp_path: Path):
    data = write(tmp_path, reader)
    with pytest.raises(InputError, match="hidden states of text models only"):
        train(settings(tmp_path, base, data, trainable="last", output=str(tmp_path / "a")))
    tiny_generator(vocab_size=72).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    with pytest.raises(DataError, match=r"the data has images, but .* reads text alone"):
        train(settings(tmp_path, str(tmp_path / "text"), data, output=str(tmp_path / "b")))
    (tmp_path / IMAGES[0].name).unlink()
    with pytest.raises(DataError, match="no image file"):
        train(settings(tmp_path, base, data, output=str(tmp_path / "c")))
    text = data.read_text().replace(f'"images": ["{IMAGES[0].name}"]', '"images": []')
    data.write_text(text)
    with pytest.raises(DataError, match="1 places for images in a sequence that has 0"):
        train(settings(tmp_path, base, data, output=str(tmp_path / "d")))
    assert not (tmp_path / "d").exists()
