"""A configuration as a list of commands: pure, so that a dry run shows what a run does."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenvm.errors import InputError
from lenvm.pipeline.config import (
    ConvertStage,
    DownloadStage,
    EvaluateStage,
    PipelineConfig,
    SampleStage,
    TrainStage,
)

OPERATIONAL = frozenset(
    ("concurrency", "per_request", "retries", "patience", "timeout", "timeout_s", "device")
)
"""Options that say how fast, not what: they may change between a run and its continuation."""
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".toml")
READS_TRAJECTORIES = ("length-prediction", "length-tokens")
GENERATES = ("lifebench", "tradeoff")


@dataclass(frozen=True)
class Node:
    """This machine among those that share a run (and its folder)."""

    rank: int = 0
    count: int = 1
    head: str = "127.0.0.1"
    """Address of machine 0."""
    port: int = 29500
    """Where training processes meet on it."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise InputError(f"node {self.rank} of {self.count}: from 0, below the number of nodes")


@dataclass(frozen=True)
class Command:
    """One stage on one machine."""

    name: str
    """Of the stage: `sample-math`, `train`, `evaluate-lifebench`, ..."""
    arguments: tuple[str, ...]
    """Of `lenvm`: what is checked before anything runs."""
    config: Mapping[str, Any]
    """What the stage's product depends on: a continued run must agree."""
    launcher: tuple[str, ...] = ()
    """What starts lenvm in place of Python itself."""
    server: str | None = None
    inputs: tuple[str, ...] = ()
    """Stages whose products this one reads."""
    reads: tuple[str, ...] = ()
    """Files, or names of data sets, that were there before the run."""
    everywhere: bool = False
    """True: every machine runs it; else machine 0 alone, and the others wait."""
    output: Path | None = None
    max_failed: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def argv(self, endpoints: Sequence[str] = ()) -> list[str]:
        """The process to start. endpoints: of the stage's servers."""
        asked = endpoints if self.name.startswith("sample-") else endpoints[:1]
        extra = [part for url in asked for part in ("--endpoint", url)]
        launcher = self.launcher or (sys.executable,)
        return [*launcher, "-m", "lenvm", *self.arguments, *extra]


def plan(config: PipelineConfig, node: Node | None = None) -> list[Command]:
    """The commands of a run on this machine, in order. Raises InputError for a run of nothing."""
    node = node or Node()
    folder = Path(config.folder)
    commands = [_download(s, folder) for s in config.download]
    downloads = tuple(c.name for c in commands)
    commands += [_convert(s, folder, downloads) for s in config.convert]
    commands += [_sample(s, config, folder, node) for s in config.sample]
    sources = tuple(c.name for c in commands if c.name not in downloads)
    files = [*_sampled(config, folder, node), *(config.train.data if config.train else ())]
    if config.train is not None:
        if not files:
            raise InputError("nothing to train on: sample or convert something, or name train.data")
        commands.append(_train(config.train, config, folder, node, files, sources))
    made = (*downloads, *sources, *(["train"] if config.train else ()))
    commands += [_evaluate(s, config, folder, files, made) for s in config.evaluate]
    if config.report is not None:
        commands.append(_report(config, folder))
    if not commands:
        raise InputError("the pipeline has no stage: sample, train, evaluate, report, ...")
    return commands


def value_model(config: PipelineConfig) -> str | None:
    """The checkpoint that evaluations read."""
    trained = str(Path(config.folder) / "model") if config.train is not None else None
    return config.value_model or trained


def to_flags(options: Mapping[str, Any]) -> list[str]:
    """Options of a table as flags: lists repeat, tables are JSON, true stands alone."""
    flags: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                flags.append(flag if item else f"--no-{flag[2:]}")
            elif isinstance(item, Mapping):
                flags += [flag, json.dumps(item)]
            else:
                flags += [flag, str(item)]
    return flags


def find_missing(commands: Sequence[Command], folder: Path) -> list[str]:
    """Files that stages read, that are not there, and that no stage makes (in `folder`)."""
    return [
        f"{command.name}: {name}"
        for command in commands
        for name in command.reads
        if Path(name).suffix in FILE_SUFFIXES
        and not Path(name).exists()
        and not Path(name).absolute().is_relative_to(folder.absolute())
    ]


def hash_inputs(paths: Sequence[str]) -> dict[str, str]:
    """First 16 hex digits of the SHA-256 of those paths that are files."""
    found = {}
    for path in map(Path, paths):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return found


def _download(stage: DownloadStage, folder: Path) -> Command:
    options = {"output": str(folder / "downloads" / stage.name), **stage.options}
    return Command(
        f"download-{stage.name}",
        ("download", stage.repo, *to_flags(options)),
        {"repo": stage.repo, **options},
        environment=stage.environment,
    )


def _convert(stage: ConvertStage, folder: Path, inputs: tuple[str, ...]) -> Command:
    output = _trajectories(folder, stage.name)
    return Command(
        f"convert-{stage.name}",
        ("convert", *stage.files, "--output", str(output), *to_flags(stage.options)),
        {"files": stage.files, **stage.options},
        inputs=inputs,
        reads=tuple(stage.files),
        output=output,
        environment=stage.environment,
    )


def _sample(stage: SampleStage, config: PipelineConfig, folder: Path, node: Node) -> Command:
    output = _trajectories(folder, stage.name, node.rank, node.count)
    options = dict(stage.options)
    if stage.server is None:
        options.setdefault("model", config.generator)
    if node.count > 1:
        options["shard"] = f"{node.rank}/{node.count}"
    server = config.servers[stage.server] if stage.server else None
    kept = {k: v for k, v in stage.options.items() if k not in OPERATIONAL}
    return Command(
        f"sample-{stage.name}",
        ("sample", stage.prompts, "--output", str(output), *to_flags(options)),
        {
            "prompts": stage.prompts,
            "prompt_files": hash_inputs([stage.prompts]),
            "model": (server.model if server else None) or config.generator,
            "machines": node.count,
            **kept,
        },
        server=stage.server,
        reads=(stage.prompts,),
        everywhere=True,
        output=output,
        max_failed=stage.max_failed,
        environment=stage.environment,
    )


def _train(
    stage: TrainStage,
    config: PipelineConfig,
    folder: Path,
    node: Node,
    files: list[str],
    inputs: tuple[str, ...],
) -> Command:
    if node.count > 1 and stage.launcher == "none":
        raise InputError("training on several machines needs train.launcher = 'torchrun'")
    options = {"backbone": config.generator, **stage.options}
    settings = [part for k, v in options.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    output = folder / "model"
    return Command(
        "train",
        ("train", *files, "--output", str(output), *settings),
        {"data": files, "data_files": hash_inputs(stage.data), **options},
        launcher=_launcher(stage, node),
        inputs=inputs,
        reads=tuple(stage.data),
        everywhere=True,
        output=output,
        environment=stage.environment,
    )


def _launcher(stage: TrainStage, node: Node) -> tuple[str, ...]:
    if stage.launcher == "none":
        return ()
    if stage.launcher == "torchrun":
        meet = ["--standalone", "--nnodes", "1"]
        if node.count > 1:
            meet = ["--nnodes", str(node.count), "--node-rank", str(node.rank)]
            meet += ["--master-addr", node.head, "--master-port", str(node.port)]
        parts = ["torch.distributed.run", *meet, "--nproc-per-node", str(stage.processes)]
    else:
        parts = ["accelerate.commands.launch", "--num_processes"]
        parts += [str(stage.processes * node.count), "--num_machines", str(node.count)]
        if node.count > 1:
            parts += ["--machine_rank", str(node.rank), "--main_process_ip", node.head]
            parts += ["--main_process_port", str(node.port)]
    return (sys.executable, "-m", *parts, *stage.launcher_arguments)


def _evaluate(
    stage: EvaluateStage,
    config: PipelineConfig,
    folder: Path,
    files: list[str],
    inputs: tuple[str, ...],
) -> Command:
    arguments, options = list(stage.arguments), dict(stage.options)
    if stage.evaluation in READS_TRAJECTORIES:
        arguments = arguments or files
    if not arguments:
        raise InputError(f"evaluate.{stage.name} has nothing to read: name its arguments")
    checkpoint = value_model(config)
    if stage.server is None and stage.evaluation != "scaling":
        if checkpoint is not None:
            options.setdefault("lenvm", checkpoint)
        if stage.evaluation in GENERATES:
            options.setdefault("model", config.generator)
    output = folder / "evaluations" / stage.name
    server = config.servers[stage.server] if stage.server else None
    return Command(
        f"evaluate-{stage.name}",
        ("eval", stage.evaluation, *arguments, "--output", str(output), *to_flags(options)),
        {
            "evaluation": stage.evaluation,
            "arguments": arguments,
            "argument_files": hash_inputs(stage.arguments),
            "server": server and {"model": server.model or config.generator, "lenvm": server.lenvm},
            **{k: v for k, v in options.items() if k not in OPERATIONAL},
        },
        server=stage.server,
        inputs=inputs,
        reads=tuple(stage.arguments),
        output=output,
        environment=stage.environment,
    )


def _report(config: PipelineConfig, folder: Path) -> Command:
    assert config.report is not None
    folders = [str(folder / "evaluations" / stage.name) for stage in config.evaluate]
    if not folders:
        raise InputError("a report needs evaluations")
    output = folder / "report.html"
    options = to_flags(config.report.options)
    return Command(
        "report",
        ("report", *folders, "--output", str(output), *options),
        {"evaluations": folders, **config.report.options},
        inputs=tuple(f"evaluate-{stage.name}" for stage in config.evaluate),
        output=output,
        environment=config.report.environment,
    )


def _sampled(config: PipelineConfig, folder: Path, node: Node) -> list[str]:
    """Every trajectory file that the run makes, on all machines."""
    converted = [str(_trajectories(folder, s.name)) for s in config.convert]
    return converted + [
        str(_trajectories(folder, s.name, rank, node.count))
        for s in config.sample
        for rank in range(node.count)
    ]


def _trajectories(folder: Path, name: str, rank: int = 0, count: int = 1) -> Path:
    part = f".{rank}-of-{count}" if count > 1 else ""
    return folder / "trajectories" / f"{name}{part}.jsonl"
