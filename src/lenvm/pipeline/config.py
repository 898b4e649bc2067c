"""What `lenvm run` reads: a TOML file of stages and servers. Defaults < TOML < `key=value`.

A stage's table holds the pipeline's own settings, listed here, and any option of the command that
the stage runs (`max_tokens = 512` is `--max-tokens 512`). `{folder}` in a text is the run's folder.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lenvm.errors import DataError, InputError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
Environment = dict[str, str]


class ServerConfig(BaseModel):
    """Servers that stages ask. Started before the first stage that names them, stopped after."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["vllm", "sglang", "lenvm", "command", "running"]
    """`vllm serve`, `python -m sglang.launch_server`, `lenvm serve`; `command` names its own;
    `running` is somebody else's at `endpoints`, and left alone."""
    model: str | None = None
    """Default: the run's generator."""
    lenvm: str | None = None
    """A value model that guides: vLLM and SGLang are then started through `lenvm serve`."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Servers of this kind on each machine; requests are spread over them."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """Of each replica (tensor parallel); 0 leaves the devices as they are."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Of the first replica, the others follow; None takes free ones."""
    arguments: list[str] = Field(default_factory=list)
    """Further arguments of the engine's command."""
    command: list[str] = Field(default_factory=list)
    """With engine `command`: what to start; `{port}` and `{model}` are filled in."""
    endpoints: list[str] = Field(default_factory=list)
    """With engine `running`: http://HOST:PORT/v1, one or several."""
    environment: Environment = Field(default_factory=dict)
    ready_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long a server may take until it answers."""

    @model_validator(mode="after")
    def _fits_engine(self) -> Self:
        for field, engine in (("command", "command"), ("endpoints", "running")):
            if bool(getattr(self, field)) != (self.engine == engine):
                raise ValueError(f"{field} is for engine = '{engine}', and needed there")
        if self.lenvm and self.engine in ("command", "running"):
            raise ValueError("lenvm is for servers that the pipeline starts with an engine")
        return self


class Stage(BaseModel):
    """What all stages have; every other key is an option of the stage's command."""

    model_config = ConfigDict(frozen=True, extra="allow")

    environment: Environment = Field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are the command's."""
        return dict(self.model_extra or {})


class DownloadStage(Stage):
    """`lenvm download`: published data or a checkpoint."""

    name: Name
    repo: str
    """A published name (`lenvm download` lists them), or OWNER/NAME."""


class ConvertStage(Stage):
    """`lenvm convert`: published files into trajectories that train and evaluate."""

    name: Name
    files: list[str] = Field(min_length=1)


class SampleStage(Stage):
    """`lenvm sample`: every machine samples its part of the prompts."""

    name: Name
    prompts: str
    """A prompt file, a known set (`lenvm prompts` lists them), or `bundled`."""
    server: str | None = None
    """None: the engine in the command's own process."""
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the completions that may fail for good; more ends the run."""


class TrainStage(Stage):
    """`lenvm train`; the options are those of docs/training.md."""

    data: list[str] = Field(default_factory=list)
    """Trajectory files besides those that this run samples and converts."""
    launcher: Literal["none", "torchrun", "accelerate"] = "none"
    processes: Annotated[int, Field(ge=1)] = 1
    """On each machine; more than one, or more machines, need a launcher."""
    launcher_arguments: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_launcher(self) -> Self:
        if self.launcher == "none" and (self.processes > 1 or self.launcher_arguments):
            raise ValueError("several processes need launcher = 'torchrun' or 'accelerate'")
        return self


class EvaluateStage(Stage):
    """`lenvm eval EVALUATION`."""

    name: Name
    evaluation: Literal["length-prediction", "lifebench", "tradeoff", "length-tokens", "scaling"]
    arguments: list[str] = Field(default_factory=list)
    """What is evaluated on; default for the first and the fourth: the run's trajectories."""
    server: str | None = None
    """None: the engine in the command's own process, guided by the run's value model."""


class ReportStage(Stage):
    """`lenvm report` over all evaluations of the run."""


class PipelineConfig(BaseModel):
    """A run. Stages are done in this order, those of a list in theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    """Everything that the run makes is in here."""
    generator: str = "smollm2"
    """The model that is sampled, and that the value model starts from by default."""
    value_model: str | None = None
    """A checkpoint to evaluate where nothing is trained."""
    servers: dict[Name, ServerConfig] = Field(default_factory=dict)
    download: list[DownloadStage] = Field(default_factory=list)
    convert: list[ConvertStage] = Field(default_factory=list)
    sample: list[SampleStage] = Field(default_factory=list)
    train: TrainStage | None = None
    evaluate: list[EvaluateStage] = Field(default_factory=list)
    report: ReportStage | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        asked = {s.name: s.server for s in self.sample}
        asked |= {s.name: s.server for s in self.evaluate}
        for name, server in asked.items():
            if server is not None and server not in self.servers:
                known = ", ".join(self.servers) or "none"
                raise ValueError(f"{name} asks server {server!r}; known: {known}")
        trajectories = [s.name for s in self.convert] + [s.name for s in self.sample]
        evaluations = [s.name for s in self.evaluate]
        for names in ([s.name for s in self.download], trajectories, evaluations):
            if len(set(names)) < len(names):
                raise ValueError(f"two stages of one kind have the same name: {', '.join(names)}")
        return self

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "PipelineConfig":
        """A TOML file, then `key=value` overrides such as `train.epochs=1` or
        `sample.math.limit=10` (an entry of a list goes by its name). Raises DataError for a file
        that is no TOML, InputError for a setting that cannot be."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"no pipeline {path}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not TOML: {error}") from None
        for override in overrides:
            _apply(values, override)
        try:
            config = cls.model_validate(values)
            return cls.model_validate(_fill(values, folder=config.folder))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "pipeline"
            raise InputError(f"{path}: {where}: {first['msg']}") from None


def parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _apply(values: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in nested tables. InputError for a path that leads nowhere."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not last:
        raise InputError(f"override {override!r}: expected key=value, such as train.epochs=1")
    table: Any = values
    for key in parents:
        if isinstance(table, dict):
            table = table.setdefault(key, {})
        else:
            table = _entry(table, key, override)
        if not isinstance(table, dict | list):
            raise InputError(f"override {override!r}: {key} is {table!r}, not a table")
    if isinstance(table, list):
        raise InputError(
            f"override {override!r}: {parents[-1]} is a list; name its entry, such as "
            f"{parents[-1]}.{table[0].get('name', 0) if table else 'NAME'}.{last}=..."
        )
    table[last] = parse_value(text)


def _entry(entries: list[Any], key: str, override: str) -> Any:
    found = [e for e in entries if isinstance(e, dict) and e.get("name") == key]
    if not found:
        names = ", ".join(str(e.get("name")) for e in entries if isinstance(e, dict))
        raise InputError(f"override {override!r}: no entry is named {key!r}; there are {names}")
    return found[0]


def _fill(value: Any, **names: str) -> Any:
    """The value with `{name}` replaced in all its texts."""
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(f"{{{name}}}", text)
        return value
    if isinstance(value, Mapping):
        return {k: _fill(v, **names) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill(v, **names) for v in value]
    return value
