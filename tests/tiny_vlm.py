"""A tiny Qwen2.5-VL, its tokenizer and its image processor, built without a network."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_vl import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VOCAB_SIZE = 72
EOS, IMAGE, VIDEO, VISION_START, VISION_END = 2, 64, 65, 66, 67
SPECIALS = {"<|image_pad|>": 64, "<|video_pad|>": 65, "<|vision_start|>": 66, "<|vision_end|>": 67}
TEMPLATE = (
    "{% for m in messages %}w4 {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w5{% endif %}"
)


def tiny_vlm_config(**overrides: Any) -> Any:
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        **overrides,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


def tiny_vlm(seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModel.from_config(tiny_vlm_config(**overrides)).eval()


def tiny_qwen2_vl(seed: int = 0) -> Any:
    """The older family: same positions, another vision tower."""
    config = tiny_vlm_config()
    text = {k: v for k, v in config.text_config.to_dict().items() if k != "model_type"}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    torch.manual_seed(seed)
    return AutoModel.from_config(
        Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    ).eval()


def tiny_image_processor() -> Any:
    """At most 16 x 16 patches, so an image is at most 64 tokens."""
    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)


def tiny_vlm_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(3, VOCAB_SIZE) if i not in SPECIALS.values()}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **words, **SPECIALS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIALS),
        chat_template=TEMPLATE,
    )


def save_tiny_vlm(folder: Path, seed: int = 0) -> str:
    """A model folder as a user has it; returns its path."""
    tiny_vlm(seed).save_pretrained(folder)
    tiny_vlm_tokenizer().save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return str(folder)


def draw(path: Path, size: tuple[int, int] = (90, 70), color: Any = (200, 30, 60)) -> str:
    """An image file with a gradient over a colour; returns its path."""
    image = Image.new("RGB", size, color)
    for x in range(0, size[0], 3):
        for y in range(0, size[1], 2):
            image.putpixel((x, y), (x * 255 // size[0], y * 255 // size[1], 90))
    image.save(path)
    return str(path)
