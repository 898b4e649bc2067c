"""LengthValueModel: a Hugging Face decoder or VLM without its LM head, and a value head on top.

A checkpoint is a Hugging Face folder of the backbone (or a LoRA adapter of a named base), plus
`value_head.safetensors` (`v_head.fc.*`, `v_head.summary.*`: the published system's names, so either
system reads the other's) and `lenvm.json` (`LenVMConfig`). safetensors only. Its folder `guide/`
may hold another checkpoint (`guide.py`).

Shape legend: B sequences, T positions, H hidden size, D head outputs.
"""

import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lenvm.errors import CheckpointError, InputError
from lenvm.files import explaining, read_json, write_json
from lenvm.model.bundled import resolve_model
from lenvm.model.config import CONFIG_FILE, HEAD_FILE, load_config
from lenvm.model.config import LenVMConfig as LenVMConfig
from lenvm.model.guide import GUIDE_FOLDER, check_fit, check_guide
from lenvm.model.head import LengthBelief, LengthBins, build_head
from lenvm.model.loading import (
    find_base,
    hidden_size,
    load_adapter,
    load_backbone,
    read_head,
    split_name,
)
from lenvm.model.reading import reading
from lenvm.model.tokenization import (
    describe_difference,
    encode_control,
    find_eos_token_ids,
    hash_tokenizer,
    load_tokenizer,
)
from lenvm.model.vision import ImageReader, embed_images

logger = logging.getLogger(__name__)


class LengthValueModel(nn.Module):
    """Backbone and head. `forward` gives raw head outputs [B, T, D] fp32; `belief` reads them."""

    def __init__(self, backbone: nn.Module, config: LenVMConfig) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.config = config
        bins = LengthBins(config.num_single_bins, config.bin_growth, config.loops)
        self.head = build_head(config.head, hidden_size(backbone), bins)
        self.tokenizer: Any = None
        self.images: ImageReader | None = None
        """Reads the images of prompts; None for a backbone of text alone."""
        self._load_guide: Callable[..., Self] | None = None
        self._guide: list[Self] = []  # in a list, so that it is no part of this module

    @classmethod
    def build(
        cls,
        backbone: str | nn.Module,
        config: LenVMConfig,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "cpu",
    ) -> Self:
        """A new value model with a fresh head on a backbone given by name, folder, GGUF or module.

        Fills `tokenizer_hash`, `generator` and `eos_token_ids` from a named backbone where the
        config leaves them empty. Raises InputError where there is no such model.
        """
        if isinstance(backbone, nn.Module):
            return cls(backbone, config).to(device)
        path = resolve_model(backbone)
        model = cls(load_backbone(path, dtype, config.num_layers), config)
        model.tokenizer = load_tokenizer(path)
        model.images = ImageReader.load(path, model.backbone.config)
        config.generator = config.generator or backbone
        config.tokenizer_hash = config.tokenizer_hash or hash_tokenizer(model.tokenizer)
        config.eos_token_ids = config.eos_token_ids or find_eos_token_ids(path, model.tokenizer)
        return model.to(device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_inputs: Mapping[str, Tensor] | None = None,
        **backbone_kwargs: Any,
    ) -> Tensor:
        """Raw head outputs [B, T, D] fp32 of the state after each position. Computes no logits.

        image_inputs and position_ids [3, B, T]: what `ImageReader.arrange` gives for the sequences.
        """
        if image_inputs is not None:
            if input_ids is None or position_ids is None:
                raise InputError("image_inputs need input_ids and position_ids [3, B, T]")
            backbone_kwargs["inputs_embeds"] = embed_images(
                self.backbone, input_ids, **image_inputs
            )
            input_ids = None
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **backbone_kwargs,
        ).last_hidden_state
        return self.head(hidden)  # type: ignore[no-any-return]

    def belief(self, raw: Tensor) -> LengthBelief:
        """raw [..., D] -> belief over [...]."""
        return self.head.belief(raw, self.config.gamma)

    @property
    def guide(self) -> Self | None:
        """The model that scores candidates in place of this one; None: this one does it itself.

        Of the checkpoint's `guide/`, loaded on the first use, where and in what precision this
        model is then.
        """
        if self._load_guide is not None:
            weight = next(self.backbone.parameters())
            guide = self._load_guide(dtype=weight.dtype, device=weight.device)
            self.set_guide(guide)
        return self._guide[0] if self._guide else None

    def set_guide(self, guide: Self | None) -> None:
        """Pair this model with a guide, or with none. CheckpointError where it does not fit."""
        if guide is not None:
            check_fit(self.config, guide.config)
        self._guide, self._load_guide = [] if guide is None else [guide], None

    @torch.inference_mode()
    def read(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        images: Sequence[Sequence[str]] | None = None,
        batch_tokens: int = 4096,
    ) -> list[Tensor]:
        """Raw outputs [len, D] of each token sequence, in order, on the CPU.

        images: the image files of each sequence, whose placeholders must all be there
        (`ImageReader.expand`). Sequences are batched by length up to `batch_tokens` padded
        positions. Raises InputError for an empty sequence, a token id outside the vocabulary, or
        images that do not fit.
        """
        files = _check_images(self.images, sequences, images)
        vocabulary = self.backbone.get_input_embeddings().num_embeddings
        for index, ids in enumerate(sequences):
            if not len(ids) or min(ids) < 0 or max(ids) >= vocabulary:
                raise InputError(
                    f"sequence {index} must hold token ids from 0 to {vocabulary - 1}; "
                    + (f"got {min(ids)} .. {max(ids)}" if len(ids) else "it is empty")
                )
        results: list[Tensor] = [torch.empty(0)] * len(sequences)
        for batch in _batch_by_length([len(ids) for ids in sequences], batch_tokens):
            raw = self._read_batch([sequences[i] for i in batch], [files[i] for i in batch])
            for row, i in enumerate(batch):
                results[i] = raw[row, : len(sequences[i])].clone()
        return results

    def read_ends(self, sequences: Sequence[Sequence[int]]) -> LengthBelief:
        """Belief at the end of each token sequence, over [R], on the CPU. See `read`."""
        return self.belief(torch.stack([raw[-1] for raw in self.read(sequences)]))

    def _read_batch(self, sequences: list[Sequence[int]], files: list[Sequence[str]]) -> Tensor:
        """Raw outputs [B, T, D] of sequences, padded at their ends, on the CPU."""
        device = next(self.head.parameters()).device
        width = max(len(ids) for ids in sequences)
        input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.as_tensor(ids)
            mask[row, : len(ids)] = 1
        inputs: dict[str, Any] = {"input_ids": input_ids.to(device)}
        if not bool(mask.all()):
            inputs["attention_mask"] = mask.to(device)
        if self.images is not None and any(files):
            positions, image_inputs = self.images.arrange(sequences, files)
            position_ids = torch.zeros(3, len(sequences), width, dtype=torch.long)
            for row, own in enumerate(positions):
                position_ids[:, row, : own.shape[1]] = own
            assert image_inputs is not None
            inputs["position_ids"] = position_ids.to(device)
            inputs["image_inputs"] = {k: v.to(device) for k, v in image_inputs.items()}
        raw: Tensor = self(**inputs)
        return raw.cpu()

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the checkpoint, its guide too; an older one at `folder` is replaced in one step.

        Of that one, a guide stays where this model has none, and the log says so.
        `state_dict` (`backbone.*`, `head.*`) stands for the own one where the parameters are spread
        over processes. Raises DataError where the disk is full.
        """
        folder = Path(folder)
        with explaining(folder):
            self._write(folder, state_dict)

    def _write(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            own = self.state_dict() if state_dict is None else state_dict
            backbone, head = (
                {k.removeprefix(p): v for k, v in own.items() if k.startswith(p)}
                for p in ("backbone.", "head.")
            )
            self.backbone.save_pretrained(
                partial, state_dict=None if state_dict is None else backbone
            )
            head = {f"v_head.{k}": v.contiguous() for k, v in head.items()}
            save_file(head, partial / HEAD_FILE, metadata={"format": "pt"})
            write_json(partial / CONFIG_FILE, self.config.model_dump())
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            if self.images is not None:
                self.images.processor.save_pretrained(partial)
            kept = folder / GUIDE_FOLDER
            if self.guide is not None:
                self.guide._write(partial / GUIDE_FOLDER, None)
            elif kept.is_dir():
                logger.warning("%s stays: the guide of the value model that was here before", kept)
                shutil.copytree(kept, partial / GUIDE_FOLDER)
            partial.chmod(0o755)
            if folder.exists():
                old = folder.with_name(f".{folder.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                partial.rename(folder)
                shutil.rmtree(old)
            else:
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        gamma: float | None = None,
        base_model: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "cpu",
        merge_adapter: bool = True,
    ) -> Self:
        """Load a checkpoint, ours or the published system's (which needs `gamma`: it stores none).

        A LoRA adapter is merged into its base unless `merge_adapter` is False. `base_model`
        replaces the base that the checkpoint names, and its guide; `FOLDER@BASE` as `folder` does
        so too. Raises CheckpointError that says which part is missing, damaged, or of a newer
        format, or what of its guide does not fit.
        """
        folder, named = split_name(folder)
        base_model = base_model or named
        if not folder.is_dir():
            raise CheckpointError(f"no value model at {folder}: not a folder")
        if not (folder / HEAD_FILE).exists():
            raise CheckpointError(
                f"{folder} has no {HEAD_FILE}, so it is not a value model; train one with "
                "`lenvm train`, or name the folder that `lenvm train` wrote"
            )
        config = load_config(folder, gamma)
        base = str(folder)
        if (folder / "adapter_config.json").exists():
            base = find_base(folder, base_model or config.base_model)
            backbone = load_backbone(base, dtype, config.num_layers)
            backbone = load_adapter(backbone, folder, base, merge=merge_adapter)
        elif not (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder} has neither config.json (a whole backbone) nor adapter_config.json (an "
                "adapter); copy or download the whole folder again"
            )
        else:
            backbone = load_backbone(base, dtype, config.num_layers)
        model = cls(backbone, config)
        model._load_head(folder / HEAD_FILE)
        for place in (folder, Path(base)):  # an adapter may leave the tokenizer to its base
            if (place / "tokenizer_config.json").exists():
                model.tokenizer = load_tokenizer(str(place))
                break
        own = (folder / "preprocessor_config.json").exists()
        model.images = ImageReader.load(str(folder) if own else base, model.backbone.config)
        if (guide := folder / GUIDE_FOLDER).is_dir():
            check_guide(config, guide)
            model._load_guide = functools.partial(
                cls.from_pretrained, guide, gamma=config.gamma, base_model=base_model
            )
        return model.to(device).eval()

    def _load_head(self, path: Path) -> None:
        state = read_head(path)
        expected = {k: v.shape for k, v in self.head.state_dict().items()}
        found = {k: v.shape for k, v in state.items()}
        if expected != found:
            raise CheckpointError(
                f"{path} does not fit the backbone: expected "
                f"{ {k: tuple(s) for k, s in expected.items()} }, found "
                f"{ {k: tuple(s) for k, s in found.items()} }"
            )
        self.head.load_state_dict(state)

    def encode_control(self, control: Mapping[str, Any] | None) -> list[int]:
        """Token ids to put in front of a prompt that is answered under `control`: none without one,
        or where this model was trained without `control_input`."""
        if not self.config.control_input or control is None:
            return []
        return encode_control(self.tokenizer, control)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """CheckpointError that names the difference where the generator's tokenizer is another than
        this model's, or than its guide's."""
        if self.guide is not None:
            self.guide.check_tokenizer(tokenizer)
        if not self.config.tokenizer_hash:
            return
        if hash_tokenizer(tokenizer) == self.config.tokenizer_hash:
            return
        raise CheckpointError(
            "this value model was trained for the tokenizer of "
            f"{self.config.generator or 'another model'}, which is not the generator's: "
            f"{describe_difference(self.tokenizer, tokenizer)}. Use the generator it was trained "
            "for, or train a value model on this one's completions."
        )


def read_vocab_size(name: str | Path) -> int:
    """Tokens that a checkpoint's backbone knows, without its weights. CheckpointError where there
    is no checkpoint."""
    from transformers import AutoConfig

    folder, base_model = split_name(name)
    place = str(folder)
    if not (folder / "config.json").exists():
        if not (folder / "adapter_config.json").exists():
            raise CheckpointError(f"{name} is no checkpoint folder")
        gamma = None if (folder / CONFIG_FILE).exists() else 0.5  # no length is read here
        place = find_base(folder, base_model or load_config(folder, gamma).base_model)
    with reading("a configuration", place):
        if (Path(place) / "config.json").exists():
            data = read_json(Path(place) / "config.json")
            return int(data.get("text_config", data)["vocab_size"])
        return int(AutoConfig.from_pretrained(place).get_text_config().vocab_size)  # from a hub


def _check_images(
    reader: ImageReader | None,
    sequences: Sequence[Sequence[int]],
    images: Sequence[Sequence[str]] | None,
) -> list[Sequence[str]]:
    """The image files of each sequence; InputError where images would be lost without a word."""
    files = [()] * len(sequences) if images is None else list(images)
    if len(files) != len(sequences):
        raise InputError(f"{len(sequences)} sequences, but images of {len(files)}")
    if reader is None:
        if any(files):
            raise InputError(
                "these prompts have images, but the value model reads text alone; train one on a "
                "backbone such as Qwen2.5-VL"
            )
        return list(files)
    for index, (ids, names) in enumerate(zip(sequences, files, strict=True)):
        if not names and reader.token_id in ids:
            raise InputError(f"sequence {index} has image placeholders, but its images are missing")
    return list(files)


def _batch_by_length(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that (widest x rows) <= batch_tokens, longest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
