"""The recipe of the results: every kind of step end to end on tiny models, resuming, travelling."""

import json
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from recipes.results import prompts, travel
from recipes.results.__main__ import app
from recipes.results.collect import by_source, collect, nearer_share
from recipes.results.lab import Lab
from recipes.results.plan import load_plan, run_steps
from recipes.results.ship import ship
from typer.testing import CliRunner

import plot_results
import results_page
from lenvm.errors import DataWarning, InputError
from lenvm.model.value_model import LengthValueModel
from tiny import tiny_generator, tiny_tokenizer

PLAN = Path(__file__).parents[2] / "recipes" / "results" / "plan.toml"
TINY_PLAN = Path(__file__).with_name("tiny_plan.toml")
RUNS = ("coder05-frontier", "coder05-limits")
TEXTS = [f"w{i} w{i % 7 + 9} w{i % 5 + 20}" for i in range(6, 60)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files of the shapes of shared/data, with words of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(
        folder / "gsm8k/train.jsonl", [{"question": t, "answer": "#### 3"} for t in TEXTS[:20]]
    )
    write_rows(
        folder / "gsm8k/test_first660.jsonl",
        [{"question": f"{t} w61", "answer": "#### 3"} for t in TEXTS[:5]],
    )
    write_rows(folder / "math/train.jsonl", [{"problem": t} for t in TEXTS[20:30]])
    write_rows(
        folder / "math/math500_first250.jsonl",
        [{"problem": f"{t} w62", "answer": "4", "unique_id": t} for t in TEXTS[:4]],
    )
    ids = [*range(11, 17), *range(601, 613)]
    mbpp = [{"task_id": n, "text": f"{t} w60 w59"} for n, t in zip(ids, TEXTS, strict=False)]
    write_rows(folder / "mbpp/mbpp.jsonl", mbpp)
    (folder / "leetcode").mkdir()
    (folder / "leetcode/leetcode_train.json").write_text(
        json.dumps([{"problem": f"{t} w8 w8"} for t in TEXTS[:4]])
    )
    (folder / "alpaca").mkdir()
    (folder / "alpaca/alpaca_en_demo.json").write_text(
        json.dumps([{"instruction": f"{t} w9", "input": ""} for t in TEXTS[:4]])
    )
    for name in ("seed_tasks", "user_oriented_instructions"):
        row = {"instruction": f"{name} w40", "instances": [{"input": "w33"}]}
        write_rows(folder / f"self_instruct/{name}.jsonl", [row])
    for name, count in (
        ("arena_hard/question_v2.0", 14),
        ("wildchat/meter_train_filtered", 5),
        ("wildchat/meter_validation_filtered", 3),
        ("wildchat/meter_test_filtered", 2),
        ("ifeval/input_data", 4),
        ("dolly/dolly", 3),
    ):
        write_rows(
            folder / f"{name}.jsonl", [{"prompt": f"{t} w41 {name}{t}"} for t in TEXTS[:count]]
        )
    task = "w30 {word_count_type} {word_count} words w31"
    items = [
        {"id": i, "category": "qa", "type": "t", "lang": "en", "task": task, "raw_data": ""}
        for i in range(3)
    ]
    write_rows(folder / "lifebench/data_en.jsonl", items)
    return folder


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("generator")
    tiny_generator(max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def make_lab(folder: Path, data: Path, generator: str, **fields) -> Lab:
    return Lab(folder=folder, data=data, generators={"tiny": generator}, **fields)


@pytest.fixture(scope="module")
def plan():
    return load_plan(TINY_PLAN)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, data, generator, plan) -> Lab:
    """A lab in which everything has been run."""
    lab = make_lab(tmp_path_factory.mktemp("lab"), data, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # a tiny generator seldom ends by itself
        for call in "abc":
            assert run_steps(plan.of_call(call), lab) == []
    return lab


def test_every_kind_of_step_runs_to_its_end(lab, plan):
    for step in plan.steps:
        record = json.loads((lab.folder / "steps" / f"{step.name}.json").read_text())
        assert record["finished"], step.name
        assert record["seconds"] > 0


def test_samples_are_whole_and_of_the_right_side(lab):
    train, held_out = lab.tokens("train"), lab.tokens("heldout")
    assert {p["split"] for p in held_out.prompts()} == {"test"}
    assert not {p["hash"] for p in train.prompts()} & {p["hash"] for p in held_out.prompts()}
    counts = train.summary()["completions_by_domain"]
    assert set(counts) == {"math", "code", "instructions"}
    rows = list(train.trajectories())
    assert sum(len(r["completion_token_ids"]) for r in rows) == train.summary()["num_tokens"]
    for row in rows:
        ended = row["completion_token_ids"][-1] == 2
        assert ended == (row["finish_reason"] == "stop")
    guided = list(lab.tokens("guided").trajectories())
    assert {json.dumps(r["length_control"]) for r in guided} == {
        '{"equal_to": 6, "tolerance": 0.25}',
        '{"at_most": 9}',
    }


def test_a_finished_call_runs_nothing_again(lab, plan, capsys):
    before = (lab.folder / "steps" / "coder05-lora.json").read_bytes()
    assert run_steps(plan.of_call("a"), lab) == []
    assert capsys.readouterr().out.count("done") == 6
    assert (lab.folder / "steps" / "coder05-lora.json").read_bytes() == before


def test_a_call_without_time_leaves_what_it_began_and_the_next_goes_on(
    tmp_path, data, generator, plan
):
    lab = make_lab(tmp_path, data, generator)
    step = plan.of_call("coder05-sample")
    lab.deadline = time.monotonic() + 0.4
    assert run_steps(step, lab) == []
    record = json.loads((tmp_path / "steps/coder05-sample.json").read_text())
    part = lab.tokens("heldout").summary()["num_completions"]
    assert not record["finished"]
    # a writer killed in the middle of a line, and tokens without their line
    with (tmp_path / "tokens/heldout/completions.jsonl").open("a") as file:
        file.write('{"p": 0, "k"')
    with (tmp_path / "tokens/heldout/tokens.u32").open("ab") as file:
        file.write(b"abc")
    lab.deadline = float("inf")
    assert run_steps(step, lab) == []
    done = lab.tokens("heldout")
    assert json.loads((tmp_path / "steps/coder05-sample.json").read_text())["finished"]
    assert done.summary()["num_completions"] == 36 >= part
    ids = [r["id"] for r in done.trajectories()]
    assert len(set(ids)) == len(ids)


def test_answers_go_on_where_the_time_was_over(tmp_path, data, generator, plan, lab):
    travel.pack(lab.folder, tmp_path / "parts")
    travel.unpack(tmp_path / "parts", tmp_path / "lab")
    other = make_lab(tmp_path / "lab", data, generator)
    (other.folder / "steps/coder05-gsm8k.json").unlink()
    records = other.folder / "answers/coder05-gsm8k/records.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:7]))
    other.deadline = time.monotonic() + 60
    assert run_steps(plan.of_call("coder05-gsm8k"), other) == []
    again = {json.loads(x)["id"]: json.loads(x) for x in records.read_bytes().splitlines()}
    assert again.keys() == {json.loads(x)["id"] for x in lines}
    assert {json.loads(x)["id"]: json.loads(x)["text"] for x in lines} == {
        i: r["text"] for i, r in again.items()
    }


def test_a_failing_step_does_not_stop_the_others(tmp_path, data, generator, plan, capsys):
    lab = make_lab(tmp_path, data, generator)
    steps = [*plan.of_call("coder05-lora"), *plan.of_call("coder05-sample")]
    assert run_steps(steps, lab) == ["coder05-lora"]
    assert (tmp_path / "steps/coder05-sample.json").exists()
    assert not (tmp_path / "steps/coder05-lora.json").exists()


def test_only_what_changed_travels(tmp_path, lab, capsys):
    copy = tmp_path / "copy"
    travel.pack(lab.folder, tmp_path / "first")
    (lab.folder / ".travelled.json").unlink()
    travel.pack(lab.folder, tmp_path / "all")
    travel.unpack(tmp_path / "all", copy)
    assert (copy / "tokens/train/tokens.u32").read_bytes() == (
        lab.folder / "tokens/train/tokens.u32"
    ).read_bytes()
    assert (copy / "models/coder05-lora/adapter_model.safetensors").exists()
    assert not (copy / "data").exists()
    assert not list(copy.glob("grids/*/cells/*/model"))
    capsys.readouterr()
    (copy / "steps/new.json").write_text("{}")
    travel.pack(copy, tmp_path / "second")
    assert capsys.readouterr().out.startswith("1 files")


def test_the_result_files_have_the_headlines_of_the_issues(tmp_path, lab, plan, data):
    written = {p.name: json.loads(p.read_text()) for p in collect(plan, lab.folder, tmp_path, data)}
    fields = {
        "prediction_h200.json": {"mre_math", "mre_code", "mre_instructions"},
        "lifebench_h200.json": {
            "equal_to_score",
            "equal_to_score_unguided",
            "equal_to_deviation",
            "at_most_score",
            "at_least_score",
            "natural_endings",
            "natural_endings_unguided",
            "log_prob_loss",
        },
        "frontier_h200.json": {
            "equal_to_score",
            "log_prob_loss",
            "coverage_80",
            "hard_rule_score",
            "hard_rule_log_prob_loss",
        },
        "tradeoff_h200.json": {
            "gsm8k_accuracy_unguided",
            "gsm8k_accuracy_at_two_thirds_length",
            "best_baseline_at_two_thirds_length",
        },
    }
    for name, expected in fields.items():
        assert set(written[name]["headline"]) == expected, name
        assert written[name]["hardware"]
        assert written[name]["steps"]
    assert {"scaling_h200.json", "length_tokens.json"} <= written.keys()
    assert written["scaling_h200.json"]["runs"]["scaling"]["cells"]
    gsm8k = written["tradeoff_h200.json"]["runs"]["coder05-gsm8k"]
    assert gsm8k["num_items"] == 5
    assert {a["arm"] for a in gsm8k["arms"]} >= {"prompt", "tilt:20", "budget:3"}
    other, same = (
        written["tradeoff_h200.json"]["runs"][f"coder05-gsm8k-{name}"]["arms"]
        for name in ("own", "more")
    )
    unguided = ["prompt", "budget:3", "budget_answer:4"]  # what another value model shares
    assert [a["arm"] for a in other] == [*unguided, "tilt:100"]
    assert {a["arm"] for a in same} == {*unguided, "tilt:20", "tilt:200", "tilt:100"}
    assert other[0]["pass_at_1"] == gsm8k["arms"][0]["pass_at_1"]
    assert {"unguided, 3 requests", "coder05-lora, 3 requests"} == written["tradeoff_h200.json"][
        "speed"
    ]["coder05-speed"].keys()
    heads = written["prediction_h200.json"]["models"]
    assert {"coder05-lora", "coder05-lora@0.99", "coder05-scalar"} <= heads.keys()
    assert heads["coder05-lora"]["domains"]["math"]["coverage"]["80"] is not None
    assert "instructions_by_source" in heads["coder05-lora"]
    sampling = {n: written["lifebench_h200.json"]["runs"][n]["sampling"] for n in RUNS}
    assert sampling["coder05-limits"] == sampling["coder05-frontier"] | {"frequency_penalty": 0.3}


def test_held_out_instructions_are_told_apart_by_their_source(tmp_path, data):
    held_out = [p for p in prompts.load_prompts(data, "held_out", 100) if p.domain != "math"]
    conditioned = prompts.find_conditioned(data)
    grades = [
        {
            "id": p.prompt_hash[:16],
            "domain": p.domain,
            "length_true": 10.0,
            "predicted_geometric": 12.0 if p.prompt_hash in conditioned else 9.0,
        }
        for p in held_out
    ]
    write_rows(tmp_path / "grades.jsonl", grades)
    found = by_source(tmp_path / "grades.jsonl", conditioned)
    counts = {name: source["num_prompts"] for name, source in found.items()}
    assert counts == {"ifeval": 4, "wildchat": 5}
    assert found["ifeval"]["mre"]["value"] == pytest.approx(0.2)
    assert found["wildchat"]["mre"]["value"] == pytest.approx(0.1)


def test_two_models_are_compared_answer_by_answer(tmp_path):
    def write_predictions(name: str, predicted: list[float]) -> Path:
        points = [
            {"sample": k, "at": 0.5, "remaining": 10, "predicted": p}
            for k, p in enumerate(predicted)
        ]
        write_rows(tmp_path / name / "records.jsonl", [{"id": "a", "positions": points}])
        return tmp_path / name

    ours, theirs = write_predictions("a", [11, 9, 14, 10]), write_predictions("b", [13, 11, 11, 4])
    [row] = nearer_share(ours, theirs)
    assert row["at"] == 0.5
    assert row["share"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_the_plan_itself_is_sound(data):
    """Names, kinds and arms of the real plan; that every model it uses is made before."""
    from lenvm.evals.arms import parse_arms
    from lenvm.evals.generator import Sampling
    from lenvm.evals.lifebench import arms as lifebench
    from lenvm.evals.tradeoff import arms as tradeoff

    plan = load_plan(PLAN)
    kinds = {"lifebench": lifebench.KINDS, "tradeoff": tradeoff.KINDS}
    made = {
        name
        for s in plan.steps
        for name in (
            [s.name] if s.kind == "train" else [x["name"] for x in s.options.get("sets", [])]
        )
    }
    for step in plan.steps:
        o = step.options
        if step.kind in kinds:
            parse_arms(o["arms"], kinds[step.kind])
            assert Sampling(**o["sampling"]).top_k
        used = [o.get("value_model"), o.get("held_out"), o.get("tokens")]
        used += [*o.get("models", []), *o.get("data", []), *o.get("training", [])]
        used += o.get("value_models", [])
        assert {u for u in used if u} <= made, step.name
        assert o.get("generator", "coder05") in plan.generators
        for entry in o.get("sets", []):
            assert prompts.load_prompts(data, entry["prompts"], entry["per_domain"])
    assert load_plan(PLAN, dry=True).generators["coder05"] == "smollm2"
    penalised = {s.name: Sampling(**s.options["sampling"]).to_json() for s in plan.of_call("1f")}
    plain = Sampling(**plan.of_call("coder05-clean-frontier")[0].options["sampling"]).to_json()
    assert penalised == {
        "coder05-clean-frontier-penalty": plain | {"frequency_penalty": 0.05},
        "coder05-clean-frontier-repetition": plain | {"repetition_penalty": 1.05},
    }


def test_prompts_that_may_not_ship_stay_apart(data):
    def hashes(which: str) -> set[str]:
        return {p.prompt_hash for p in prompts.load_prompts(data, which, 1000)}

    both = hashes("shippable") | hashes("not_shippable")
    assert hashes("all") == both
    assert not hashes("shippable") & hashes("not_shippable")
    assert not both & hashes("held_out")
    with pytest.raises(InputError, match="allowed: shippable"):
        hashes("mine")


def test_constrained_prompts_are_instructions_with_conditions_in_the_same_split(data):
    plain = prompts.load_prompts(data, "shippable", 1000)
    splits = {p.text: p.split for p in plain if p.domain == "instructions"}
    made = prompts.load_prompts(data, "constrained", 1000)
    assert len(made) > len(splits) == len({p.prompt_hash for p in made}) / prompts.VARIANTS
    for prompt in made:
        [base] = {text for text in splits if text in prompt.text}
        assert len(prompt.text) > len(base)
        assert prompt.split == splits[base]
    held_out = {p.prompt_hash for p in prompts.load_prompts(data, "held_out", 1000)}
    assert not held_out & {p.prompt_hash for p in made}
    assert made == prompts.load_prompts(data, "constrained", 1000)


def test_a_model_of_shippable_prompts_ships_without_paths_of_this_machine(tmp_path, lab, generator):
    size = ship(lab.folder, "coder05-lora", generator, tmp_path / "checkpoint")
    assert 0 < size < 20_000_000
    text = "".join(p.read_text() for p in (tmp_path / "checkpoint").glob("*.json"))
    assert str(lab.folder) not in text
    card = (tmp_path / "checkpoint/README.md").read_text()
    assert "error at the prompt, math" in card
    assert "80% interval covers" in card
    model = LengthValueModel.from_pretrained(tmp_path / "checkpoint")
    raw = model.read([[1, 7, 8]])[0]
    own = LengthValueModel.from_pretrained(lab.folder / "models/coder05-lora")
    torch.testing.assert_close(raw, own.read([[1, 7, 8]])[0], atol=0.05, rtol=0.05)


def test_a_model_of_other_prompts_does_not_ship(tmp_path, lab):
    shutil.copytree(lab.folder, tmp_path / "lab")
    path = tmp_path / "lab/steps/coder05-sample.json"
    path.write_text(path.read_text().replace("shippable", "all"))
    with pytest.raises(InputError, match="only models of shippable prompts"):
        ship(tmp_path / "lab", "coder05-lora", "base", tmp_path / "checkpoint")


def test_page_and_pictures_are_made_from_the_files_alone(tmp_path, lab, plan):
    list(collect(plan, lab.folder, tmp_path / "results"))
    images = {p.name for p in plot_results.main(tmp_path / "results", tmp_path / "docs/images")}
    assert {"prediction.png", "coder05_frontier.png", "tradeoff_coder05_gsm8k.png"} <= images
    assert {"scaling.png", "length_tokens_longer.png"} <= images
    page = tmp_path / "docs/results.md"
    results_page.main(tmp_path / "results", page)
    text = page.read_text()
    found = json.loads((tmp_path / "results/frontier_h200.json").read_text())
    score = found["runs"]["coder05-frontier"]["arms"][2]["equal_to"]["score"]
    assert score["low"] is None  # of so few items there is no interval
    assert f"| {score['value']:.1f} |" in text
    assert "17.0%" in text
    assert "(images/prediction.png)" in text
    ablations = text[text.index("## Ablations") : text.index("## What it cost")]
    assert "not measured yet" in ablations
    results_page.main(tmp_path / "nothing", page)
    assert page.read_text().count("not measured yet") > 20
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_command_runs_several_calls_and_names_what_there_is(tmp_path, data, generator):
    command = [*("run", "coder05-sample", "coder05-lora"), "--plan", str(TINY_PLAN)]
    command += ["--lab", str(tmp_path), "--data", str(data), "--device", "cpu"]
    found = CliRunner().invoke(app, [*command, "--generator", f"tiny={generator}"])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "models/coder05-lora/adapter_model.safetensors").exists()
    record = json.loads((tmp_path / "steps/coder05-lora.json").read_text())
    assert record["command"] == "python -m recipes.results run coder05-sample coder05-lora"
    listed = CliRunner().invoke(app, ["list", "--plan", str(TINY_PLAN), "--lab", str(tmp_path)])
    lines = {line.split()[2]: line for line in listed.output.splitlines()}
    assert "done" in lines["coder05-lora"]
    assert lines["coder05-frontier"].endswith("-")


def test_replicas_are_spread_over_the_gpus_that_are_seen(monkeypatch):
    from recipes.results.lab import spread

    assert spread("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert spread("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert spread("cuda:1", 2) == ["cuda:1", "cuda:1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert spread("cuda", 2) == ["cuda", "cuda"]


def test_asked_answers_are_graded_and_the_wrong_ones_never_end(lab):
    folder = lab.tokens("asked")
    rows = list(folder.trajectories())
    assert len(rows) == 12
    assert all(row["messages"][-1]["content"].endswith("within \\boxed{}.") for row in rows)
    assert [row["reward"] for row in rows] == folder.rewards() == [0.0] * 12  # tiny models are
    assert lab.figures("asked-grades")["graded"] == 12
    ends = lab.figures("coder05-right")
    assert ends["num_endless"] == sum(row["split"] == "train" for row in rows) > 0
    exported = lab.trajectories("asked")
    folder.write_rewards([1.0] * 12)
    assert lab.trajectories("asked") == exported  # written anew: the rewards are younger
    lines = exported.read_text().splitlines()
    assert {json.loads(line)["reward"] for line in lines} == {1.0}
    folder.write_rewards([0.0] * 12)
