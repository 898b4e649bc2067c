import base64
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from lenvm.errors import CheckpointError, DataError, InputError
from lenvm.model.prediction import predict_lengths, trace_values
from lenvm.model.tokenization import encode_prompt
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.model.vision import ImageReader, load_image_reader
from tiny import tiny_generator, tiny_tokenizer
from tiny_vlm import (
    EOS,
    IMAGE,
    VISION_END,
    VISION_START,
    draw,
    save_tiny_vlm,
    tiny_image_processor,
    tiny_qwen2_vl,
    tiny_vlm,
    tiny_vlm_config,
    tiny_vlm_tokenizer,
)

MARK = [VISION_START, IMAGE, VISION_END]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_vlm(tmp_path_factory.mktemp("vlm") / "base"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LengthValueModel:
    return LengthValueModel.build(
        str(folder), LenVMConfig(gamma=0.99, head="scalar"), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("images")
    return [
        draw(where / "a.png", (90, 70)),
        draw(where / "b.png", (60, 120), (10, 200, 90)),
        draw(where / "c.jpg", (64, 64), (0, 0, 255)),
    ]


def rows(model: LengthValueModel, files: list[str]) -> tuple[list[list[int]], list[list[str]]]:
    """Sequences with one, two and no images, and the images of each."""
    images = [[files[0]], [files[1], files[2]], [], [files[0]]]
    ids = [
        [4, *MARK, 9, 5, 10, 11],
        [4, *MARK, *MARK, 12, 5, 13],
        [4, 9, 5, 10, 11, 12, 13],
        [4, 8, *MARK, 5, 20, 21, 22],
    ]
    assert model.images is not None
    expand = model.images.expand
    return [expand(i, f) for i, f in zip(ids, images, strict=True)], images


def test_values_do_not_depend_on_how_sequences_are_batched(model: LengthValueModel, files):
    sequences, images = rows(model, files)
    together = model.read(sequences, images=images)
    for ids, names, raw in zip(sequences, images, together, strict=True):
        (single,) = model.read([ids], images=[names])
        assert raw.shape == (len(ids), 1)
        torch.testing.assert_close(raw, single, rtol=1e-5, atol=1e-6)


def test_values_are_those_of_the_backbones_own_forward(model: LengthValueModel, files):
    sequences, images = rows(model, files)
    for ids, names in zip(sequences, images, strict=True):
        (raw,) = model.read([ids], images=[names])
        input_ids = torch.tensor([ids])
        pixels = {}
        if names:
            batch = [model.images.read(name) for name in names]
            pixels = {
                "pixel_values": torch.cat([image.patches for image in batch]),
                "image_grid_thw": torch.tensor([image.grid for image in batch]),
                "mm_token_type_ids": (input_ids == IMAGE).int(),
            }
        with torch.no_grad():
            hidden = model.backbone(input_ids=input_ids, **pixels).last_hidden_state
            torch.testing.assert_close(raw, model.head(hidden)[0], rtol=1e-5, atol=1e-6)


def test_qwen2_vl_reads_images_too(files):
    backbone = tiny_qwen2_vl()
    model = LengthValueModel.build(backbone, LenVMConfig(gamma=0.99, head="scalar")).eval()
    model.images = ImageReader(tiny_image_processor(), backbone.config)
    ids = model.images.expand([4, *MARK, 9, 5], files[:1])
    (raw,) = model.read([ids], images=[files[:1]])
    image, input_ids = model.images.read(files[0]), torch.tensor([ids])
    with torch.no_grad():
        hidden = backbone(
            input_ids=input_ids,
            pixel_values=image.patches,
            image_grid_thw=torch.tensor([image.grid]),
            mm_token_type_ids=(input_ids == IMAGE).int(),
        ).last_hidden_state
        torch.testing.assert_close(raw, model.head(hidden)[0], rtol=1e-5, atol=1e-6)


def test_the_picture_matters(model: LengthValueModel, files, tmp_path: Path):
    other = draw(tmp_path / "other.png", (90, 70), (0, 0, 0))
    ids = model.images.expand([4, *MARK, 9, 5], [files[0]])
    assert ids == model.images.expand([4, *MARK, 9, 5], [other])
    first, second = model.read([ids, ids], images=[[files[0]], [other]])
    assert torch.equal(first[:2], second[:2])
    assert (first[-1] - second[-1]).abs() > 1e-5


grids = st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6)).map(
    lambda g: (1, 2 * g[1], 2 * g[2])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), grids), max_size=3), st.integers(1, 5))
def test_positions_are_those_of_transformers(parts, rest):
    reader = ImageReader(tiny_image_processor(), tiny_vlm_config())
    ids: list[int] = []
    for words, grid in parts:
        ids += [9] * words + [VISION_START] + [IMAGE] * reader.num_tokens(grid) + [VISION_END]
    ids += [7] * rest
    input_ids = torch.tensor([ids])
    found = reader.positions(ids, [grid for _, grid in parts])
    expected, _ = BACKBONE.get_rope_index(
        input_ids,
        mm_token_type_ids=(input_ids == IMAGE).int(),
        image_grid_thw=torch.tensor([grid for _, grid in parts]) if parts else None,
    )
    assert torch.equal(found, expected[:, 0])


BACKBONE = tiny_vlm()


def test_an_image_of_several_sequences_goes_through_the_tower_once(model, files, monkeypatch):
    seen = []
    tower = type(model.backbone.visual)
    original = tower.forward

    def forward(self, patches, *args, **kwargs):
        seen.append(patches.shape[0])
        return original(self, patches, *args, **kwargs)

    monkeypatch.setattr(tower, "forward", forward)
    ids = model.images.expand([4, *MARK, 9, 5], [files[0]])
    model.read([ids, [*ids, 10]], images=[[files[0]], [files[0]]])
    assert seen == [model.images.read(files[0]).patches.shape[0]]


def test_saved_and_loaded_values_are_the_same(model: LengthValueModel, files, tmp_path: Path):
    sequences, images = rows(model, files)
    model.save_pretrained(tmp_path / "saved")
    again = LengthValueModel.from_pretrained(tmp_path / "saved")
    before, after = (m.read(sequences, images=images) for m in (model, again))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_a_published_checkpoint_of_a_vlm_loads(model: LengthValueModel, files, tmp_path: Path):
    """Theirs is the folder of the generating class, with a head of the same names."""
    whole = Qwen2_5_VLForConditionalGeneration(tiny_vlm_config()).eval()
    whole.model.load_state_dict(model.backbone.state_dict())
    folder = tmp_path / "published"
    whole.save_pretrained(folder)
    tiny_vlm_tokenizer().save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    head = (tmp_path / "ours" / "value_head.safetensors").read_bytes()
    (folder / "value_head.safetensors").write_bytes(head)
    loaded = LengthValueModel.from_pretrained(folder, gamma=0.99)
    sequences, images = rows(model, files)
    for a, b in zip(
        loaded.read(sequences, images=images), model.read(sequences, images=images), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_predictions_and_traces_take_the_prompt_of_a_chat_template(model, files):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w9 w10"}]}
    ]
    ids = encode_prompt(model.tokenizer, messages)
    assert ids.count(IMAGE) == 1
    (numbers,) = predict_lengths(model, [ids], images=[[files[0]]])
    states = trace_values(model, ids, [11, 12, EOS], images=[files[0]])
    assert states[0]["length"] == pytest.approx(numbers["length"])
    assert [s["remaining_true"] for s in states] == [3, 2, 1, 0]
    full = model.images.expand(ids, [files[0]])
    assert trace_values(model, full, [11, 12, EOS], images=[files[0]]) == states


def test_what_does_not_fit_is_said(model: LengthValueModel, files, tmp_path: Path):
    reader = model.images
    with pytest.raises(DataError, match="2 places for images and 1 images"):
        reader.expand([*MARK, *MARK], files[:1])
    with pytest.raises(DataError, match=r"as 2 tokens in the prompt.*other pixel"):
        reader.expand([VISION_START, IMAGE, IMAGE, VISION_END], files[:1])
    with pytest.raises(InputError, match="its images are missing"):
        model.read([[4, *MARK, 5]])
    with pytest.raises(InputError, match="do not fit the images"):
        model.read([[4, *MARK, 5]], images=[files[:1]])
    with pytest.raises(InputError, match="1 sequences, but images of 2"):
        model.read([[4, 5]], images=[[], []])
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(DataError, match=r"no\.png is not an image"):
        reader.read(str(tmp_path / "no.png"))
    with pytest.raises(DataError, match="cannot read the image /nowhere"):
        reader.read("/nowhere/x.png")
    with pytest.raises(DataError, match="is a web address; save"):
        reader.read("https://example.org/x.png")


def test_a_text_model_refuses_images(files, tmp_path: Path):
    tiny_generator().save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    model = LengthValueModel.build(str(tmp_path / "text"), LenVMConfig(gamma=0.99))
    assert model.images is None
    with pytest.raises(InputError, match="reads text alone"):
        model.read([[4, 5]], images=[files[:1]])
    with pytest.raises(InputError, match=r"llama.* reads no images.*qwen2_5_vl"):
        load_image_reader(str(tmp_path / "text"))


def test_a_vlm_without_its_image_processor_is_refused(folder: Path, tmp_path: Path):
    tiny_vlm().save_pretrained(tmp_path / "bare")
    tiny_vlm_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="without an image processor"):
        LengthValueModel.build(str(tmp_path / "bare"), LenVMConfig(gamma=0.99))


def test_a_data_address_is_read_like_its_file(model: LengthValueModel, files):
    data = base64.b64encode(Path(files[0]).read_bytes()).decode()
    same = model.images.read(f"data:image/png;base64,{data}")
    assert torch.equal(same.patches, model.images.read(files[0]).patches)
