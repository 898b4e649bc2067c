"""Running a plan: stage after stage, each claimed by a manifest, with the servers that it needs.

A stage that is done is passed over; one that was killed runs again and its command goes on where it
stopped. What a stage's product depends on is in its manifest (`stages/NAME.manifest.json`): with
other settings, or another product of an earlier stage, the run is refused before anything starts.
Several machines share one folder: each runs the stages that are everyone's, machine 0 the others,
and all wait for one another by the marks `stages/NAME.done.json`.
"""

import fcntl
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.data.pool import failures_path
from lenvm.errors import DataError, EndpointError, InputError, StageError
from lenvm.files import claim, manifest_path, read_json, read_lines, write_json
from lenvm.pipeline import processes
from lenvm.pipeline.config import PipelineConfig
from lenvm.pipeline.plan import Command, Node, find_missing, plan
from lenvm.pipeline.servers import (
    HOST,
    RunningServers,
    Say,
    check_installed,
    server_argv,
    server_environment,
)

INCOMPLETE = EndpointError.exit_code
"""`lenvm sample` exits with it when completions failed for good."""


@dataclass(frozen=True)
class StageResult:
    """What became of one stage on this machine."""

    name: str
    seconds: float
    was_done: bool


def run_pipeline(
    config: PipelineConfig,
    *,
    node: Node | None = None,
    until: str | None = None,
    say: Say = lambda _: None,
) -> list[StageResult]:
    """Run what is missing, up to the stage `until`.

    Raises InputError for changed settings (before anything runs), StageError where a stage's
    command fails, EndpointError where a server does not come up, `processes.Interrupted` for a
    signal; whatever was started has ended then.
    """
    node = node or Node()
    commands = select(plan(config, node), until)
    marks = _Marks(Path(config.folder) / "stages", node)
    with _alone(Path(config.folder), node), processes.raising_signals():
        for command in commands:
            marks.check(command)
        pending = [c for c in commands if not marks.is_done(c) and _runs_here(c, node)]
        if missing := find_missing(pending, Path(config.folder)):
            raise DataError("files that the run reads are not there:\n  " + "\n  ".join(missing))
        for name in {c.server for c in pending if c.server}:
            check_installed(name, config.servers[name])
        with _Pool(config, say) as pool:
            return [_run_stage(c, marks, pool, node, say) for c in commands]


def describe(config: PipelineConfig, node: Node | None = None, until: str | None = None) -> str:
    """The commands of a run, as a dry run prints them: they can be copied into a shell."""
    lines: list[str] = []
    before: str | None = None
    node = node or Node()
    for command in select(plan(config, node), until):
        if not _runs_here(command, node):
            lines.append(f"# {command.name}: machine 0 runs it, this one waits")
            continue
        if command.server is None:
            endpoints: list[str] = []
        else:
            own = config.servers[command.server]
            ports = [(own.port or 8000) + i for i in range(own.replicas)]
            endpoints = own.endpoints or [f"http://{HOST}:{port}/v1" for port in ports]
            if command.server != before and not own.endpoints:
                lines.append(f"# server {command.server}, until no stage asks it any more")
                lines += [
                    _join(server_argv(own, config.generator, port), server_environment(own, i))
                    + " &"
                    for i, port in enumerate(ports)
                ]
        before = command.server
        lines += [f"# {command.name}", _join(command.argv(endpoints), command.environment)]
    return "\n".join(lines)


def _join(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    assignments = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*assignments, shlex.join(_short(argv))])


def select(commands: list[Command], until: str | None) -> list[Command]:
    """The commands up to that stage. InputError for a name that is none."""
    if until is None:
        return commands
    names = [c.name for c in commands]
    last = [i for i, name in enumerate(names) if name == until or name.split("-")[0] == until]
    if not last:
        raise InputError(f"no stage {until!r}; the stages are {', '.join(names)}")
    return commands[: last[-1] + 1]


def _short(argv: Sequence[str]) -> list[str]:
    """`python -m lenvm` as users type it."""
    if list(argv[1:3]) == ["-m", "lenvm"]:
        return ["lenvm", *argv[3:]]
    return ["python", *argv[1:]] if argv[1:2] == ["-m"] else list(argv)


def _runs_here(command: Command, node: Node) -> bool:
    return command.everywhere or node.rank == 0


def _run_stage(
    command: Command, marks: "_Marks", pool: "_Pool", node: Node, say: Say
) -> StageResult:
    if marks.is_done(command) or not _runs_here(command, node):
        pool.keep(None)
        marks.wait(command, say)
        say(f"{command.name}: done" + ("" if _runs_here(command, node) else " by machine 0"))
        return StageResult(command.name, 0.0, was_done=True)
    marks.claim(command)
    begun = time.monotonic()
    servers = pool.keep(command.server)
    argv = command.argv(servers.endpoints if servers else ())
    say(f"{command.name}: {shlex.join(_short(argv))}")
    code = processes.wait(processes.start(argv, command.environment))
    failed = _read_failures(command, code)
    if code not in (0, INCOMPLETE if failed is not None else 0):
        raise StageError(
            f"{command.name} failed with exit code {code}; its own message is above. Mend it and "
            f"run the same command: what was finished is kept" + pool.describe_dead()
        )
    seconds = time.monotonic() - begun
    marks.write(command, argv, seconds, failed)
    marks.wait(command, say)
    return StageResult(command.name, seconds, was_done=False)


def _read_failures(command: Command, code: int) -> int | None:
    """Failed completions of a sampling that ended with some; StageError for more than allowed."""
    if code != INCOMPLETE or command.output is None or not command.name.startswith("sample-"):
        return None
    failures = failures_path(command.output)
    if not failures.exists() or not command.output.exists():
        return None
    failed = sum(1 for _ in read_lines(failures))
    total = failed + sum(1 for _ in read_lines(command.output))
    if failed > command.max_failed * total:
        raise StageError(
            f"{command.name}: {failed} of {total} completions failed, more than max_failed = "
            f"{command.max_failed:g} allows; {failures} says why. Run the same command to try them "
            "again, or allow more"
        )
    return failed


class _Marks:
    """The manifests and done marks of stages, of all machines."""

    def __init__(self, folder: Path, node: Node) -> None:
        self.folder, self.node = folder, node

    def is_done(self, command: Command) -> bool:
        return self._path(command.name, self.node.rank).exists()

    def check(self, command: Command) -> None:
        """InputError where the stage was begun or done with other settings or inputs."""
        product = self.folder / command.name
        if manifest_path(product).exists():
            claim(product, self._kind(command), self._config(command))
        if self.is_done(command) and command.output and not command.output.exists():
            raise InputError(
                f"{command.name} is marked as done, but {command.output} is gone; to make it again "
                f"delete {self.folder / command.name}.*"
            )

    def claim(self, command: Command) -> None:
        claim(self.folder / command.name, self._kind(command), self._config(command))

    def write(
        self, command: Command, argv: Sequence[str], seconds: float, failed: int | None
    ) -> None:
        mark = {
            "schema": "lenvm.stage/1",
            "product_id": secrets.token_hex(6),
            "command": shlex.join(argv),
            "seconds": round(seconds, 3),
            **({} if failed is None else {"num_failed": failed}),
        }
        write_json(self._path(command.name, self.node.rank), mark)

    def wait(self, command: Command, say: Say) -> None:
        """Until every machine that runs the stage is done with it."""
        ranks = range(self.node.count) if command.everywhere else range(1)
        missing = [r for r in ranks if not self._path(command.name, r).exists()]
        if missing:
            say(f"{command.name}: waiting for machines {', '.join(map(str, missing))}")
        while any(not self._path(command.name, r).exists() for r in missing):
            time.sleep(0.5)

    def _kind(self, command: Command) -> str:
        return f"pipeline.{command.name}"

    def _config(self, command: Command) -> dict[str, Any]:
        inputs = {f"product of {name}": self._product(name) for name in command.inputs}
        return {**command.config, **inputs}

    def _product(self, name: str) -> str | None:
        """What tells an earlier stage's product from another one of the same settings."""
        path = self._path(name, 0)
        return read_json(path)["product_id"] if path.exists() else None

    def _path(self, name: str, rank: int) -> Path:
        part = f".machine{rank}" if rank else ""
        return self.folder / f"{name}{part}.done.json"


class _Pool:
    """At most one kind of server at a time: training and other models need its memory."""

    def __init__(self, config: PipelineConfig, say: Say) -> None:
        self.config, self.say = config, say
        self.running: RunningServers | None = None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.keep(None)

    def keep(self, name: str | None) -> RunningServers | None:
        """The server `name`, started if need be; every other one is stopped."""
        if self.running is not None and self.running.name != name:
            running, self.running = self.running, None
            self.say(f"server {running.name}: stopping")
            running.stop()
        if name is not None and self.running is None:
            servers = RunningServers(
                name,
                self.config.servers[name],
                self.config.generator,
                Path(self.config.folder) / "logs",
            )
            servers.start(self.say)
            self.running = servers
        return self.running

    def describe_dead(self) -> str:
        return self.running.describe_dead() if self.running else ""


@contextmanager
def _alone(folder: Path, node: Node) -> Iterator[None]:
    """One run at a time on this machine's part of the folder."""
    path = folder / f".run.{node.rank}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder} is being run by another process; wait for it") from None
        yield


Check = Callable[[Sequence[str], str], None]
"""Raises InputError for arguments that `lenvm` does not take; the second names the stage."""


def check_commands(config: PipelineConfig, node: Node, check: Check) -> None:
    """Every stage's arguments, before anything runs. Raises InputError as `check` does."""
    for command in plan(config, node):
        check(command.arguments, command.name)
    if config.train is not None:
        from lenvm.training.config import TrainingConfig

        values = {"data": ["-"], "output": "-", "backbone": config.generator}
        try:
            TrainingConfig.parse({**values, **config.train.options})
        except InputError as error:
            raise InputError(f"train: {error}") from None
