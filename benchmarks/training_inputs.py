"""What benchmarks/training.py trains: model shapes and weights, and sequences.

Sequences are real where a folder of sampled tokens (`recipes/results/tokens.py`) is given, made up
otherwise. Imported by training.py, which sets the path.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lenvm.data.dataset import Sequences, TokenStore
from lenvm.data.trajectory import Trajectory
from lenvm.model.bundled import resolve_model
from lenvm.model.value_model import LengthValueModel, LenVMConfig

QWEN = {"family": "qwen2", "vocab_size": 151_936, "num_key_value_heads": 2, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "smollm2": {
        "family": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "family": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def build_model(
    shape: str, device: str, *, path: str | None, low: bool
) -> tuple[LengthValueModel, nn.Module]:
    """(value model, the vocabulary's output matrix in bf16): the weights at `path`, or random ones.

    The backbone is fp32, or bf16 where `low`.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if low else torch.float32
    torch.manual_seed(0)
    if path is not None:
        place = resolve_model(path)
        generator = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device)
    else:
        with torch.device(device):
            generator = AutoModelForCausalLM.from_config(build_config(shape), dtype=dtype)
    torch.manual_seed(0)  # one head for all
    head_config = LenVMConfig(gamma=0.997, head="scalar")
    model = LengthValueModel.build(generator.model, head_config, device=device)
    logits = nn.Linear(1, 1, bias=False)
    logits.weight = nn.Parameter(generator.lm_head.weight.detach().bfloat16(), requires_grad=False)
    return model.train(), logits


def build_config(shape: str) -> Any:
    """transformers' configuration of a shape."""
    from transformers.models.llama import LlamaConfig
    from transformers.models.qwen2 import Qwen2Config

    values = dict(SHAPES[shape])
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[values.pop("family")]
    theta = values.pop("rope_theta", 1e4)
    return kind(
        **values,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


def load_sequences(folder: Path, max_tokens: int) -> Sequences:
    """The completions of a token folder; those over `max_tokens` are dropped, counted."""
    from recipes.results.tokens import TokenFolder

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "sampled.jsonl"
        TokenFolder(folder).export(path)
        store = TokenStore.load(path)
        store = TokenStore(path, store.tokens.copy(), store.index.copy(), store.domains, (), "")
    return Sequences.select([store], None, max_tokens=max_tokens, censoring="one_sided")


def sample(folder: Path, prompts: Path, model: str, device: str, *, seconds: float) -> None:
    """Sample completions of real prompts into a token folder: begins none after `seconds`."""
    from recipes.results.lab import Lab
    from recipes.results.steps import sample as run

    lab = Lab(folder.parents[1], prompts, {"model": model}, device)
    on_gpu = device == "cuda"
    entry = {"name": folder.name, "prompts": "shippable", "per_domain": 600, "n": 1}
    options = {
        "generator": "model",
        "batch": 1024 if on_gpu else 8,
        "max_tokens": 2048 if on_gpu else 24,
        "sets": [{**entry, "seconds": seconds}],
    }
    if folder.parent.name != "tokens":
        raise SystemExit(f"{folder}: samples go to LAB/tokens/NAME")
    run(lab, folder.name, options)
    lab.release()


def make_sequences(vocab_size: int, num: int, max_tokens: int) -> Sequences:
    """Made-up sequences: log-normal lengths, four completions a prompt."""
    random = np.random.default_rng(0)
    rows = []
    for prompt in range(num // 4):
        prompt_length = int(np.clip(random.lognormal(5.0, 0.6), 20, max_tokens // 3))
        ids = random.integers(3, vocab_size, prompt_length).tolist()
        for sample in range(4):
            length = int(np.clip(random.lognormal(5.9, 0.8), 4, max_tokens - prompt_length))
            rows.append(
                Trajectory.model_validate(
                    {
                        "schema": "lenvm.trajectory/1",
                        "id": f"{prompt:016x}-{sample}",
                        "prompt_hash": f"{prompt:016x}",
                        "sample_index": sample,
                        "prompt_text": "",
                        "prompt_token_ids": ids,
                        "completion_token_ids": random.integers(3, vocab_size, length).tolist(),
                        "completion_text": "",
                        "finish_reason": "stop",
                        "model": "synthetic",
                    }
                )
            )
    return Sequences.from_trajectories(rows, max_tokens=max_tokens)


def describe(sequences: Sequences) -> dict[str, Any]:
    """Counts and lengths, for the result file."""
    totals = sequences.totals
    return {
        "num_sequences": len(sequences),
        "num_tokens": int(totals.sum()),
        "mean_prompt": float(sequences.prompt_lengths.mean()),
        "mean_completion": float(sequences.lengths.mean()),
        "total_percentiles": {
            str(p): float(np.percentile(totals, p)) for p in (10, 50, 90, 99, 100)
        },
        "dropped": dict(sequences.dropped),
    }
