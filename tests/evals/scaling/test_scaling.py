"""The grid: cells, subsets, resuming, failures, seeds; and a real tiny training."""

from pathlib import Path

import pytest

from evals.prediction.test_prediction import write
from lenvm.cli._eval_scaling import format_seeds
from lenvm.data.trajectory import read_trajectories
from lenvm.errors import DataError, InputError, TrainingError
from lenvm.evals.scaling.grid import DEFAULT_HEAD, SUBSET_KEYS, load_grid
from lenvm.evals.scaling.run import run_grid
from lenvm.evals.scaling.subset import write_subset
from lenvm.training.config import TrainingConfig

GRID = """
[base]
data = ["{data}"]
head = "scalar"
epochs = 2

[axes]
gamma = [0.9, 0.99]
num_prompts = [2, 4]
seed = [0, 1]
"""


@pytest.fixture
def data(tmp_path):
    rows = [(i, "m", "train", 10 + i, "stop") for i in range(6) for _ in range(3)]
    return write(tmp_path / "t.jsonl", [*rows, (9, "m", "validation", 9, "stop")])


def grid(tmp_path, text):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return load_grid(path)


def test_a_product_has_every_combination(tmp_path, data):
    cells = grid(tmp_path, GRID.replace("{data}", str(data))).cells()
    assert len(cells) == 8
    assert len({c.id for c in cells}) == 8
    assert dict(cells[0].axes) == {"gamma": 0.9, "num_prompts": 2, "seed": 0}
    assert cells[0].settings["epochs"] == 2
    assert cells[-1].settings["gamma"] == 0.99


def test_an_ablation_changes_one_axis_at_a_time(tmp_path):
    text = 'design = "ablation"\nbase = {head = "scalar"}\n'
    text += "[axes]\ngamma = [0.9, 0.99, 0.999]\ngrouped = [false, true]\n"
    cells = grid(tmp_path, text).cells()
    assert [tuple(c.axes.values()) for c in cells] == [
        (0.9, False),
        (0.99, False),
        (0.999, False),
        (0.9, True),
    ]
    with_seeds = grid(tmp_path, text + "seed = [0, 1]\n").cells()
    assert len(with_seeds) == 8


def test_an_axis_of_tables_sets_several_options(tmp_path):
    text = '[[axes.model]]\nlabel = "small"\nbackbone = "a"\nlast_layers = 2\n'
    (cell,) = grid(tmp_path, text).cells()
    assert dict(cell.axes) == {"model": "small"}
    assert dict(cell.settings) == {"backbone": "a", "last_layers": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[axes\n", "not TOML"),
        ("[base]\n", "no .axes."),
        ("[axes]\ngamma = 0.9\n", "list of values"),
        ("[axes]\ngamma = []\n", "list of values"),
        ("[axes]\ngamma = [0.9, 0.9]\n", "twice"),
        ("[[axes.model]]\nbackbone = 'a'\n", "label"),
        ("design = 'random'\n[axes]\ngamma = [0.9]\n", "design is 'random'"),
        ("cells = 3\n[axes]\ngamma = [0.9]\n", "unknown"),
        ("design = 'ablation'\n[axes]\nseed = [0]\n", "another axis"),
    ],
)
def test_grids_that_cannot_be_are_refused(tmp_path, text, message):
    with pytest.raises((DataError, InputError), match=message):
        grid(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "[axes]\ngamma = ['auto', 0.99]\n",
        "design = 'ablation'\n[axes]\ngamma = [0.9, 0.99]\ngrouped = [false, true]\n",
        "[axes]\ngamma = [0.9, 0.99]\nhead = ['scalar', 'distribution']\n",
        "[[axes.model]]\nlabel = 'a'\ngamma = 0.9\n[[axes.model]]\nlabel = 'b'\n",
    ],
)
def test_gammas_of_a_distribution_head_are_refused_as_its_loss_has_none(tmp_path, text):
    with pytest.raises(InputError, match=r'gamma alone .* head = "scalar"'):
        grid(tmp_path, text)
    assert TrainingConfig.model_fields["head"].default == DEFAULT_HEAD


def test_gammas_may_differ_where_something_else_does(tmp_path):
    text = "[axes]\nhead = ['scalar']\ngamma = [0.9, 0.99]\n"
    assert len(grid(tmp_path, text).cells()) == 2
    text = "[[axes.head]]\nlabel = 'd'\n[[axes.head]]\nlabel = 's'\nhead = 'scalar'\ngamma = 0.9\n"
    assert len(grid(tmp_path, text).cells()) == 2


def test_the_grid_of_the_docs_trains_different_models(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    text = page.partition("```toml\n")[2].partition("```")[0]
    cells = grid(tmp_path, text).cells()
    assert {c.settings["head"] for c in cells} == {"scalar"}
    for cell in cells:
        options = {k: v for k, v in cell.settings.items() if k not in SUBSET_KEYS}
        TrainingConfig.parse({**options, "output": "m"})


def test_a_missing_grid_is_said(tmp_path):
    with pytest.raises(DataError, match="no grid file"):
        load_grid(tmp_path / "none.toml")


def test_subsets_are_nested_and_leave_other_splits_whole(tmp_path, data):
    small = write_subset([data], tmp_path / "s.jsonl", num_prompts=2, completions=1)
    large = write_subset([data], tmp_path / "l.jsonl", num_prompts=4)
    one, two = list(read_trajectories(small)), list(read_trajectories(large))
    assert len(one) == 3
    assert len(two) == 13
    assert {t.prompt_hash for t in one} < {t.prompt_hash for t in two}
    assert [t.split for t in one].count("validation") == 1
    with pytest.raises(DataError, match="the files hold 6"):
        write_subset([data], tmp_path / "x.jsonl", num_prompts=7)
    with pytest.raises(DataError, match="have fewer"):
        write_subset([data], tmp_path / "y.jsonl", completions=4)
    assert not (tmp_path / "y.jsonl").exists()


def test_a_subset_of_completions_is_not_the_first_of_the_file(tmp_path):
    """A sampler's file has the answers in the order in which they ended."""
    rows = [(i, "m", "train", n, "stop") for i in range(40) for n in range(1, 17)]
    data = write(tmp_path / "t.jsonl", rows)
    few, more = (
        list(read_trajectories(write_subset([data], tmp_path / f"{k}.jsonl", completions=k)))
        for k in (2, 4)
    )
    lengths = [len(t.completion_token_ids) for t in few]
    assert sum(lengths) / len(lengths) == pytest.approx(8.5, abs=1.5)
    assert {t.id for t in few} < {t.id for t in more}


def test_a_grid_runs_every_cell_once_and_averages_its_seeds(tmp_path, data):
    cells = grid(tmp_path, GRID.replace("{data}", str(data)))
    seen = []

    def run_cell(settings, folder):
        seen.append((settings["gamma"], settings["seed"], folder.name))
        assert "num_prompts" not in settings
        prompts = {t.prompt_hash for t in read_trajectories(*map(Path, settings["data"]))}
        return {"loss": settings["gamma"] + settings["seed"], "prompts": len(prompts) - 1}

    summary = run_grid(cells, tmp_path / "out", run_cell)
    assert len(seen) == len(set(seen)) == 8
    assert summary["axes"] == {"gamma": [0.9, 0.99], "num_prompts": [2, 4]}
    assert summary["metrics"] == ["loss", "prompts"]
    assert len(summary["cells"]) == 4
    first = summary["cells"][0]
    assert first["axes"] == {"gamma": 0.9, "num_prompts": 2}
    assert first["num_seeds"] == 2
    assert first["metrics"]["loss"]["value"] == pytest.approx(1.4)
    loss = first["metrics"]["loss"]
    assert (loss["low"], loss["high"]) == (None, None)  # of two seeds
    assert (loss["least"], loss["greatest"]) == (pytest.approx(0.9), pytest.approx(1.9))
    assert format_seeds(loss, 2) == "1.4000 (0.9000 to 1.9000)"
    assert format_seeds({**loss, "low": 1.0, "high": 1.8}, 5) == "1.4000 [1.0000, 1.8000]"
    assert format_seeds(None, 2) == "-"
    assert first["metrics"]["prompts"]["value"] == 2
    assert run_grid(cells, tmp_path / "out", run_cell) == summary
    assert len(seen) == 8


def test_an_interrupted_grid_continues_and_failures_are_tried_again(tmp_path, data):
    cells = grid(tmp_path, GRID.replace("{data}", str(data)))
    calls = []

    def stops(settings, folder):
        calls.append(folder)
        if len(calls) == 3:
            raise TrainingError("the loss is nan")
        if len(calls) == 5:
            raise KeyboardInterrupt
        return {"loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run_grid(cells, tmp_path / "out", stops)
    rest = []
    summary = run_grid(cells, tmp_path / "out", lambda s, f: rest.append(f) or {"loss": 1.0})
    assert len(rest) == 5
    assert rest[0] == calls[2]
    assert summary["num_failed"] == 0


def test_failures_are_counted_and_said(tmp_path, data):
    cells = grid(tmp_path, GRID.replace("{data}", str(data)))

    def fails(settings, folder):
        if settings["gamma"] == 0.9:
            raise TrainingError("the loss is nan")
        return {"loss": 1.0}

    summary = run_grid(cells, tmp_path / "out", fails)
    assert summary["num_failed"] == 4
    assert "the loss is nan" in summary["notes"][0]
    assert len(summary["cells"]) == 2


def test_another_grid_in_an_old_folder_is_refused(tmp_path, data):
    text = GRID.replace("{data}", str(data))
    run_grid(grid(tmp_path, text), tmp_path / "out", lambda s, f: {})
    with pytest.raises(InputError, match="axes"):
        run_grid(grid(tmp_path, text.replace("0.99", "0.98")), tmp_path / "out", lambda s, f: {})
