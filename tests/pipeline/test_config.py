from pathlib import Path

import pytest

from lenvm.cli.run import check_arguments
from lenvm.errors import DataError, InputError
from lenvm.pipeline.config import PipelineConfig
from lenvm.pipeline.plan import Node
from lenvm.pipeline.run import check_commands

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
TEXT = """
folder = "runs/x"
generator = "m"
[servers.s]
engine = "command"
command = ["serve", "{port}"]
environment = {WHERE = "{folder}/w"}
[[sample]]
name = "math"
prompts = "bundled"
server = "s"
max_tokens = 9
[train]
epochs = 3
"""


def load(tmp_path: Path, *overrides: str, text: str = TEXT) -> PipelineConfig:
    (tmp_path / "p.toml").write_text(text)
    return PipelineConfig.load(tmp_path / "p.toml", overrides)


def test_defaults_are_below_the_file_and_the_file_below_overrides(tmp_path: Path):
    config = load(tmp_path)
    assert config.servers["s"].replicas == 1
    assert config.sample[0].options == {"max_tokens": 9}
    assert config.train is not None
    assert config.train.options == {"epochs": 3}
    changed = load(
        tmp_path,
        "train.epochs=0.5",
        "sample.math.max_tokens=7",
        "sample.math.where=['a=b']",
        "servers.s.replicas=2",
        "generator=other/model",
        "report.title=Mine",
        "folder=/tmp/y",
    )
    assert changed.train is not None
    assert changed.train.options == {"epochs": 0.5}
    assert changed.sample[0].options == {"max_tokens": 7, "where": ["a=b"]}
    assert changed.servers["s"].replicas == 2
    assert changed.generator == "other/model"
    assert changed.report is not None
    assert changed.report.options == {"title": "Mine"}
    assert changed.servers["s"].environment == {"WHERE": "/tmp/y/w"}
    assert changed.servers["s"].command == ["serve", "{port}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "expected key=value"),
        ("sample.limit=3", r"sample is a list; name its entry, such as sample\.math\.limit"),
        ("sample.code.limit=3", "no entry is named 'code'; there are math"),
        ("folder.x=3", "folder is 'runs/x', not a table"),
        ("servers.s.engine=tgi", r"servers\.s\.engine: Input should be 'vllm', 'sglang'"),
        ("servers.s.command=[]", "command is for engine = 'command', and needed there"),
        ("servers.s.lenvm=x", "lenvm is for servers that the pipeline starts"),
        ("servers.s.port=0", r"servers\.s\.port: Input should be greater"),
        ("sample.math.server=t", "math asks server 't'; known: s"),
        ("sample.math.name='a b'", r"sample\.0\.name: String should match"),
        ("train.processes=2", "several processes need launcher"),
        ("colour=1", "colour: Extra inputs are not permitted"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, override: str, message: str):
    with pytest.raises(InputError, match=message):
        load(tmp_path, override)


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(DataError, match="no pipeline"):
        PipelineConfig.load(tmp_path / "none.toml")
    with pytest.raises(DataError, match="not TOML"):
        load(tmp_path, text="a = = 3")
    twice = TEXT + '[[sample]]\nname = "math"\nprompts = "bundled"\n'
    with pytest.raises(InputError, match="the same name: math, math"):
        load(tmp_path, text=twice)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sample.math.lmit=5", "sample-math: No such option: --lmit"),
        ("sample.math.n=0", "sample-math: .*--n.*greater than or equal to 1"),
        ("train.epoch=5", r"train: there is no option epoch; did you mean epochs\?"),
        ("train.epochs=-1", "train: epochs is -1; allowed: a number over 0"),
    ],
)
def test_options_of_the_commands_are_checked_before_anything_runs(
    tmp_path: Path, override: str, message: str
):
    with pytest.raises(InputError, match=message):
        check_commands(load(tmp_path, override), Node(), check_arguments)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_one_that_lenvm_takes(path: Path):
    config = PipelineConfig.load(path)
    check_commands(config, Node(), check_arguments)
    if config.train is not None and config.train.launcher == "torchrun":
        check_commands(config, Node(1, 2, "node0"), check_arguments)
