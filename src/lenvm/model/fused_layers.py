"""FusedLayers: the forward of Llama-shaped decoders (Qwen2, Qwen3, Llama, Mistral) in ten kernels a
layer, where the model's own modelling code takes about forty.

The same mathematics in the same order of rounding, with projections of one input joined into one
matrix product, and norms, rotary positions and activations each in one kernel. A model is taken
only if it has the expected parts and agrees with its own modelling code on a probe; otherwise that
code runs. Joined weights replace the separate ones as their storage, so they cost no memory.

Shape legend: N packed tokens, H hidden size, Hq query heads, Hkv key heads, D head size.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenvm.model import kernels
from lenvm.model.cuda_plans import CudaPlan
from lenvm.model.torch_runner import run_backbone

logger = logging.getLogger(__name__)


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
        self.layers = [
            _build_layer(i, layer, *settings[i]) for i, layer in enumerate(backbone.layers)
        ]

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, plan: CudaPlan) -> Tensor:
        """Final hidden states [N, H]."""
        residual = self.backbone.embed_tokens(tokens_N)
        cos, sin = self.backbone.rotary_emb(residual.unsqueeze(0), positions_N.unsqueeze(0))
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
        q = residual.new_empty(residual.shape[0], self.num_heads, self.head_size)
        hidden, x = torch.empty_like(residual), None
        for layer in self.layers:
            kernels.add_norm(x, residual, layer.input_norm, self.eps, hidden)
            qkv = F.linear(hidden, *layer.qkv)
            k_to, v_to, index = plan.destination(layer.index)
            kernels.rotate_and_store(
                qkv, cos, sin, layer.head_norms, self.eps, q, k_to, v_to, index
            )
            attended = plan.attend_stored(layer.index, q, layer.scale, layer.window)
            x = F.linear(attended.flatten(1), *layer.out)
            kernels.add_norm(x, residual, layer.mlp_norm, self.eps, hidden)
            gate_up = F.linear(hidden, *layer.gate_up)
            activated = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            kernels.silu_mul(gate_up, activated)
            x = F.linear(activated, *layer.down)
        kernels.add_norm(x, residual, self.backbone.norm.weight, self.eps, hidden)
        return hidden


@torch.no_grad()
def fuse_layers(backbone: Any) -> FusedLayers | None:
    """The fused forward of the backbone, or None where it is of another shape."""
    if not _is_llama_shaped(backbone):
        return None
    probe = _Probe()
    device = next(backbone.parameters()).device
    tokens = torch.arange(5, device=device) % backbone.embed_tokens.num_embeddings
    positions = torch.tensor([0, 1, 7, 30, 100], device=device)
    expected = run_backbone(backbone, tokens, positions, probe).float()
    fused = FusedLayers(backbone, [probe.settings[i] for i in range(len(backbone.layers))])
    error = (fused(tokens, positions, probe).float() - expected).abs().max() / expected.abs().max()
    if not error <= (1e-4 if expected.dtype == backbone.dtype else 5e-2):
        name = backbone.config.model_type
        logger.warning("%s: fused layers differ by %.2g; running its own code", name, error)
        return None
    return fused


class _Probe:
    """An attention of its own, one token each: a function of q, k and v that shows any mistake in
    them. Notes the scale and the window that the model's code asks for."""

    def __init__(self) -> None:
        self.settings: dict[int, tuple[float, int | None]] = {}
        self._kv: tuple[Tensor, Tensor, Tensor] | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        self.settings[layer] = scale, window
        if self._kv is None:
            places = torch.arange(k.shape[0], device=k.device)
            self._kv = torch.empty_like(k), torch.empty_like(v), places
        group = q.shape[1] // k.shape[1]
        scores = (q * k.repeat_interleave(group, 1)).float().sum(-1, keepdim=True) * scale
        return (torch.sigmoid(scores) * v.repeat_interleave(group, 1)).to(q.dtype)

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self._kv is not None
        return self._kv

    def attend_stored(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        k, v, _ = self.destination(layer)
        return self.attend(layer, q, k, v, scale, window)


def _is_llama_shaped(backbone: Any) -> bool:
    config = backbone.config.get_text_config()
    if getattr(config, "hidden_act", None) not in {"silu", "swish"}:
        return False
    if not all(hasattr(backbone, n) for n in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return False
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    expected = {
        "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
        "self_attn": attention,
        "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
    }
    for layer in backbone.layers:
        for name, parts in expected.items():
            found = {n for n, _ in layer.get_submodule(name).named_children()}
            if found not in (parts, parts | {"q_norm", "k_norm"} if name == "self_attn" else parts):
                return False
        linears = [m for m in layer.modules() if list(m.parameters(recurse=False))]
        if not all(type(m) is nn.Linear or type(m).__name__.endswith("RMSNorm") for m in linears):
            return False
    return True


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
