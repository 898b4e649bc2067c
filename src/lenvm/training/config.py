"""TrainingConfig: every option of `lenvm train`, with its check. Defaults < TOML < command line."""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lenvm.errors import DataError, InputError
from lenvm.model.config import TargetName
from lenvm.model.head import HeadName
from lenvm.training.model import Trainable
from lenvm.training.objective import Aggregation, CensoringName, LossName, Objective

MISSING = {
    "data": "name at least one trajectory file",
    "output": "name the folder of the checkpoint (--output FOLDER)",
}


class TrainingConfig(BaseModel):
    """What to train, on what, and how. `parse` names a bad field, its value and what is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: list[str] = Field(min_length=1)
    """Trajectory files (JSONL)."""
    output: str
    """Folder of the checkpoint; `metrics.jsonl` and resumable states stand beside it."""
    backbone: str = "smollm2"
    """Model to start from: `smollm2`, folder, hub id, GGUF file."""
    num_layers: Annotated[int, Field(ge=1)] | None = None
    """Keep the backbone's first layers only, and its last norm: half of them are half the cost of
    every guided token. None: all."""
    init_from: str | None = None
    """Value model to go on from (folder), instead of `backbone` with a fresh head. Its head and
    gamma are kept."""
    head: HeadName = "distribution"
    gamma: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    """auto: 1 - gamma^(L99) = 0.99 of the training completions."""
    target: TargetName = "discounted_return"
    """Where the scalar head's error is measured; its output is the same for all."""
    loss: LossName = "mse"
    """Of the scalar head; the distribution head has its likelihood."""
    relative: bool = False
    """Errors relative to the target."""
    huber_delta: Annotated[float, Field(gt=0)] = 0.1
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Distribution head: probability moved to the neighbouring bins."""
    prompt_weight: Annotated[int, Field(ge=1)] = 1
    """How many states of the answer the end of the prompt counts as in the training loss."""
    aggregation: Aggregation = "token"
    """Another than `token` shifts what the model learns to predict."""
    td_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """TD(lambda) targets; 1 is the closed form."""
    include_eos: bool = False
    """Train the terminal state too."""
    censoring: CensoringName = "drop"
    """Truncated completions: left out, lower bounds, or continued by the model's own estimate."""
    control_input: bool = False
    """Put the control of a guided completion in front of its prompt, as tokens; guidance then does
    the same. Unguided ones stay as they are. For data sampled under controls (docs/training.md)."""
    loops_above: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Completions with a larger share of repeated 4-grams of tokens are taught as answers that
    never end, so that control keeps away from them. None: as long as they are."""
    rewards_below: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Completions with a reward under it, such as wrong answers, are taught as ones that never end,
    so that control looks for short answers that are right. None: rewards are not read."""
    trainable: Trainable = "full"
    last_layers: Annotated[int, Field(ge=1)] = 6
    """With trainable = "last": how many upper layers train. What lies below is computed once."""
    train_vision: bool = False
    """Of a VLM: let the vision tower train too."""
    cache_frozen: bool | None = None
    """With trainable = "last": keep the frozen layers' output in memory (2 H bytes a token). None:
    in a run of one process."""
    lora_rank: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """None = 2 lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Annotated[float, Field(gt=0)] = 2.0
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """None = learning_rate."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    batch_tokens: Annotated[int, Field(ge=64)] = 16_384
    """Tokens of one packed micro batch on one device, at most."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """An optimizer step takes up to accumulation x batch_tokens tokens, over all processes."""
    batch_sequences: Annotated[int, Field(ge=1)] | None = None
    """Sequences of an optimizer step over all processes, instead of `accumulation`."""
    max_tokens: Annotated[int, Field(ge=2)] = 8192
    """Longer sequences are dropped and counted, never cut."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """How often an epoch sees a file (by path or name): 0.5 half of it, 2 all of it twice."""
    max_prompts: Annotated[int, Field(ge=1)] | None = None
    """Training prompts to use; a smaller number is part of a larger one's."""
    max_per_prompt: Annotated[int, Field(ge=1)] | None = None
    """Completions of each."""
    grouped: bool = False
    """Keep a prompt's completions in one batch (ablation)."""
    share_prompts: bool = False
    """Compute a prompt once for all its completions of a batch; implies grouped."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the backbone's products; weights, optimizer and head are fp32. auto: bf16 where fast."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the layers with torch.compile: a minute at the start, much faster on a GPU."""
    liger: bool = False
    """Liger's fused kernels (package liger-kernel)."""
    evals: Annotated[int, Field(ge=1)] = 4
    """Evaluations over the run, besides the one before the first step."""
    best_metric: str | None = None
    """Keep the model of the evaluation where this was least, e.g. `loss`, `prompt_mre`; None: the
    last."""
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.init_from is not None:
            own = {"backbone", "head", "gamma", "num_layers"}
            if given := own & self.model_fields_set:
                raise ValueError(
                    f"init_from brings its own {', '.join(sorted(given))}; leave that out"
                )
            if self.trainable == "dora":
                raise ValueError("init_from goes with trainable = 'full', 'lora', 'last', 'head'")
            of_adapter = {"lora_rank", "lora_alpha", "lora_dropout"} & self.model_fields_set
            if self.trainable == "lora" and of_adapter:
                names = ", ".join(sorted(of_adapter))
                raise ValueError(f"init_from brings its own {names}; leave that out")
        given = self.model_fields_set
        if self.trainable != "last" and given & {"last_layers", "cache_frozen"}:
            raise ValueError("last_layers and cache_frozen need trainable = 'last'")
        if self.batch_sequences is not None and "accumulation" in given:
            raise ValueError("give batch_sequences or accumulation, not both")
        if self.control_input and self.share_prompts:
            raise ValueError("control_input gives one prompt several forms: no share_prompts")
        if self.control_input and self.init_from is not None:
            raise ValueError("init_from brings its own control_input; leave that out")
        if self.share_prompts and self.cache_frozen:
            raise ValueError("share_prompts does not go with cache_frozen")
        return self

    @property
    def endless(self) -> str:
        """What makes a completion count as one that never ends; empty: nothing does."""
        names = ("loops_above", "rewards_below")
        given = [(name, getattr(self, name)) for name in names]
        return ", ".join(f"{name} = {value}" for name, value in given if value is not None)

    def objective(self, longest: int) -> Objective:
        """The loss. longest: completion of the training data, tokens."""
        return Objective(
            target=self.target,
            loss=self.loss,
            relative=self.relative,
            aggregation=self.aggregation,
            censoring=self.censoring,
            lambda_=self.td_lambda,
            include_eos=self.include_eos,
            smoothing=self.smoothing,
            prompt_weight=self.prompt_weight,
            huber_delta=self.huber_delta,
            length_scale=float(longest),
        )

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "TrainingConfig":
        """From a dict. Raises InputError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(_describe(error, cls.model_json_schema()["properties"])) from None

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


def _describe(error: ValidationError, options: dict[str, Any]) -> str:
    """The first problem: what was got and what is allowed. options: their JSON schemas."""
    first = error.errors()[0]
    if not first["loc"]:
        return str(first.get("ctx", {}).get("error", first["msg"]))
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{name} is missing; {MISSING.get(name, 'it has no default')}"
    if first["type"] == "extra_forbidden":
        near = get_close_matches(name, options, n=3, cutoff=0.6)
        advice = f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(options)}"
        return f"there is no option {name}; {advice}"
    where, schema = name, options[name]
    inner = schema.get("additionalProperties", schema.get("items"))
    if inner is not None and len(first["loc"]) > 1:
        where, schema = f"{name}.{first['loc'][1]}", inner
    return f"{where} is {first['input']!r}; allowed: {_describe_allowed(schema)}"


def _describe_allowed(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        kinds = [s for s in schema["anyOf"] if s.get("type") != "null"]
        return " or ".join(_describe_allowed(kind) for kind in kinds)
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return ", ".join(repr(value) for value in schema["enum"])
    names = {"number": "a number", "integer": "a whole number", "boolean": "true or false"}
    names |= {"string": "a text", "object": "a table", "array": "a list that is not empty"}
    limits = {
        "exclusiveMinimum": "over",
        "minimum": "from",
        "exclusiveMaximum": "under",
        "maximum": "up to",
    }
    told = [f"{word} {schema[key]}" for key, word in limits.items() if key in schema]
    return " ".join([names[schema["type"]], " and ".join(told)]).strip()
