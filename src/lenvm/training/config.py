"""TrainingConfig: every option of `lenvm train`, with its check. Defaults < TOML < command line."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lenvm.errors import DataError, InputError
from lenvm.model.head import HeadName


class TrainingConfig(BaseModel):
    """What to train, on what, and how. `parse` names a bad field, its value and what is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: list[str] = Field(min_length=1)
    """Trajectory files (JSONL)."""
    output: str
    """Folder of the checkpoint; `metrics.jsonl` and resumable states stand beside it."""
    backbone: str = "smollm2"
    """Model to start from: `smollm2`, folder, hub id, GGUF file."""
    init_from: str | None = None
    """Value model to go on from (folder), instead of `backbone` with a fresh head. Its head and
    gamma are kept."""
    head: HeadName = "distribution"
    gamma: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    """auto: 1 - gamma^(L99) = 0.99 of the training completions."""
    loss: Literal["mse", "huber", "bce"] = "mse"
    """Of the scalar head; the distribution head has its likelihood."""
    trainable: Literal["full", "lora", "last", "head"] = "full"
    last_layers: Annotated[int, Field(ge=1)] = 6
    """With trainable = "last": how many upper layers train. What lies below is computed once."""
    train_vision: bool = False
    """Of a VLM: let the vision tower train too."""
    lora_rank: Annotated[int, Field(ge=1)] = 16
    censoring: Literal["drop", "one_sided"] = "drop"
    """Truncated completions: left out, or used as lower bounds."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """None = learning_rate."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_tokens: Annotated[int, Field(ge=64)] = 16_384
    """Tokens of one packed micro batch on one device."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro batches of one optimizer step."""
    max_tokens: Annotated[int, Field(ge=2)] = 8192
    """Longer sequences are dropped and counted, never cut."""
    grouped: bool = False
    """Keep a prompt's completions in one batch (ablation)."""
    gradient_checkpointing: bool = False
    evals: Annotated[int, Field(ge=1)] = 4
    """Evaluations over the run, besides the one before the first step."""
    seed: int = 0

    @model_validator(mode="after")
    def _last_fits(self) -> Self:
        if self.init_from is not None:
            if given := {"backbone", "head", "gamma"} & self.model_fields_set:
                raise ValueError(f"init_from brings its own {', '.join(sorted(given))}")
            if self.trainable == "lora":
                raise ValueError("init_from goes with trainable = 'full', 'last' or 'head'")
        if self.trainable != "last" and "last_layers" in self.model_fields_set:
            raise ValueError("last_layers needs trainable = 'last'")
        return self

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "TrainingConfig":
        """From a dict. Raises InputError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "configuration"
            raise InputError(f"{where} is {first['input']!r}: {first['msg']}") from None

    @classmethod
    def load(cls, path: Path | None, overrides: list[str]) -> "TrainingConfig":
        """A TOML file, then `key=value` overrides (values in TOML; bare words are strings)."""
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = tomllib.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise DataError(f"no configuration {path}") from None
            except tomllib.TOMLDecodeError as error:
                raise DataError(f"{path}: not TOML: {error}") from None
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise InputError(f"override {override!r}: expected key=value")
            try:
                values[key] = tomllib.loads(f"x = {text}")["x"]
            except tomllib.TOMLDecodeError:
                values[key] = text
        return cls.parse(values)
