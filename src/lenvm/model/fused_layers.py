"""FusedLayers: the forward of Llama-shaped decoders (Qwen2, Qwen3, Llama, Mistral) in five to ten
kernels a layer, where the model's own modelling code takes about forty.

The same mathematics, with projections of one input joined into one matrix product, and norms,
rotary positions and activations each in one kernel, or in the epilogues of the products where that
was measured to be faster (`kernel_choices.py`, `products.py`). A model is taken
only if it has the expected parts and agrees with its own modelling code on a probe; otherwise that
code runs. Joined weights replace the separate ones as their storage, so they cost no memory.

Shape legend: N packed tokens, H hidden size, Hq query heads, Hkv key heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenvm.model import kernels, products
from lenvm.model.cuda_plans import CudaPlan
from lenvm.model.hopper import products as hopper
from lenvm.model.hopper.runtime import is_supported
from lenvm.model.kernel_choices import PLAIN, Choices, LayerShape, Tile, choose
from lenvm.model.llama_shape import build_checked
from lenvm.model.products import Rows

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary frequencies that do not depend on how long a text is."""
MAX_TILES = 4096
"""Most tiles of a split product's result."""


@dataclass
class _Layer:
    index: int
    input_norm: Tensor
    qkv: tuple[Tensor, Tensor | None]
    head_norms: tuple[Tensor, Tensor] | None
    out: tuple[Tensor, Tensor | None]
    mlp_norm: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    scale: float
    window: int | None


class FusedLayers:
    """Callable like `run_backbone`, over a `CudaPlan`."""

    def __init__(self, backbone: Any, settings: Sequence[tuple[float, int | None]]) -> None:
        """settings: scale and window of each layer's attention."""
        config = backbone.config.get_text_config()
        self.backbone = backbone
        self.eps = float(config.rms_norm_eps)
        self.num_heads = int(config.num_attention_heads)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.head_size = int(head_size)
        like = next(backbone.parameters()).new_empty(1, 1, 1)
        places = torch.tensor([[1, 7, 100]], device=like.device)
        turns = torch.stack(backbone.rotary_emb(like, places))
        self.halves_turn_alike = torch.equal(*turns.chunk(2, -1))
        self._frequencies = _find_frequencies(backbone, self.head_size, turns, places)
        """Rotary frequencies [D / 2] and a factor, where they are the same for every length."""
        self.layers = [
            _build_layer(i, layer, *settings[i]) for i, layer in enumerate(backbone.layers)
        ]
        weight = self.layers[0].out[0]
        self._count = torch.zeros(MAX_TILES, dtype=torch.int32, device=weight.device)

    @property
    def shape(self) -> LayerShape:
        first = self.layers[0]
        return LayerShape(
            hidden=first.out[0].shape[0],
            inner=first.down[0].shape[1],
            num_heads=self.num_heads,
            num_kv_heads=(first.qkv[0].shape[0] // self.head_size - self.num_heads) // 2,
            head_size=self.head_size,
        )

    def choose(self, num_tokens: int, trims: bool = False) -> Choices:
        """What was measured to be fastest for a bucket of that many packed tokens, trimmed or not,
        if it can run here."""
        weight = self.layers[0].out[0]
        if weight.dtype != torch.bfloat16:
            return PLAIN
        found = choose(weight.device, self.shape, num_tokens, trims)
        return found if self.can_run(found, num_tokens) else PLAIN

    def can_run(self, choices: Choices, num_tokens: int) -> bool:
        """Whether the fused products know all that these layers have."""
        first, shape, tiles = self.layers[0], self.shape, choices.tiles
        sizes = {"out": shape.hidden, "gate_up": shape.inner, "down": shape.hidden}
        plain = {name: tile for name, tile in tiles.items() if not tile.hopper}
        if any(sizes[name] % tile.BN for name, tile in plain.items() if name != "qkv"):
            return False
        if choices.attention.hopper or len(plain) < len(tiles):
            if not is_supported(first.out[0].device) or shape.head_size not in (64, 128):
                return False
            inputs = {name: getattr(first, name)[0].shape for name in tiles}
            for name, tile in tiles.items():
                outputs = sizes.get(name, inputs[name][0])
                if tile.hopper and not hopper.can_multiply(name, tile, inputs[name][1], outputs):
                    return False
                if tile.hopper and name == "qkv" and shape.head_size != tile.BN:
                    return False
        split = [tile for tile in plain.values() if tile.splits > 1]
        if any(-(-num_tokens // t.BM) * (shape.hidden // t.BN) > MAX_TILES for t in split):
            return False
        if any(getattr(first, name)[1] is not None for name in tiles if name != "qkv"):
            return False
        head_size = shape.head_size
        plain_turn = self.halves_turn_alike and first.head_norms is None
        turns = plain_turn and head_size >= 16 and head_size & (head_size - 1) == 0
        return turns or "qkv" not in tiles

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, plan: CudaPlan) -> Tensor:
        """Final hidden states [N, H]; those of rows from `plan.total` on mean nothing."""
        rows, residual = self.run(tokens_N, positions_N, plan)
        if rows.squares is not None:
            final, pdl = self.backbone.norm.weight, plan.choices.pdl
            kernels.add_norm(None, residual, final, self.eps, rows.x, pdl, plan.total)
        return rows.x

    def run(self, tokens_N: Tensor, positions_N: Tensor, plan: CudaPlan) -> tuple[Rows, Tensor]:
        """Final hidden states, whose norm may still be to do, and the residual stream [N, H]."""
        choices, eps, total = plan.choices, self.eps, plan.total
        pdl = choices.pdl
        residual, rows, cos, sin = self._begin(tokens_N, positions_N, total, plan.starts_beside)
        q = rows.x.new_empty(residual.shape[0], self.num_heads, self.head_size)
        final: Tensor = self.backbone.norm.weight
        norms = [*(layer.input_norm for layer in self.layers[1:]), final]
        for layer, next_norm in zip(self.layers, norms, strict=True):
            k_to, v_to, index = plan.destination(layer.index)
            to = q, k_to, v_to, index
            if choices.qkv is not None:
                project = (hopper if choices.qkv.hopper else products).project_qkv
                about = rows, *layer.qkv, cos, sin, eps, *to
                project(*about, tile=choices.qkv, pdl=pdl, total=total)
            else:
                weight, bias = layer.qkv
                squares = rows.squares
                qkv = F.linear(rows.x, weight, bias if squares is None else None)
                kernels.rotate_and_store(
                    qkv,
                    cos,
                    sin,
                    layer.head_norms,
                    eps,
                    *to,
                    squares,
                    None if squares is None else bias,
                    rows.x.shape[1],
                    pdl,
                )
            attended = plan.attend_stored(layer.index, q, layer.scale, layer.window).flatten(1)
            rows = self._add(attended, layer.out, residual, layer.mlp_norm, choices.out, pdl, total)
            activated = rows.x.new_empty(rows.x.shape[0], layer.down[0].shape[1])
            weight, bias = layer.gate_up
            if choices.gate_up is not None:
                multiply = (hopper if choices.gate_up.hopper else products).gate_and_up
                multiply(rows, weight, eps, activated, tile=choices.gate_up, pdl=pdl, total=total)
            else:
                gate_up = F.linear(rows.x, weight, bias)
                kernels.silu_mul(gate_up, activated, rows.squares, eps, rows.x.shape[1], pdl)
            rows = self._add(activated, layer.down, residual, next_norm, choices.down, pdl, total)
        return rows, residual

    def _begin(
        self, tokens_N: Tensor, positions_N: Tensor, total: Tensor | None, beside: bool
    ) -> tuple[Tensor, Rows, Tensor, Tensor]:
        """The residual stream [N, H], the first layer's normalised input, and rotary positions:
        cos, sin [N, D]. The stream is fp32: rounded at each of 50 additions, it was most of what a
        forward in bf16 loses. beside: as in `kernels.begin`."""
        embedding, norm, eps = self.backbone.embed_tokens, self.layers[0].input_norm, self.eps
        if self._frequencies is None:
            embedded = embedding(tokens_N)
            residual, dtype = embedded.float(), embedded.dtype
            cos, sin = self.backbone.rotary_emb(residual.unsqueeze(0), positions_N.unsqueeze(0))
            rows = Rows(torch.empty_like(residual, dtype=dtype))
            kernels.add_norm(None, residual, norm, eps, rows.x, total=total)
            return residual, rows, cos[0].contiguous(), sin[0].contiguous()
        frequencies, factor = self._frequencies
        weight = embedding.weight
        x = weight.new_empty(tokens_N.shape[0], weight.shape[1])
        residual = torch.empty_like(x, dtype=torch.float32)
        cos, sin = weight.new_empty(2, tokens_N.shape[0], self.head_size)
        about = tokens_N, positions_N, weight, frequencies, factor, norm, eps
        kernels.begin(*about, residual, x, cos, sin, total, beside)
        return residual, Rows(x), cos, sin

    def _add(
        self,
        x: Tensor,
        linear: tuple[Tensor, Tensor | None],
        residual: Tensor,
        norm: Tensor,
        tile: Tile | None,
        pdl: bool,
        total: Tensor | None,
    ) -> Rows:
        """residual (fp32) += linear(x), in place; the rows that the next product takes."""
        if tile is None:
            rows = Rows(torch.empty_like(residual, dtype=x.dtype))
            kernels.add_norm(F.linear(x, *linear), residual, norm, self.eps, rows.x, pdl)
            return rows
        num_tokens, size = residual.shape
        parts = (size // tile.BN, num_tokens)
        squares = torch.empty(parts, dtype=torch.float32, device=x.device)
        rows = Rows(torch.empty_like(residual, dtype=x.dtype), squares)
        if tile.hopper:
            hopper.project_out(x, linear[0], residual, norm, rows, tile=tile, pdl=pdl, total=total)
        else:
            products.project_out(
                x, linear[0], residual, norm, rows, self._count, tile=tile, pdl=pdl, total=total
            )
        return rows


def fuse_layers(backbone: Any) -> FusedLayers | None:
    """The fused forward of the backbone, or None where it is of another shape."""
    return build_checked(backbone, FusedLayers)


def _build_layer(index: int, layer: Any, scale: float, window: int | None) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm.weight, attention.k_norm.weight
    return _Layer(
        index=index,
        input_norm=layer.input_layernorm.weight,
        qkv=_join([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=norms,
        out=(attention.o_proj.weight, attention.o_proj.bias),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_join([mlp.gate_proj, mlp.up_proj]),
        down=(mlp.down_proj.weight, mlp.down_proj.bias),
        scale=scale,
        window=window,
    )


def _find_frequencies(
    backbone: Any, head_size: int, turns: Tensor, places: Tensor
) -> tuple[Tensor, float] | None:
    """turns: what the backbone says of `places` [1, P], cos and sin [2, 1, P, D]."""
    rotary, embedding = backbone.rotary_emb, backbone.embed_tokens
    frequencies = getattr(rotary, "inv_freq", None)
    is_plain = type(embedding) is nn.Embedding and getattr(rotary, "rope_type", "") in STATIC_ROPES
    if not is_plain or frequencies is None or tuple(frequencies.shape) != (head_size // 2,):
        return None
    factor = float(getattr(rotary, "attention_scaling", 1.0))
    angles = places[0, :, None].float() * frequencies.float()
    own = torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2) * factor
    if not torch.allclose(own, turns[:, 0].float(), atol=1e-2):
        return None
    return frequencies.float(), factor


def _join(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linears of one input as one; theirs become views of it."""
    weight = _join_parameters([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    return weight, _join_parameters([linear.bias for linear in linears])


@torch.no_grad()
def _join_parameters(parameters: Sequence[Tensor]) -> Tensor:
    first = parameters[0].data
    sizes = [p.shape[0] for p in parameters]
    whole = (sum(sizes), *first.shape[1:])
    places = [p.data_ptr() for p in parameters]
    nbytes = [p.numel() * p.element_size() for p in parameters]
    adjacent = all(a + n == b for a, n, b in zip(places, nbytes, places[1:], strict=False))
    same = all(
        p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parameters
    )
    if adjacent and same:  # joined before, by another decoder of this model
        return first.as_strided(whole, first.stride(), first.storage_offset())
    joined = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, torch.split(joined, sizes), strict=True):
        parameter.data = part
    return joined
