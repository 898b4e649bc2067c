"""LenVMConfig: what `lenvm.json` in a checkpoint's folder says."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lenvm.errors import CheckpointError, InputError
from lenvm.files import read_json
from lenvm.model.head import HeadName

FORMAT_VERSION = 1
HEAD_FILE, CONFIG_FILE = "value_head.safetensors", "lenvm.json"
TargetName = Literal["discounted_return", "length", "normalized_length", "log_length"]


class LenVMConfig(BaseModel):
    """What `lenvm.json` holds: all that is needed to read the head's numbers."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    gamma: float = Field(gt=0, lt=1)
    """Discount of the value that the head was trained for."""
    head: HeadName = "scalar"
    target: TargetName = "discounted_return"
    generator: str = ""
    """The model whose completions the head was trained on."""
    tokenizer_hash: str = ""
    """`hash_tokenizer` of the generator's tokenizer."""
    eos_token_ids: list[int] = Field(default_factory=list)
    num_single_bins: int = 32
    bin_growth: float = 1.07
    """The distribution head's bins (`LengthBins`)."""
    loops: bool = False
    """Its last bin is for answers that never end: it was trained with `loops_above` or
    `rewards_below`."""
    control_input: bool = False
    """A guided completion's control stands before its prompt, as `encode_control` writes it."""
    num_layers: Annotated[int, Field(ge=1)] | None = None
    """The backbone is the first `num_layers` layers of the model that it is named after."""
    base_model: str | None = None
    """Base of a LoRA checkpoint, where the folder holds an adapter."""


def load_config(folder: Path, gamma: float | None) -> LenVMConfig:
    """What a checkpoint says of its head. gamma: where it has no `lenvm.json`.

    Raises CheckpointError for a file that is missing, damaged or of a newer format, InputError
    where the checkpoint has another gamma.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        if gamma is None:
            raise CheckpointError(
                f"{folder} has no {CONFIG_FILE}, which says how its numbers are read. A checkpoint "
                "of the published system stores no gamma: run `lenvm download OWNER/NAME -o "
                f"{folder} --gamma 0.997` (its Qwen2.5 models; 0.9998 for Qwen3), which writes "
                f'the file, or write {folder / CONFIG_FILE} yourself, {{"gamma": 0.997}} at least'
            )
        return LenVMConfig(gamma=gamma)
    data = read_json(path)
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is of format {version}, newer than {FORMAT_VERSION}, the newest that this "
            "lenvm reads; upgrade lenvm"
        )
    try:
        config = LenVMConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from None
    if gamma is not None and gamma != config.gamma:
        raise InputError(
            f"{folder} was trained at gamma {config.gamma}; it cannot be read at {gamma}"
        )
    return config
