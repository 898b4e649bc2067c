"""What `engines.py` runs on: model folders, and lenvm's entry points without an installation."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
}
"""Qwen2.5's: hidden, intermediate, layers, heads, KV heads, tied embeddings."""
FAULTS = '''"""A rule that always fails: fault injection."""


def explode(candidates, belief, params):
    raise RuntimeError("boom")
'''


TINY = (32, 64, 2, 4, 2, True)
"""Every shape's stand-in in a dry run on a CPU."""
TINY_VOCABULARY = 512


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_config(name: str, *, is_tiny: bool = False, share: float = 1.0) -> Any:
    """share: of the layers."""
    from transformers import Qwen2Config

    hidden, intermediate, layers, heads, kv_heads, tied = TINY if is_tiny else SHAPES[name]
    return Qwen2Config(
        vocab_size=TINY_VOCABULARY if is_tiny else 151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=max(1, round(layers * share)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=2 if is_tiny else 151_645,
        bos_token_id=1 if is_tiny else 151_643,
        dtype="float32" if is_tiny else "bfloat16",
    )


def write_tiny_generator(folder: Path) -> Path:
    """A generator with weights, for a dry run."""
    from transformers import AutoModelForCausalLM

    target = folder / "generator-tiny"
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(build_config("tiny", is_tiny=True))
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # tied: logits that tell tokens apart
    model.save_pretrained(target)
    return target


def write_generator(name: str, folder: Path, *, is_tiny: bool = False) -> Path:
    """A configuration; the engine makes up the weights (`load_format=dummy`)."""
    if is_tiny:
        return write_tiny_generator(folder)
    target = folder / f"generator-{name}"
    if not target.exists():
        config = build_config(name)
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(target)
    return target


def write_value_model(
    name: str,
    folder: Path,
    backbone: str | None = None,
    *,
    is_tiny: bool = False,
    share: float = 1.0,
) -> Path:
    """A checkpoint with a random head whose z spreads by 2; random weights of a shape (of `share`
    of its layers), or on top of a real backbone."""
    from transformers import AutoModel

    from lenvm.model.value_model import LengthValueModel, LenVMConfig

    target = folder / (f"value-{name}" if share == 1.0 else f"value-{name}-{share:g}")
    if target.exists():
        return target
    torch.manual_seed(0)
    config = LenVMConfig(gamma=0.997)
    if backbone is not None:
        dtype = torch.bfloat16 if device() == "cuda" else torch.float32
        model = LengthValueModel.build(backbone, config, dtype=dtype, device=device())
    else:
        shape = build_config(name, is_tiny=is_tiny, share=share)
        with torch.device(device()):
            network = AutoModel.from_config(shape, dtype=shape.dtype)
        model = LengthValueModel(network, config).to(device())
    with torch.inference_mode():
        vocabulary = model.backbone.get_input_embeddings().num_embeddings
        z = model(torch.randint(3, vocabulary, (4, 128), device=device()))
        model.head.summary.weight.mul_(2.0 / z.std())
        model.head.summary.bias.sub_(z.mean() * 2.0 / z.std())
    model.save_pretrained(target)
    return target


def write_real_value_model(folder: Path, generator: Path, *, is_tiny: bool = False) -> Path:
    """The value model that the package ships for SmolLM2, merged into its backbone: a trained head
    does not magnify the rounding of two bf16 implementations, as random ones do."""
    from lenvm.model.bundled import bundled_value_model
    from lenvm.model.value_model import LengthValueModel

    if is_tiny:
        return write_value_model("real", folder, str(generator), is_tiny=True)
    target = folder / "value-bundled"
    if not target.exists():
        dtype = torch.bfloat16 if device() == "cuda" else torch.float32
        model = LengthValueModel.from_pretrained(
            bundled_value_model(), base_model=str(generator), dtype=dtype, device=device()
        )
        model.head.float()
        model.save_pretrained(target)
    return target


def write_site(folder: Path) -> Path:
    """A folder for PYTHONPATH that makes lenvm's entry points known, and a rule that fails."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {**project.get("entry-points", {}), "lenvm.rules": {"explode": "lenvm_faults:explode"}}
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    info = folder / "site" / "lenvm-0.0.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lenvm\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "site" / "lenvm_faults.py").write_text(FAULTS)
    return folder / "site"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("vllm", "sglang", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
