"""PackedLayers: the forward of Llama-shaped decoders (Qwen2, Qwen3, Llama, Mistral) on the CPU,
over packed weights, in about thirty torch calls a layer where the model's own code takes seventy.

The same mathematics, rounded less often in bf16: the residual stream, norms and rotary positions
are fp32. Rotary positions are one complex product, for which the rows of the query and key
weights are put in pairs; scores do not see the order, and keys are stored in it.

Shape legend: N packed tokens, H hidden size, Hq query heads, Hkv key heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenvm.model.attention import AttentionPlan
from lenvm.model.llama_shape import Settings, build_checked, linears_of
from lenvm.model.packed_linear import PackedLinear, can_pack, has_room


@dataclass
class _Layer:
    input_norm: Any
    qkv: PackedLinear
    head_norms: tuple[Any, Any] | None
    out: PackedLinear
    mlp_norm: Any
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    scale: float
    window: int | None


class PackedLayers:
    """Callable like `run_backbone`."""

    def __init__(self, backbone: Any, settings: Settings) -> None:
        """settings: scale and window of each layer's attention."""
        config = backbone.config.get_text_config()
        self.backbone = backbone
        self.eps = float(config.rms_norm_eps)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.num_heads)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.head_size = int(head_size)
        # components i and i + D / 2 turn together: neighbours from here on
        self._pairs = torch.arange(self.head_size).view(2, -1).T.reshape(-1)
        self.layers = [
            self._build_layer(layer, *own)
            for layer, own in zip(backbone.layers, settings, strict=True)
        ]

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, plan: AttentionPlan) -> Tensor:
        """Final hidden states [N, H]."""
        embedded = self.backbone.embed_tokens(tokens_N)
        dtype, residual = embedded.dtype, embedded.float()
        like = residual.unsqueeze(0)
        cos, sin = self.backbone.rotary_emb(like, positions_N.unsqueeze(0))
        half = self.head_size // 2
        turn = torch.complex(cos[0, :, :half], sin[0, :, :half]).unsqueeze(1)
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        for index, layer in enumerate(self.layers):
            x = self._norm(residual, layer.input_norm, dtype)
            heads = layer.qkv(x).view(len(x), sum(sizes), self.head_size)
            qk, v = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
            q, k = torch.split(self._turn(qk, layer, turn), sizes[:2], 1)
            attended = plan.attend(index, q, k, v, layer.scale, layer.window)
            residual += layer.out(attended.reshape(len(x), -1))
            x = self._norm(residual, layer.mlp_norm, dtype)
            activated = layer.up.times(x, layer.gate(x, "swish"))
            residual += layer.down(activated)
        return self._norm(residual, self.backbone.norm, dtype)

    def _turn(self, qk: Tensor, layer: _Layer, turn: Tensor) -> Tensor:
        """Queries and keys [N, Hq + Hkv, D] at their positions."""
        x = qk.float()
        if layer.head_norms is not None:
            q, k = torch.split(x, [self.num_heads, self.num_kv_heads], 1)
            q_norm, k_norm = layer.head_norms
            x = torch.cat(
                [self._scale(q) * self._paired(q_norm), self._scale(k) * self._paired(k_norm)], 1
            )
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2).to(qk.dtype)

    def _paired(self, norm: Any) -> Tensor:
        weight: Tensor = norm.weight[self._pairs]
        return weight

    def _norm(self, x: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
        """RMSNorm of fp32 x [N, H], rounded once."""
        scaled = self._scale(x)
        if dtype == x.dtype:
            return scaled.mul_(norm.weight)
        out = torch.empty_like(scaled, dtype=dtype)
        return torch.mul(scaled, norm.weight, out=out)

    def _scale(self, x: Tensor) -> Tensor:
        """x over its root mean square along the last dimension."""
        size = x.shape[-1]
        squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x * squares.div_(size).add_(self.eps).rsqrt_()

    def _build_layer(self, layer: Any, scale: float, window: int | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        turned = self.num_heads + self.num_kv_heads
        heads = torch.arange((turned + self.num_kv_heads) * self.head_size)
        heads = heads.view(-1, self.head_size)
        order = torch.cat([heads[:turned, self._pairs], heads[turned:]]).view(-1)
        norms = None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm, attention.k_norm
        return _Layer(
            input_norm=layer.input_layernorm,
            qkv=PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj], order),
            head_norms=norms,
            out=PackedLinear([attention.o_proj]),
            mlp_norm=layer.post_attention_layernorm,
            gate=PackedLinear([mlp.gate_proj]),
            up=PackedLinear([mlp.up_proj]),
            down=PackedLinear([mlp.down_proj]),
            scale=scale,
            window=window,
        )


def pack_layers(backbone: Any) -> PackedLayers | None:
    """The packed forward of the backbone; None where it is of another shape, its products cannot
    be packed, or a copy of its weights would be too large."""
    like = next(backbone.parameters())
    if not can_pack(like.device, like.dtype) or not has_room(linears_of(backbone)):
        return None
    return build_checked(backbone, PackedLayers)
