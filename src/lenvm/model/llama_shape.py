"""Llama-shaped decoders (Qwen2, Qwen3, Llama, Mistral): told by their parts, and checked.

A forward of our own over a model's weights (`fused_layers.py` on the GPU, `packed_layers.py` on the
CPU) is taken only if the model has the expected parts and the forward agrees with the model's own
modelling code on a probe; otherwise that code runs.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lenvm.model.backbone import run_backbone
from lenvm.model.kernel_choices import PLAIN

logger = logging.getLogger(__name__)
Forward = TypeVar("Forward", bound=Callable[..., Tensor])
Settings = Sequence[tuple[float, int | None]]
"""Scale and window of each layer's attention."""


@torch.no_grad()
def build_checked(backbone: Any, build: Callable[[Any, Settings], Forward]) -> Forward | None:
    """`build` of the backbone, or None where it is of another shape or computes something else.

    Whether it computes what the model's own code does is seen on fp32 copies of the first layers:
    in bf16 both are tenths of a percent away from that with every layer, in directions of their
    own, and a small mistake would not show.
    """
    if not is_llama_shaped(backbone):
        return None
    device = next(backbone.parameters()).device
    tokens = torch.arange(5, device=device) % backbone.embed_tokens.num_embeddings
    positions = torch.tensor([0, 1, 7, 30, 100], device=device)
    first, own = _copy_first_layers(backbone, tokens), torch.arange(5, device=device)
    probe = _Probe()
    expected = run_backbone(first, own, positions, probe)
    got = build(first, list(probe.settings.values()))(own, positions, probe)
    error = (got - expected).abs().max() / expected.abs().max()
    if not error <= 1e-4:
        name = backbone.config.model_type
        logger.warning("%s: own layers differ by %.2g; running its code", name, error)
        return None
    probe = _Probe()
    run_backbone(backbone, tokens, positions, probe)  # for every layer's scale and window
    return build(backbone, [probe.settings[i] for i in range(len(backbone.layers))])


def _copy_first_layers(backbone: Any, tokens: Tensor, num_layers: int = 2) -> Any:
    """The backbone in fp32 with its first layers and the embeddings of `tokens` alone."""
    configs = (backbone.config, backbone.config.get_text_config())
    shared = {id(config): config for config in configs}  # it says which attention runs

    def copy_of(module: nn.Module) -> nn.Module:
        return copy.deepcopy(module, dict(shared))

    copied = copy.copy(backbone)
    parts = {k: m for k, m in backbone._modules.items() if k not in ("layers", "embed_tokens")}
    copied._modules = {name: copy_of(module) for name, module in parts.items()}
    copied.layers = nn.ModuleList(copy_of(layer) for layer in backbone.layers[:num_layers])
    rows = backbone.embed_tokens(tokens)
    copied.embed_tokens = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows)
    return nn.Module.float(copied)  # a model read from a GGUF file forbids its own `float`


class _Probe:
    """An attention of its own, one token each: a function of q, k and v that shows any mistake in
    them. Notes the scale and the window that the model's code asks for."""

    choices, total, starts_beside = PLAIN, None, False

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


def is_llama_shaped(backbone: Any) -> bool:
    """Whether the backbone has exactly the parts that our forwards know."""
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


def linears_of(backbone: Any) -> list[Tensor]:
    """Weights of the backbone's linear layers."""
    return [m.weight for m in backbone.modules() if isinstance(m, nn.Linear)]
