"""The module that is trained: which of its parameters learn, LoRA, and compiled layers.

Shape legend: N tokens of a batch, M states, H hidden size, D head outputs.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lenvm.data.packing import PackedBatch
from lenvm.errors import InputError, TrainingError
from lenvm.model.loading import find_layers, find_norm
from lenvm.model.value_model import LengthValueModel
from lenvm.model.vision import embed_images
from lenvm.training.attention import use_packed_attention

Trainable = Literal["full", "lora", "dora", "last", "head"]


JOINED = "joined_"
"""Begins the names of parameters that are joined weights."""
LAYERS_A_PART = 3
"""Decoder layers whose trained weights are joined. A part's gradient can be reduced once the
backward has passed its first layer: with fewer layers there is more to do on the host, with more
there is less of the backward left to reduce it in."""


@dataclass
class _Piece:
    """A weight among joined ones."""

    shape: torch.Size
    places: list[tuple[nn.Module, str, str]] = field(default_factory=list)
    """(module, its name for the weight, full name) of each module that shares it."""


class PackedModel(nn.Module):
    """A value model that reads a `PackedBatch`: raw head outputs [M, D] fp32 of its states.

    It has no `config`, so that transformers' Trainer finds none to write into.
    """

    accepts_loss_kwargs = True

    def __init__(self, value_model: LengthValueModel) -> None:
        super().__init__()
        use_packed_attention(value_model.backbone)
        self.value_model = value_model
        self._joined: dict[str, list[_Piece]] = {}
        """Parameters of joined weights, and what they are made of."""

    def forward(self, batch: PackedBatch) -> Tensor:
        self.lay_out_weights()
        backbone, embeds = self.value_model.backbone, batch.inputs_embeds
        if embeds is not None:
            embeds = embeds.float()
        elif batch.image_inputs is not None:
            embeds = embed_images(backbone, batch.input_ids, **batch.image_inputs)
        hidden = backbone(
            input_ids=batch.input_ids if embeds is None else None,
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            packing=batch.packing,
            use_cache=False,
        ).last_hidden_state
        states = hidden.flatten(0, 1).index_select(0, batch.state_index)
        raw: Tensor = self.value_model.head(states)
        return raw

    def join_weights(self) -> None:
        """Make weights of a kind one parameter, of which every forward gives the modules their
        views: what a layout does on the host for each parameter it then does for a few. Kinds are
        the head, every `LAYERS_A_PART` layers, the backbone's rest, and what is frozen."""
        found: dict[int, tuple[nn.Parameter, _Piece]] = {}
        for prefix, module in self.named_modules():
            for own, weight in module._parameters.items():
                if weight is not None:
                    piece = found.setdefault(id(weight), (weight, _Piece(weight.shape)))[1]
                    piece.places.append((module, own, f"{prefix}.{own}"))
        weights: dict[str, list[Tensor]] = {}
        for weight, piece in found.values():
            full_name = piece.places[0][2]
            part = "head" if full_name.startswith("value_model.head.") else "backbone"
            if not weight.requires_grad:
                part += f"_frozen_{str(weight.dtype).partition('.')[2]}"
            elif part == "backbone" and (layer := re.search(r"\.layers\.(\d+)\.", full_name)):
                part += f"_{int(layer[1]) // LAYERS_A_PART}"
            name = f"{JOINED}{part}"
            weights.setdefault(name, []).append(weight.data)
            self._joined.setdefault(name, []).append(piece)
            for module, own, _ in piece.places:
                del module._parameters[own]
                module.__dict__[own] = torch.empty_like(weight, device="meta")  # it may be asked
        for name, parts in weights.items():
            whole = nn.Parameter(torch.cat([w.flatten() for w in parts]), "_frozen_" not in name)
            self.register_parameter(name, whole)

    def lay_out_weights(self) -> None:
        """Give the modules their views of joined weights, as they are now."""
        for name, pieces in self._joined.items():
            for piece, weight in zip(pieces, self._cut(getattr(self, name), pieces), strict=True):
                for module, own, _ in piece.places:
                    module.__dict__[own] = weight

    def part_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A joined model's `state`, by the names of its weights, which the modules have again."""
        state = dict(state)
        for name, pieces in self._joined.items():
            cut = self._cut(state.pop(name), pieces)
            for piece, weight in zip(pieces, cut, strict=True):
                own_weight = nn.Parameter(weight, requires_grad=False)
                for module, own, full_name in piece.places:
                    module.__dict__.pop(own, None)
                    module.register_parameter(own, own_weight)
                    state[full_name] = weight
        self._joined = {}
        return state

    @staticmethod
    def _cut(whole: Tensor, pieces: "list[_Piece]") -> list[Tensor]:
        parts = torch.split(whole, [piece.shape.numel() for piece in pieces])
        return [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]

    @property
    def _no_split_modules(self) -> Any:
        """What FSDP wraps."""
        return getattr(self.value_model.backbone, "_no_split_modules", None)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.value_model.backbone.gradient_checkpointing_enable(**options)


def keep_whole(model: PackedModel, deepspeed: dict[str, Any]) -> None:
    """Let ZeRO-3 keep a small model's weights whole on each process and share out what is larger,
    the optimizer's states. Its hooks around every module, and its work for every parameter, take
    longer on the host than a GPU takes to compute such a model. Changes DeepSpeed's settings."""
    from deepspeed.utils import nvtx, set_z3_leaf_module

    model.join_weights()
    # hooks around the model alone. It holds the parameters and is no leaf itself: a leaf's
    # gradients are reduced by a hook of the module, which here runs as the backward begins
    set_z3_leaf_module(model.value_model, True)
    nvtx.enable_nvtx = False  # marks for NVIDIA's profiler around each of its functions
    zero = deepspeed["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = sum(p.numel() for p in model.parameters())
    # a part is reduced from where it lies when the next one is complete, not copied to a bucket,
    # which would be 2 GB by default and hold most models to the end of the backward
    zero.setdefault("reduce_bucket_size", 1)
    # saves what a gathered weight takes as bf16 in a backward, by a product written in Python
    zero.setdefault("memory_efficient_linear", False)


def choose_parameters(model: LengthValueModel, trainable: Trainable, last_layers: int) -> None:
    """Freeze all but what trains. The head always does."""
    if trainable == "full":
        return
    model.backbone.requires_grad_(False)
    if trainable == "last":
        layers = find_layers(model.backbone)
        if last_layers > len(layers):
            raise TrainingError(
                f"last_layers is {last_layers}; the backbone has {len(layers)} layers"
            )
        for module in (*layers[len(layers) - last_layers :], find_norm(model.backbone)):
            module.requires_grad_(True)


def add_adapter(
    model: LengthValueModel,
    rank: int,
    alpha: float,
    dropout: float,
    *,
    dora: bool = False,
    left_out: str | None = None,
) -> None:
    """LoRA (or DoRA) on every linear layer of the backbone but `left_out` (a regular
    expression)."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules="all-linear",
        exclude_modules=left_out,
    )
    model.backbone = get_peft_model(model.backbone, lora)


def train_adapter(model: LengthValueModel) -> None:
    """Let the backbone's adapter learn, in fp32 whatever the backbone's type.

    peft would cast each layer's input to fp32 and autocast would cast it back; autocast alone does.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    backbone: Any = model.backbone
    # the first layer's input then has a gradient like all others': checkpointing needs it, and one
    # compilation serves all layers
    backbone.get_base_model().enable_input_require_grads()
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if any(p.dtype != torch.float32 for p in model.backbone.parameters()):
        for module in model.backbone.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False


def compile_layers(backbone: Any, **options: Any) -> None:
    """Compile each decoder layer (one compilation serves all), for any number of tokens.

    `options` go to torch.compile.
    """
    for layer in find_layers(backbone):
        layer.compile(dynamic=True, **options)


def use_liger(backbone: Any) -> None:
    """Liger's fused norm, rotary and SwiGLU kernels. InputError where they do not run."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise InputError(
            "liger = true needs the package: pip install liger-kernel (GPU only); or compile = true"
        ) from None
    kind = backbone.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(
            f"liger = true, but Liger has no kernels for model type {kind!r}; use compile = true"
        )
    # a backbone computes no logits: the fused loss would replace its forward by a causal model's
    _apply_liger_kernel_to_instance(model=backbone, fused_linear_cross_entropy=False)
