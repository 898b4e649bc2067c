"""Tiny random models of every tested family, and the truth that a RaggedDecoder is held against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from lenvm.model.kernel_choices import AttentionChoice, Choices, Tile

VOCAB = 96
FUSED = Choices(
    qkv=Tile(64, 32),
    out=Tile(64, 64, splits=2),
    gate_up=Tile(64, 32),
    down=Tile(64, 128, splits=2),
    attention=AttentionChoice(waves=8, stages=4, merges=True),
)
"""Every product fused and every split merged in place, for models of hidden size 128 and heads of
32 on a GPU."""
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "llama": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "sliding_window": 11,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": 9}),
}
FAMILIES = tuple(CONFIGS)

HOPPER = Choices(
    qkv=Tile(64, 64, hopper=True),
    out=Tile(64, 64, splits=2, hopper=True),
    gate_up=Tile(128, 160, hopper=True),
    down=Tile(128, 64, splits=2, hopper=True),
    attention=AttentionChoice(waves=2, hopper=True),
    pdl=True,
)
HOPPER_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""What its kernels know: heads of 64."""


def build(family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random decoder of the family whose hidden states differ clearly from token to token."""
    kind, values = CONFIGS[family]
    config = kind(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.15 if dtype == torch.float32 else 0.08,  # less chaos
            "pad_token_id": None,  # a padding embedding is all zeros
            **values,
            **overrides,
        }
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation="eager").to(dtype).eval()


@torch.inference_mode()
def last_hidden(model: Any, tokens: Sequence[int]) -> Tensor:
    """The truth: a plain forward over one sequence, hidden state of its last token [H]."""
    out = model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False)
    hidden: Tensor = out.last_hidden_state[0, -1]
    return hidden
