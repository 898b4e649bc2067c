"""Tiny real models and a tokenizer, built from configs: what the tests run in place of big ones."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config

VOCAB_SIZE = 64
EOS = 2


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
        **overrides,
    }
    return kinds[family](**values)


def tiny_backbone(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModel.from_config(tiny_config(family, **overrides)).eval()


def tiny_generator(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()


def tiny_tokenizer(size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Words w3 .. w63 and the specials <pad> <s> </s>; a chat template that names the roles."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}w4 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w5{% endif %}",
    )


def tiny_pair(head: str = "distribution", **config: Any) -> Any:
    """A value model of two layers with a guide of one, which believe other things."""
    from lenvm.model.value_model import LengthValueModel, LenVMConfig

    values = {"gamma": 0.98, "head": head, "eos_token_ids": [EOS], **config}
    model, guide = (
        LengthValueModel.build(
            tiny_backbone(seed=seed, num_hidden_layers=num_layers), LenVMConfig(**values)
        ).eval()
        for seed, num_layers in ((1, 2), (2, 1))
    )
    with torch.no_grad():
        for part in (model, guide):
            part.head.summary.weight.mul_(20)
    model.set_guide(guide)
    return model
