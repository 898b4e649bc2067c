"""Images of a VLM's prompts: files -> what the backbone takes, with the positions of its tokens.

In Qwen2-VL and Qwen2.5-VL an image stands in the prompt as a run of placeholder tokens, one for
each block of merge x merge patches, and positions have three axes (time, height, width: M-RoPE). An
`ImageReader` turns image files into patches (transformers' image processor), placeholders and
positions; `embed_images` puts the vision tower's output in their place. Everything is per sequence,
so that padded, packed and single sequences see the same inputs.

Shape legend: T tokens, I images, P patches of all images, F placeholders, H hidden size.
"""

import base64
import binascii
import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lenvm.errors import CheckpointError, DataError, InputError
from lenvm.model.reading import reading

SUPPORTED = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose images are read."""
KEPT = 16
"""Preprocessed images that stay in memory: the completions of a prompt share theirs."""


class ReadImage(NamedTuple):
    """One image as the vision tower takes it: patches [P, C] and the grid (time, height, width)."""

    patches: Tensor
    grid: tuple[int, int, int]


class ImageReader:
    """Reads the images of a VLM. Holds no weights: it may travel to a data loader's processes."""

    def __init__(self, processor: Any, config: Any) -> None:
        """processor: a transformers image processor of the Qwen2-VL kind; config: the VLM's."""
        self.processor = processor
        self.token_id = int(config.image_token_id)
        self.merge = int(config.vision_config.spatial_merge_size)
        if (own := int(processor.merge_size)) != self.merge:
            raise CheckpointError(
                f"the image processor merges {own} x {own} patches, the backbone {self.merge} x "
                f"{self.merge}; use the image processor of the backbone"
            )
        self._kept: OrderedDict[str, ReadImage] = OrderedDict()

    @classmethod
    def load(cls, path: str, config: Any) -> "ImageReader | None":
        """The reader of a model folder or hub id; None where `config` is of a text model.

        Pillow resizes whatever else is installed, so that every machine sees the same pixels.
        Raises CheckpointError where the folder has no image processor.
        """
        if config.model_type not in SUPPORTED:
            return None
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        with reading("an image processor (preprocessor_config.json)", path):
            try:
                processor = Qwen2VLImageProcessorPil.from_pretrained(path)
            except OSError as error:
                if (Path(path) / "preprocessor_config.json").exists():
                    raise
                raise CheckpointError(
                    f"{path} is a model of text and images without an image processor "
                    f"(preprocessor_config.json): {error}"
                ) from error
        return cls(processor, config)

    def read(self, file: str) -> ReadImage:
        """An image file or data: URL. DataError where it cannot be read."""
        if file in self._kept:
            self._kept.move_to_end(file)
            return self._kept[file]
        batch = self.processor(images=[open_image(file)], return_tensors="pt")
        time, height, width = batch["image_grid_thw"][0].tolist()
        image = ReadImage(batch["pixel_values"].float(), (time, height, width))
        self._kept[file] = image
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return image

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Placeholders of an image."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def count(self, token_ids: Sequence[int]) -> int:
        """Placeholder tokens in a sequence."""
        return sum(1 for i in token_ids if i == self.token_id)

    def expand(self, token_ids: Sequence[int], files: Sequence[str]) -> list[int]:
        """Token ids with as many placeholders for each image as it has; full ones stay as they are.

        A chat template writes one placeholder for an image, a server's prompt ids hold all. Raises
        DataError where the runs of placeholders do not fit the images.
        """
        sizes = [self.num_tokens(self.read(file).grid) for file in files]
        runs = _find_runs(token_ids, self.token_id)
        if len(runs) != len(sizes):
            raise DataError(
                f"the prompt has {len(runs)} places for images and {len(sizes)} images"
                + (f": {', '.join(files)}" if files else "")
            )
        expanded: list[int] = []
        end = 0
        for (start, stop), size, file in zip(runs, sizes, files, strict=True):
            if stop - start not in (1, size):
                raise DataError(
                    f"{file} stands as {stop - start} tokens in the prompt, but this model's image "
                    f"processor makes {size} of it: the generator was served with other pixel "
                    "limits (min_pixels, max_pixels). Use the value model's preprocessor_config."
                    "json there, or the generator's here"
                )
            expanded += [*token_ids[end:start], *[self.token_id] * size]
            end = stop
        return [*expanded, *token_ids[end:]]

    def check(self, token_ids: Sequence[int], files: Sequence[str]) -> None:
        """What can be known without reading the images: DataError where one has no place or no
        file."""
        if len(runs := _find_runs(token_ids, self.token_id)) != len(files):
            raise DataError(
                f"{len(runs)} places for images in a sequence that has {len(files)} images"
            )
        for file in files:
            if not file.startswith("data:") and not Path(file).is_file():
                raise DataError(f"no image file {file}")

    def positions(self, token_ids: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """M-RoPE positions [3, T] of one sequence whose placeholders are all there.

        Text goes on by one on all axes; the blocks of an image have their row and column, and text
        after it starts beyond the larger of the two (Qwen2-VL, arXiv 2409.12191, sec. 2.1).
        """
        runs = _find_runs(token_ids, self.token_id)
        if [b - a for a, b in runs] != [self.num_tokens(grid) for grid in grids]:
            raise InputError(
                f"image placeholders in runs of {[b - a for a, b in runs]} tokens do not fit the "
                f"images, which need {[self.num_tokens(grid) for grid in grids]}; expand the "
                "prompt (ImageReader.expand), and drop completions that write placeholders"
            )
        parts: list[Tensor] = []
        place, position = 0, 0
        for (start, stop), (time, height, width) in zip(runs, grids, strict=True):
            text = torch.arange(position, position + start - place).expand(3, -1)
            position += start - place
            axes = [torch.arange(n) for n in (time, height // self.merge, width // self.merge)]
            image = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1) + position
            parts += [text, image]
            position += max(height, width) // self.merge
            place = stop
        rest = len(token_ids) - place
        return torch.cat([*parts, torch.arange(position, position + rest).expand(3, -1)], 1)

    def arrange(
        self, sequences: Sequence[Sequence[int]], files: Sequence[Sequence[str]]
    ) -> tuple[list[Tensor], dict[str, Tensor] | None]:
        """(positions [3, T] of each sequence, image inputs of them together, None for no image).

        The inputs are what `embed_images` takes; an image of several sequences is there once.
        Raises InputError where placeholders and images do not fit, DataError for a bad file.
        """
        wanted = [[self.read(name) for name in names] for names in files]
        positions = [
            self.positions(ids, [image.grid for image in images])
            for ids, images in zip(sequences, wanted, strict=True)
        ]
        first: dict[str, int] = {}
        unique: list[ReadImage] = []
        rows: list[Tensor] = []
        place = 0
        for names, images in zip(files, wanted, strict=True):
            for name, image in zip(names, images, strict=True):
                if name not in first:
                    first[name] = place
                    unique.append(image)
                    place += self.num_tokens(image.grid)
                rows.append(torch.arange(self.num_tokens(image.grid)) + first[name])
        if not unique:
            return positions, None
        return positions, {
            "pixel_values": torch.cat([image.patches for image in unique]),
            "image_grid_thw": torch.tensor([image.grid for image in unique]),
            "image_rows": torch.cat(rows),
        }

    def batch(
        self, sequences: Sequence[Sequence[int]], files: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """What a packed batch of the sequences has besides its tokens: position_ids [3, 1, N] and,
        where there are images, image_inputs. Errors as of `arrange`."""
        positions, image_inputs = self.arrange(sequences, files)
        entries: dict[str, Any] = {"position_ids": torch.cat(positions, 1).unsqueeze(1)}
        if image_inputs is not None:
            entries["image_inputs"] = image_inputs
        return entries


def load_image_reader(path: str) -> ImageReader:
    """The reader of a folder or hub id, without the weights. InputError for a text model."""
    from transformers import AutoConfig

    with reading("a configuration", path):
        config = AutoConfig.from_pretrained(path)
    reader = ImageReader.load(path, config)
    if reader is None:
        raise InputError(
            f"{path} ({config.model_type}) reads no images; models that do: {', '.join(SUPPORTED)}"
        )
    return reader


def vision_tower(backbone: Any) -> nn.Module | None:
    """The part of a VLM that reads images, with its projection; None for a text model."""
    tower = getattr(backbone, "visual", None)
    return tower if isinstance(tower, nn.Module) else None


def embed_images(
    backbone: Any,
    input_ids: Tensor,
    pixel_values: Tensor,
    image_grid_thw: Tensor,
    image_rows: Tensor,
) -> Tensor:
    """Embeddings [B, T, H] of tokens, the images' features in place of their placeholders.

    pixel_values [P, C] and image_grid_thw [I, 3] of the images, each once; image_rows [F]: which
    row of the images' features each placeholder takes, in the order of the tokens. A frozen vision
    tower keeps no graph.
    """
    embeds: Tensor = backbone.get_input_embeddings()(input_ids)
    tower = vision_tower(backbone)
    trains = tower is not None and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        features = torch.cat(
            list(backbone.get_image_features(pixel_values, image_grid_thw).pooler_output)
        )
    places = (input_ids == backbone.config.image_token_id).unsqueeze(-1)
    return embeds.masked_scatter(places, features[image_rows].to(embeds.dtype))


def open_image(file: str) -> Any:
    """A Pillow image (RGB) of a file or data: URL. DataError says what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    name = file if len(file) <= 100 else f"{file[:100]}..."
    try:
        if file.startswith(("http://", "https://")):
            raise DataError(f"{name} is a web address; save the image to a file and name that")
        if file.startswith("data:"):
            content = io.BytesIO(base64.b64decode(file.partition(",")[2], validate=True))
        else:
            content = io.BytesIO(Path(file).read_bytes())
        with Image.open(content) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, binascii.Error) as error:
        raise DataError(f"{name} is not an image: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read the image {name}: {error.strerror or error}") from None


def _find_runs(token_ids: Sequence[int], token_id: int) -> list[tuple[int, int]]:
    """(start, end) of the runs of a token."""
    runs: list[tuple[int, int]] = []
    for place, token in enumerate(token_ids):
        if token != token_id:
            continue
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs
