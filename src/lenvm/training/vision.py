"""What a VLM needs in training: images in its batches, a vision tower that stays as it is."""

from collections.abc import Callable, Sequence
from typing import Any

from lenvm.data.dataset import AddImages
from lenvm.errors import DataError, InputError
from lenvm.model.value_model import LengthValueModel
from lenvm.model.vision import vision_tower

TOWER_MODULES = r"(.*\.)?visual\..*"
"""Names of the vision tower's modules, for peft's `exclude_modules`."""


def prepare_images(
    model: LengthValueModel,
    images: Sequence[Sequence[str]],
    tokens: Callable[[int], Any],
    *,
    trainable: str,
) -> AddImages | None:
    """What adds the images and M-RoPE positions to a packed batch; None where no data has images.

    images: the files of each sequence; tokens: its ids (an array) by number. Raises before the
    first step: DataError for a backbone that reads text alone, a missing file, or placeholders that
    do not fit; InputError for a way of training that keeps hidden states.
    """
    if not any(images):
        return None
    if model.images is None:
        raise DataError(
            f"the data has images, but {model.config.generator or 'the backbone'} reads text "
            "alone; train a backbone such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    if trainable == "last":
        raise InputError(
            "trainable = 'last' keeps hidden states of text models only; with images use 'full', "
            "'lora' or 'head'"
        )
    for row, files in enumerate(images):
        model.images.check(tokens(row).tolist(), files)
    return model.images.batch


def freeze_tower(backbone: Any, *, train_vision: bool) -> str | None:
    """Freeze the vision tower unless it is to train; returns the modules that LoRA leaves out."""
    tower = vision_tower(backbone)
    if tower is None or train_vision:
        return None
    tower.requires_grad_(False)
    return TOWER_MODULES
