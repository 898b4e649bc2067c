import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers.models import WordLevel

from lenvm.data.dataset import Sequences, TokenStore
from lenvm.data.packing import pack
from lenvm.data.trajectory import Trajectory
from lenvm.errors import CheckpointError, DataError, DataWarning, InputError, TrainingError
from lenvm.guidance.request import LengthControl
from lenvm.guidance.scorer import CandidateScorer
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.value_model import LengthValueModel
from lenvm.training import loop
from lenvm.training.config import TrainingConfig
from lenvm.training.loop import COMPLETE, find_checkpoint
from lenvm.training.model import PackedModel, use_liger
from lenvm.training.objective import Objective, States
from lenvm.training.trainer import start_from_marginal, train
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer


def trajectory(i: int, length: int, split: str, **fields: object) -> Trajectory:
    """The second prompt token, and those of the completion, tell long from short."""
    values: dict[str, object] = {
        "schema": "lenvm.trajectory/1",
        "id": f"{i:016x}-0",
        "prompt_hash": f"{i:016x}",
        "sample_index": 0,
        "split": split,
        "prompt_text": "p",
        "prompt_token_ids": [4, 40 + length // 15, 40 + length // 15],
        "completion_token_ids": [8 + length // 15] * (length - 1) + [EOS],
        "completion_text": "",
        "finish_reason": "stop",
        "model": "tiny",
        **fields,
    }
    return Trajectory.model_validate(values)


def write_rows(path: Path, rows: list[Trajectory]) -> str:
    path.write_text("".join(json.dumps(t.to_json()) + "\n" for t in rows))
    return str(path)


def write_data(path: Path, num: int = 250) -> str:
    rows = [
        trajectory(i, 4 + 24 * (i % 2) + i % 3, "validation" if i % 5 == 0 else "train")
        for i in range(num)
    ]
    return write_rows(path, rows)


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_generator(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def config(tmp_path: Path, base: str, **fields: object) -> TrainingConfig:
    data = tmp_path / "t.jsonl"
    if not data.exists():
        write_data(data)
    values = {
        "data": [str(data)],
        "output": str(tmp_path / "model"),
        "backbone": base,
        "learning_rate": 4e-3,
        "batch_tokens": 256,
        "epochs": 6,
        **fields,
    }
    return TrainingConfig.parse(values)


def read_metrics(tmp_path: Path, name: str = "model") -> list[dict[str, object]]:
    return [json.loads(x) for x in (tmp_path / f"{name}.metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("head", ["scalar", "distribution"])
@pytest.mark.parametrize("trainable", ["full", "last", "lora", "dora", "head"])
def test_training_learns_and_saves_what_it_learned(
    tmp_path: Path, base: str, head: str, trainable: str
):
    fields: dict[str, object] = {"last_layers": 2} if trainable == "last" else {}
    if trainable != "full":
        fields["epochs"] = 2
    settings = config(tmp_path, base, head=head, trainable=trainable, **fields)
    result = train(settings)
    assert result.val_loss_last < result.val_loss_first
    assert train(settings) == result  # finished: returns at once
    model = LengthValueModel.from_pretrained(tmp_path / "model")
    assert model.config.generator == base
    assert mean_loss(model, tmp_path / "t.jsonl") == pytest.approx(result.val_loss_last, rel=2e-2)
    if trainable == "full":
        raw = torch.stack([r[-1] for r in model.read([[4, 40, 40], [4, 41, 41]])])
        lengths = model.belief(raw).length()
        assert lengths[0] < 12 < lengths[1]


def test_an_adapter_goes_on_learning_and_stays_an_adapter(tmp_path: Path, base: str):
    first = train(config(tmp_path, base, trainable="lora", lora_rank=4, epochs=2))
    more = {"trainable": "lora", "output": str(tmp_path / "more"), "epochs": 2}
    more |= {"data": [str(tmp_path / "t.jsonl")], "learning_rate": 4e-3, "batch_tokens": 256}
    start = f"{tmp_path / 'model'}@{base}"
    second = train(TrainingConfig.parse({**more, "init_from": start}))
    assert second.val_loss_first == pytest.approx(first.val_loss_last, rel=2e-2)
    assert second.val_loss_last < second.val_loss_first
    before, after = (
        json.loads((tmp_path / n / "lenvm.json").read_text()) for n in ("model", "more")
    )
    assert before == after
    assert json.loads((tmp_path / "more/adapter_config.json").read_text())["r"] == 4
    model = LengthValueModel.from_pretrained(tmp_path / "more")
    assert mean_loss(model, tmp_path / "t.jsonl") == pytest.approx(second.val_loss_last, rel=2e-2)
    shutil.copytree(tmp_path / "more", tmp_path / "model/guide")  # it does not learn along
    goes_on = {**more, "init_from": start, "output": str(tmp_path / "third"), "epochs": 0.1}
    train(TrainingConfig.parse(goes_on))
    assert LengthValueModel.from_pretrained(start).guide is not None
    assert not (tmp_path / "third/guide").exists()
    with pytest.raises(InputError, match="init_from brings its own lora_rank"):
        TrainingConfig.parse({**more, "init_from": start, "lora_rank": 8})
    train(config(tmp_path, base, output=str(tmp_path / "whole"), epochs=0.1))
    whole = {**more, "output": str(tmp_path / "none"), "init_from": str(tmp_path / "whole")}
    with pytest.raises(InputError, match="has no adapter to go on with"):
        train(TrainingConfig.parse(whole))
    with pytest.raises(CheckpointError, match="not a folder"):
        train(TrainingConfig.parse({**whole, "init_from": str(tmp_path / "nowhere")}))


def test_loops_are_learned_as_answers_that_never_end(tmp_path: Path, base: str):
    rows = []
    for i in range(250):
        split = "validation" if i % 5 == 0 else "train"
        ids = [12, 13] * 14 if i % 2 else [int(x) for x in np.random.default_rng(i).permutation(28)]
        ids = [20 + x if not i % 2 else x for x in ids]
        prompt = [4, 40 + i % 2, 40 + i % 2]
        rows.append(
            trajectory(i, 28, split, prompt_token_ids=prompt, completion_token_ids=[*ids, EOS])
        )
    write_rows(tmp_path / "t.jsonl", rows)
    result = train(config(tmp_path, base, loops_above=0.5, epochs=8))
    assert result.num_endless == 100
    only = write_rows(tmp_path / "loops.jsonl", rows[1::2])
    with pytest.raises(DataError, match=r"with loops_above = 0\.5 every train sequence"):
        train(config(tmp_path, base, loops_above=0.5, data=[only], output=str(tmp_path / "none")))
    model = LengthValueModel.from_pretrained(tmp_path / "model")
    assert model.config.loops
    raw = torch.stack([r[-1] for r in model.read([[4, 40, 40], [4, 41, 41]])])
    ends = model.belief(raw).log_interval(torch.tensor(1), torch.tensor(torch.inf)).exp()
    assert ends[0] > 0.9
    assert ends[1] < 0.1
    plain = {"output": str(tmp_path / "plain"), "epochs": 0.1}
    train(config(tmp_path, base, **plain))
    more = {**plain, "output": str(tmp_path / "more"), "init_from": plain["output"]}
    settings = {"data": [str(tmp_path / "t.jsonl")], "loops_above": 0.5, **more}
    with pytest.raises(InputError, match="loops_above"):
        train(TrainingConfig.parse(settings))


def test_wrong_answers_are_learned_as_ones_that_never_end(tmp_path: Path, base: str):
    rows = [
        trajectory(i, 12, "validation" if i % 5 == 0 else "train", reward=float(i % 2))
        for i in range(100)
    ]
    write_rows(tmp_path / "t.jsonl", rows)
    result = train(config(tmp_path, base, rewards_below=0.5, epochs=0.1))
    assert result.num_endless == 40
    assert LengthValueModel.from_pretrained(tmp_path / "model").config.loops


@pytest.mark.parametrize("trainable", ["full", "last", "lora"])
def test_the_first_layers_train_alone(tmp_path: Path, base: str, trainable: str):
    fields: dict[str, object] = {"last_layers": 1} if trainable == "last" else {}
    settings = config(tmp_path, base, trainable=trainable, num_layers=2, epochs=2, **fields)
    result = train(settings)
    model = LengthValueModel.from_pretrained(tmp_path / "model")
    assert model.backbone.config.num_hidden_layers == len(model.backbone.layers) == 2
    assert mean_loss(model, tmp_path / "t.jsonl") == pytest.approx(result.val_loss_last, rel=2e-2)


def mean_loss(model: LengthValueModel, data: Path) -> float:
    """Of the validation split, one sequence at a time."""
    sequences = Sequences.select([TokenStore.load(data)], "validation")
    packed, objective, total = PackedModel(model), Objective(), 0.0
    with torch.no_grad():
        for i in range(len(sequences)):
            batch = pack(sequences, [i])
            states = States.of(batch)
            raw = packed(batch)
            total += objective.sum(model.head, raw, states, model.config.gamma).item()
    return total / int(sequences.lengths.sum())


def test_last_layers_with_and_without_kept_hidden_states_agree(tmp_path: Path, base: str):
    results = [
        train(
            config(
                tmp_path,
                base,
                trainable="last",
                last_layers=2,
                cache_frozen=cached,
                output=str(tmp_path / f"model_{cached}"),
                epochs=2,
            )
        )
        for cached in (True, False)
    ]
    assert results[0].val_loss_last == pytest.approx(results[1].val_loss_last, rel=2e-2)
    assert results[0].val_loss_last < 0.9 * results[0].val_loss_first


@pytest.mark.parametrize(
    "fields",
    [
        {"target": "length", "loss": "huber", "huber_delta": 5.0},
        {"target": "normalized_length"},
        {"target": "log_length"},
        {"target": "length", "relative": True},
        {"loss": "bce", "include_eos": True},
        {"td_lambda": 0.9, "censoring": "bootstrap"},
        {"head": "distribution", "smoothing": 0.1, "censoring": "one_sided"},
        {"share_prompts": True, "gradient_checkpointing": True, "batch_sequences": 16},
        {"precision": "bf16", "head_learning_rate": 1e-3},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_options_train(tmp_path: Path, base: str, fields: dict[str, object]):
    settings = config(tmp_path, base, **{"head": "scalar", "epochs": 2, "evals": 1, **fields})
    result = train(settings)
    assert result.val_loss_last < result.val_loss_first


def test_accumulation_changes_nothing(tmp_path: Path, base: str):
    """The mean is that of the global batch, however it is cut into micro batches."""
    found = []
    for tokens in (64, 4096):
        name = f"model_{tokens}"
        settings = config(
            tmp_path,
            base,
            output=str(tmp_path / name),
            batch_tokens=tokens,
            batch_sequences=24,
            learning_rate=1e-3,
            precision="fp32",
            epochs=1,
        )
        train(settings)
        rows = [r for r in read_metrics(tmp_path, name) if "loss" in r]
        found.append(([r["loss"] for r in rows], [r["grad_norm"] for r in rows]))
    assert len(found[0][0]) > 5
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


@pytest.mark.parametrize("frozen", ["backbone", "head"])
def test_head_and_backbone_have_their_own_learning_rates(tmp_path: Path, base: str, frozen: str):
    """The part whose rate is next to nothing stays where it began; the other moves."""
    rates = {"learning_rate": 4e-3, "head_learning_rate": 4e-3}
    rates["learning_rate" if frozen == "backbone" else "head_learning_rate"] = 1e-12
    train(config(tmp_path, base, head="scalar", gamma=0.9, epochs=1, **rates))
    after = LengthValueModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.manual_seed(0)
    before = LengthValueModel.build(base, after.config, dtype=torch.float32)
    sequences = Sequences.select([TokenStore.load(tmp_path / "t.jsonl")], "train")
    start_from_marginal(before, sequences.lengths)
    moved = {"backbone": 0.0, "head": 0.0}
    for name, value in before.state_dict().items():
        change = (after.state_dict()[name] - value).abs().max().item()
        part = name.split(".")[0]
        moved[part] = max(moved[part], change)
    assert moved.pop(frozen) < 1e-6
    assert min(moved.values()) > 1e-3


def test_gamma_auto_gives_the_99th_percentile_a_return_of_99_percent(tmp_path: Path, base: str):
    result = train(config(tmp_path, base, epochs=1, evals=1, trainable="head"))
    store = Sequences.select([TokenStore.load(tmp_path / "t.jsonl")], "train")
    longest = sorted(store.lengths.tolist())[math.ceil(0.99 * len(store)) - 1]
    assert 1 - result.gamma**longest == pytest.approx(0.99, abs=1e-6)


def test_sequence_wise_means_warn(tmp_path: Path, base: str):
    with pytest.warns(UserWarning, match="App. E"):
        train(config(tmp_path, base, aggregation="sequence_mean", epochs=1))


def test_metrics_of_a_run(tmp_path: Path, base: str):
    rows = []
    for i in range(120):
        split = "validation" if i % 4 == 0 else "train"
        for sample in range(2):
            fields = {
                "sample_index": sample,
                "id": f"{i:016x}-{sample}",
                "domain": ("math", "code")[i % 3 == 0],
            }
            rows.append(trajectory(i, 4 + 24 * (i % 2) + sample, split, **fields))
    write_rows(tmp_path / "t.jsonl", rows)
    train(config(tmp_path, base, head="scalar", best_metric="prompt_mre"))
    found = [row for row in read_metrics(tmp_path) if "eval_loss" in row]
    first, last = found[0], found[-1]
    assert first["step"] == 0
    for name in ("mae", "rmse", "relative_error", "value_mae", "mae/math", "rmse/code"):
        assert 0 < last[f"eval_{name}"] < first[f"eval_{name}"]
    assert last["eval_prompt_mre"] == min(row["eval_prompt_mre"] for row in found)
    assert {f"eval_relative_error_at_{p}" for p in (0, 25, 50, 75)} <= last.keys()
    predicted, realised = zip(*last["eval_calibration"], strict=True)
    assert list(predicted) == sorted(predicted)
    assert abs(predicted[-1] - realised[-1]) < 12
    other = {"output": str(tmp_path / "b"), "epochs": 0.1}
    with pytest.raises(InputError, match=r"best_metric is 'colour'; allowed .*, prompt_mre, "):
        train(config(tmp_path, base, best_metric="colour", **other))
    assert not (tmp_path / "b.metrics.jsonl").exists()  # before anything is computed
    train(config(tmp_path, base, best_metric="mae/code", **other))  # the folder is still free


def test_a_metrics_file_holds_each_evaluation_once_and_nothing_that_misleads(
    tmp_path: Path, base: str
):
    result = train(config(tmp_path, base, epochs=2))
    rows = read_metrics(tmp_path)
    steps = [row["step"] for row in rows if "eval_loss" in row]
    assert len(steps) >= 4
    assert steps == sorted(set(steps))
    end = rows[-1]
    assert end.keys() == {"step", "train_seconds", "tokens_per_s"}
    assert 0 < end["train_seconds"] <= result.seconds
    best = config(tmp_path, base, epochs=2, best_metric="loss", output=str(tmp_path / "best"))
    result = train(best)
    rows = [row for row in read_metrics(tmp_path, "best") if "eval_loss" in row]
    assert result.val_loss_last == pytest.approx(min(row["eval_loss"] for row in rows), rel=1e-4)
    again = [row for row in rows if "of_step" in row]
    assert all(row["of_step"] < row["step"] for row in again)
    assert len({row["step"] for row in rows}) == len(rows) - len(again)


def test_truncated_and_repeated_completions_warn(tmp_path: Path, base: str):
    rows = [
        trajectory(i, 12, "validation" if i % 5 == 0 else "train", finish_reason=reason)
        for i in range(50)
        for reason in ["length" if i % 2 else "stop"]
    ]
    path = write_rows(tmp_path / "t.jsonl", [*rows, rows[1]])
    with pytest.warns(DataWarning) as told:
        train(config(tmp_path, base, epochs=0.1, data=[path]))
    said = [str(w.message) for w in told]
    assert len(said) == 2
    assert "21 of 41 completions (51%) are truncated, and training leaves them out" in said[0]
    assert "lengths are underestimated" in said[0]
    assert "1 completions have an id that an earlier line has" in said[1]
    whole = write_rows(tmp_path / "u.jsonl", rows[::2])
    copy = shutil.copy(whole, tmp_path / "v.jsonl")
    with pytest.warns(DataWarning, match=r"v\.jsonl: the same content as another file"):
        train(config(tmp_path, base, epochs=0.1, data=[whole, str(copy)], output=f"{path}.m"))
    kept = config(tmp_path, base, epochs=0.1, data=[write_rows(tmp_path / "w.jsonl", rows)])
    train(kept.model_copy(update={"censoring": "one_sided", "output": f"{path}.n"}))  # no warning


def test_mixing_weights_and_down_sampling_choose_what_an_epoch_sees(tmp_path: Path, base: str):
    write_data(tmp_path / "u.jsonl", 100)
    files = [write_data(tmp_path / "t.jsonl"), str(tmp_path / "u.jsonl")]
    fields = {"data": files, "epochs": 1, "evals": 1, "trainable": "head"}
    result = train(config(tmp_path, base, **fields, weights={"u.jsonl": 2.0}))
    assert result.num_sequences == 280
    small = train(config(tmp_path, base, **fields, max_prompts=20, output=str(tmp_path / "s")))
    assert small.num_dropped["not_sampled"] > 200
    with pytest.raises(InputError, match=r"v\.jsonl"):
        train(
            config(tmp_path, base, **fields, weights={"v.jsonl": 2.0}, output=str(tmp_path / "o"))
        )


def test_a_fresh_head_says_the_mean():
    from lenvm.model.value_model import LenVMConfig

    model = LengthValueModel.build(tiny_backbone(), LenVMConfig(gamma=0.9))
    import numpy as np

    start_from_marginal(model, np.array([3, 1]))
    u = torch.sigmoid(model.head.summary.bias)
    expected = sum(1 - 0.9**n for n in (3, 2, 1, 1)) / 4
    torch.testing.assert_close(u, torch.tensor([expected]))


def test_a_run_that_was_killed_continues_to_the_same_end(tmp_path: Path, base: str):
    whole = train(config(tmp_path, base, output=str(tmp_path / "whole")))

    class Killed(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        train(config(tmp_path, base), stop)
    with pytest.raises(InputError, match="epochs"):  # a checkpoint is there to go on from
        train(config(tmp_path, base, epochs=7))
    last = find_checkpoint(tmp_path / "model.state")
    saved = json.loads((Path(last or "") / COMPLETE).read_text())["seconds"]
    continued = train(config(tmp_path, base))
    assert continued.val_loss_last == whole.val_loss_last
    assert continued.val_loss_first == whole.val_loss_first
    assert continued.seconds > saved > 0  # of both legs
    with pytest.raises(InputError, match="epochs"):
        train(config(tmp_path, base, epochs=7))

    def losses(name: str) -> list[object]:
        return [(r["step"], r["loss"]) for r in read_metrics(tmp_path, name) if "loss" in r]

    assert losses("whole") == losses("model")  # nothing twice, nothing lost


def test_ctrl_c_before_the_first_checkpoint_leaves_the_folder_free(tmp_path: Path, base: str):
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, base, epochs=1), stop)
    result = train(config(tmp_path, base, epochs=0.1))
    assert next(r["step"] for r in read_metrics(tmp_path) if "eval_loss" in r) == 0
    assert result.val_loss_first > 0


def test_changed_data_or_settings_are_refused(tmp_path: Path, base: str):
    train(config(tmp_path, base, epochs=1))
    with pytest.raises(InputError, match="epochs"):
        train(config(tmp_path, base, epochs=2))
    write_data(tmp_path / "t.jsonl", num=260)
    with pytest.raises(InputError, match="data_sha256"):
        train(config(tmp_path, base, epochs=1))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, base: str):
    with pytest.raises(TrainingError, match="learning_rate"):
        train(config(tmp_path, base, learning_rate=1e30, warmup_ratio=0))
    train(config(tmp_path, base, epochs=0.1))  # no checkpoint holds the folder for those settings


def test_weights_that_are_not_finite_are_found_before_the_first_step(tmp_path: Path, base: str):
    model = tiny_generator(num_hidden_layers=3)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(base)
    with pytest.raises(TrainingError, match="at step 0"):
        train(config(tmp_path, base))


def test_no_usable_sequence_and_other_tokenizers(tmp_path: Path, base: str):
    path = tmp_path / "t.jsonl"
    write_rows(path, [trajectory(0, 5, "train")])
    with pytest.raises(
        DataError, match=r"there are 1 of split train\. .*80/10/10.* \"validation\""
    ):
        train(config(tmp_path, base))
    cut = [trajectory(1, 5, "validation", finish_reason="length"), trajectory(0, 5, "train")]
    write_rows(path, cut)
    with pytest.raises(DataError, match=r"1 of split validation; dropped of validation: 1 trunc"):
        train(config(tmp_path, base))
    rows = [
        trajectory(i, 5, s, prompt_token_ids=[999]) for i, s in enumerate(("train", "validation"))
    ]
    write_rows(path, rows)
    with pytest.raises(DataError, match="another tokenizer"):
        train(config(tmp_path, base, output=str(tmp_path / "other")))


def test_tokens_of_another_tokenizer_inside_the_vocabulary_are_found(tmp_path: Path, base: str):
    """The texts say what the tokens should spell."""

    def write(shift: int) -> None:
        rows = []
        for i in range(20):
            t = trajectory(i, 6, "validation" if i % 5 == 0 else "train")
            text = " ".join(f"w{n + shift}" for n in t.completion_token_ids[:-1])
            rows.append(t.model_copy(update={"completion_text": text}))
        write_rows(tmp_path / "t.jsonl", rows)

    write(1)
    with pytest.raises(DataError, match=r"another tokenizer .*'w9 w9.* spell 'w8 w8"):
        train(config(tmp_path, base, epochs=1))
    write(0)
    train(config(tmp_path, base, epochs=1, trainable="head", output=str(tmp_path / "own")))


def test_a_checkpoint_of_a_newer_format_is_refused_before_the_first_step(tmp_path: Path, base: str):
    train(config(tmp_path, base, epochs=1, evals=1, trainable="head"))
    path = tmp_path / "model" / "lenvm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    values = {
        "data": [str(tmp_path / "t.jsonl")],
        "init_from": str(tmp_path / "model"),
        "output": str(tmp_path / "next"),
    }
    with pytest.raises(CheckpointError, match="is of format 99, newer than"):
        train(TrainingConfig.parse(values))
    assert not (tmp_path / "next.metrics.jsonl").exists()


def test_liger_patches_the_layers_and_leaves_the_forward(monkeypatch: pytest.MonkeyPatch):
    """A stand-in of the package's two names; tests/training/test_gpu.py runs the real one."""
    asked: list[dict[str, object]] = []
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("monkey_patch")
    package._apply_liger_kernel_to_instance = lambda **options: asked.append(options)  # type: ignore[attr-defined]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    backbone = tiny_backbone()
    use_liger(backbone)
    assert asked == [{"model": backbone, "fused_linear_cross_entropy": False}]
    with pytest.raises(InputError, match="no kernels for model type 'qwen2'"):
        use_liger(tiny_backbone("qwen2"))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(InputError, match="pip install liger-kernel"):
        use_liger(backbone)


def test_fp16_needs_a_gpu(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'fp16', which needs a GPU"):
        train(config(tmp_path, base, precision="fp16"))


@pytest.mark.parametrize(
    "override",
    [
        "gamma=1.5",
        "gamma=0",
        "epochs=-1",
        "colour=1",
        "head=vector",
        "last_layers=3",
        "target=area",
        "td_lambda=2",
    ],
)
def test_bad_settings_are_named(override: str):
    with pytest.raises(InputError, match=override.split("=")[0]):
        TrainingConfig.load(None, ['data=["a"]', "output=o", override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gamma=1.5", "gamma is 1.5; allowed: a number over 0 and under 1 or 'auto'"),
        ("gamma=abc", "gamma is 'abc'; allowed: a number over 0 and under 1 or 'auto'"),
        ("gama=0.9", "there is no option gama; did you mean gamma?"),
        ("colour=1", "there is no option colour; allowed: data, output, backbone, "),
        ("weights={a=-1}", "weights.a is -1; allowed: a number over 0"),
        ("trainable=none", "trainable is 'none'; allowed: 'full', 'lora', 'dora', 'last', 'head'"),
        ("epochs=0", "epochs is 0; allowed: a number over 0"),
        ("evals=1.5", "evals is 1.5; allowed: a whole number from 1"),
        ("compile=often", "compile is 'often'; allowed: true or false"),
        ("data=[]", "data is []; allowed: a list that is not empty"),
    ],
)
def test_a_bad_setting_says_what_is_allowed(override: str, says: str):
    with pytest.raises(InputError) as error:
        TrainingConfig.load(None, ['data=["a"]', "output=o", override])
    assert says in str(error.value)


def test_settings_that_do_not_go_together_are_told_without_the_others():
    with pytest.raises(InputError) as error:
        TrainingConfig.load(None, ['data=["a"]', "output=o", "init_from=m", "gamma=0.9"])
    assert str(error.value) == "init_from brings its own gamma; leave that out"
    with pytest.raises(InputError, match=r"^output is missing; name the folder"):
        TrainingConfig.load(None, ['data=["a"]'])


def test_a_control_before_the_prompt_goes_from_the_data_to_guidance(tmp_path: Path, base: str):
    """Nothing else tells the lengths apart: prompts are equal, and completions but for length."""
    tokenizer = tiny_tokenizer()
    words = {"[length:": 43, "equal_to": 44, "4": 45, "30": 46, "]": 47}
    kept = {t: i for t, i in tokenizer.get_vocab().items() if i not in words.values()}
    tokenizer.backend_tokenizer.model = WordLevel(kept | words, unk_token="w3")
    tokenizer.save_pretrained(base)
    rows = []
    for i in range(200):
        length = (4, 30)[i % 2]
        fields = {"prompt_token_ids": [4, 41], "completion_token_ids": [9] * (length - 1) + [EOS]}
        control = {"equal_to": length, "rule": "conditional"}
        split = "validation" if i % 5 == 0 else "train"
        rows.append(trajectory(i, length, split, length_control=control, **fields))
    data = write_rows(tmp_path / "t.jsonl", rows)
    train(config(tmp_path, base, control_input=True))
    model = LengthValueModel.from_pretrained(tmp_path / "model")
    assert model.encode_control({"equal_to": 30, "top_k": 3}) == [43, 44, 46, 47]
    assert model.encode_control(None) == []
    scorer = CandidateScorer(model, max_tokens=12, max_requests=3, max_candidates=15)
    guidance = GuidanceSession(scorer, eos_token_ids=[EOS])
    goals = {name: LengthControl(equal_to=n) for name, n in (("short", 4), ("long", 30))}
    guidance.add({name: Guided([4, 41], goal) for name, goal in goals.items()})
    assert guidance.prediction("short") < 10
    assert guidance.prediction("long") > 20
    assert TokenStore.load(Path(data)).index["prompt_length"].tolist() == [2] * 200
    plain = model.config.model_copy(update={"control_input": False})
    assert LengthValueModel(model.backbone, plain).encode_control({"equal_to": 30}) == []
    with pytest.raises(InputError, match="share_prompts"):
        config(tmp_path, base, control_input=True, share_prompts=True)


def test_metrics_go_to_the_trackers_that_are_there(tmp_path: Path, base: str, monkeypatch):
    train(config(tmp_path, base, epochs=1, evals=1))
    assert list((tmp_path / "model.state").glob("**/events.out.tfevents.*"))
    monkeypatch.setattr(loop, "is_tensorboard_available", lambda: False)
    monkeypatch.setattr(loop, "is_wandb_available", lambda: True)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert loop.find_trackers() == []  # W&B would ask for a key
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert loop.find_trackers() == ["wandb"]
