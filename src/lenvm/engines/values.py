"""What the value models inside vLLM and SGLang share: their backbones' names and the head."""

from pathlib import Path

import torch

from lenvm.errors import CheckpointError
from lenvm.model.config import HEAD_FILE, load_config
from lenvm.model.head import LengthBins, ValueHead, build_head
from lenvm.model.loading import read_head

BACKBONES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""Hugging Face model type -> the architecture by which both engines know the backbone."""


def find_backbone(engine: str, model_type: str) -> str:
    """The architecture of a backbone. CheckpointError names those that there are."""
    if model_type not in BACKBONES:
        allowed = ", ".join(BACKBONES)
        raise CheckpointError(
            f"{engine} cannot serve a value model on {model_type}; it can on {allowed}"
        )
    return BACKBONES[model_type]


def build_head_of(folder: str | Path, hidden_size: int) -> tuple[ValueHead, float]:
    """(head without its weights, gamma) of a checkpoint."""
    config = load_config(Path(folder), None)
    bins = LengthBins(config.num_single_bins, config.bin_growth, config.loops)
    return build_head(config.head, hidden_size, bins), config.gamma


def load_head(head: ValueHead, folder: str | Path, device: torch.device) -> None:
    """Weights into the head, in fp32 on the device; from its own file, since a checkpoint's index
    may hide it from the engine's loader."""
    state = read_head(Path(folder) / HEAD_FILE)
    head.float().to(device)
    head.load_state_dict(state)
