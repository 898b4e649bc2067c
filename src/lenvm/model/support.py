"""What a RaggedDecoder can serve exactly, told from a model's configuration; else refused."""

from typing import Any

from lenvm.errors import InputError

TESTED = ("qwen2", "qwen3", "llama", "gemma3_text", "mistral")
"""Model types whose every path is tested against a plain forward."""
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}


def check_supported(backbone: Any) -> None:
    """InputError that names what the backbone has and a RaggedDecoder cannot serve exactly."""
    config = backbone.config.get_text_config()
    for reason in _reasons(backbone, config):
        raise InputError(f"{config.model_type}: {reason}; tested are {', '.join(TESTED)}")


def _reasons(backbone: Any, config: Any) -> list[str]:
    reasons = []
    if not getattr(backbone, "_supports_attention_backend", False):
        reasons.append("its attention cannot be replaced, so it cannot run over many requests")
    if getattr(config, "attn_logit_softcapping", None):
        reasons.append("attention with soft-capped logits is not supported")
    if any(name.endswith("sinks") for name, _ in backbone.named_parameters()):
        reasons.append("attention with sinks is not supported")
    if getattr(config, "use_bidirectional_attention", None):
        reasons.append("bidirectional attention is not supported")
    kinds = set(getattr(config, "layer_types", None) or []) - _LAYER_TYPES
    if kinds:
        reasons.append(f"layers of type {', '.join(sorted(kinds))} are not supported")
    kinds = _rope_types(config) - _FIXED_ROPE
    if kinds:
        reasons.append(
            f"rotary positions of type {', '.join(sorted(kinds))} depend on the batch and are not "
            "supported"
        )
    if (getattr(config, "sliding_window", None) or 2) < 2:
        reasons.append("a sliding window of one token is not supported")
    return reasons


def _rope_types(config: Any) -> set[str]:
    """Of `rope_parameters`, which is one dict or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return {parameters["rope_type"]}
    return {p["rope_type"] for p in parameters.values() if isinstance(p, dict) and "rope_type" in p}
