"""Length prediction: equations by hand, baselines, calibration, resuming, a real tiny model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evals.stub import Stub, running
from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError, EndpointError, InputError
from lenvm.evals.prediction.baselines import predict_baselines, surface_features
from lenvm.evals.prediction.grading import (
    grade_prompt,
    inside_intervals,
    pit_values,
    summarise_domain,
)
from lenvm.evals.prediction.groups import PromptGroup, load_groups, true_length
from lenvm.evals.prediction.predictors import EndpointPredictor, ValueModelPredictor, to_belief
from lenvm.evals.prediction.run import PredictionConfig, regrade_prediction, run_prediction
from lenvm.files import JsonlWriter
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_tokenizer

GAMMA = 0.99


def write(path: Path, rows) -> Path:
    """rows: (prompt number, domain, split, length, finish_reason)."""
    with JsonlWriter(path) as writer:
        for index, (prompt, domain, split, length, finish, *control) in enumerate(rows):
            trajectory = Trajectory(
                id=f"p{prompt}-{index}",
                prompt_hash=f"p{prompt}",
                sample_index=index,
                domain=domain,
                split=split,
                messages=[{"role": "user", "content": f"Question {prompt}?"}],
                prompt_token_ids=[4, 10 + prompt % 50, 5],
                completion_token_ids=[7] * (length - 1) + [EOS],
                completion_text=" ".join(["w7"] * (length - 1)),
                finish_reason=finish,
                model="m",
                length_control=control[0] if control else None,
            )
            writer.write(trajectory.to_json())
    return path


class Known:
    """Predicts `factor` times the given length of each prompt, and remembers what it read."""

    name, gamma, head = "known", GAMMA, "scalar"

    def __init__(self, lengths, factor=1.0, dies_after=10**9):
        self.lengths, self.factor, self.read_count, self.dies_after = lengths, factor, 0, dies_after

    def read(self, sequences, positions, images=None):
        rows = []
        for ids, places in zip(sequences, positions, strict=True):
            if self.read_count >= self.dies_after:
                raise KeyboardInterrupt
            self.read_count += 1
            total = self.lengths[ids[1] - 10] * self.factor
            rows.append([{"value": -0.5, "length": total - (p - 2)} for p in places])
        return rows


def test_true_length_is_the_inverse_of_the_mean_u():
    lengths = [10, 50, 200]
    mean_u = sum(1 - GAMMA**n for n in lengths) / 3
    assert true_length(lengths, GAMMA) == pytest.approx(math.log(1 - mean_u) / math.log(GAMMA))
    assert true_length([7, 7], GAMMA) == pytest.approx(7)
    assert true_length([100_000, 100_000], GAMMA) == pytest.approx(100_000)


def test_equations_13_to_15_by_hand(tmp_path):
    """gamma = 1/2. Prompt 0: L = 1, 2, so u = .5, .75, mean .625, L_GT = ln .375 / ln .5 = 1.41504.
    Prompt 1: L = 3, 3, so L_GT = 3. Both predicted as 2: errors .41339 and .33333, mean .37336.
    """

    class Two(Known):
        gamma = 0.5

    rows = [(0, "m", "test", 1, "stop"), (0, "m", "test", 2, "stop")]
    rows += [(1, "m", "test", 3, "stop")] * 2
    path = write(tmp_path / "t.jsonl", rows)
    summary = run_prediction(PredictionConfig((path,)), Two({0: 2, 1: 2}), tmp_path / "out")
    found = summary["domains"]["all"]
    assert found["mre"]["value"] == pytest.approx(0.373362, abs=1e-6)
    # against the mean lengths 1.5 and 3, and against the medians, which are the same here
    assert found["mre_mean"]["value"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert found["mre_median"]["value"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert found["mae"]["value"] == pytest.approx((0.584963 + 1) / 2, abs=1e-6)


def test_jensen_the_true_length_lies_below_the_mean():
    assert true_length([10, 500], GAMMA) < 255


def test_errors_of_a_known_predictor(tmp_path):
    rows = [(i, "math", "test", 40 + 10 * i, "stop") for i in range(6) for _ in range(3)]
    path = write(tmp_path / "t.jsonl", rows)
    predictor = Known({i: 40 + 10 * i for i in range(6)}, factor=1.1)
    summary = run_prediction(PredictionConfig((path,)), predictor, tmp_path / "out")
    math_ = summary["domains"]["math"]
    assert math_["mre"]["value"] == pytest.approx(0.1)
    assert math_["median_re"]["value"] == pytest.approx(0.1)
    assert math_["mre_mean"]["value"] == pytest.approx(0.1)
    assert math_["spearman"]["value"] == pytest.approx(1)
    assert math_["kendall"]["value"] == pytest.approx(1)
    assert math_["mae"]["value"] == pytest.approx(0.1 * np.mean([40, 50, 60, 70, 80, 90]))
    assert [p["at"] for p in math_["positions"]] == [0, 0.25, 0.5, 0.75]
    assert math_["positions"][0]["mre"]["value"] == pytest.approx(0.1)
    # at half of 40: 44 - 20 = 24 predicted, 20 true; the same share for every prompt
    assert math_["positions"][2]["mre"]["value"] == pytest.approx(0.2)
    assert (math_["coverage"], math_["pit"]) == (None, None)
    assert summary["num_completions"] == 18
    assert sum(c["num"] for c in math_["calibration"]) == 6


def test_domains_are_told_apart_and_counted(tmp_path):
    rows = [
        *[(i, "math", "test", 50, "stop") for i in range(3) for _ in range(2)],
        *[(i, "code", "test", 100, "stop") for i in range(3, 5) for _ in range(2)],
        (5, "code", "test", 9, "stop"),
        (0, "math", "test", 64, "length"),
        (1, "math", "test", 30, "stop", {"equal_to": 30}),
        *[(i, "math", "train", 50, "stop") for i in range(10, 14)],
    ]
    path = write(tmp_path / "t.jsonl", rows)
    lengths = dict.fromkeys(range(3), 50) | dict.fromkeys(range(3, 6), 150)
    summary = run_prediction(PredictionConfig((path,)), Known(lengths), tmp_path / "out")
    assert list(summary["domains"]) == ["all", "code", "math"]
    assert summary["domains"]["code"]["mre"]["value"] == pytest.approx(0.5)
    assert summary["domains"]["all"]["mre"]["value"] == pytest.approx(0.2)
    assert (summary["num_censored"], summary["num_guided"]) == (1, 1)
    assert summary["baseline_fit"] == "train"
    assert len(summary["notes"]) == 3


def test_an_interrupted_run_reads_only_the_rest(tmp_path):
    rows = [(i, "math", "test", 40, "stop") for i in range(8) for _ in range(2)]
    path = write(tmp_path / "t.jsonl", rows)
    config = PredictionConfig((path,), num_traced=1, chunk=2)
    lengths = dict.fromkeys(range(8), 44)
    with pytest.raises(KeyboardInterrupt):
        run_prediction(config, Known(lengths, dies_after=4), tmp_path / "out")
    rest = Known(lengths)
    summary = run_prediction(config, rest, tmp_path / "out")
    assert rest.read_count == 4
    assert summary["domains"]["all"]["mre"]["value"] == pytest.approx(0.1)
    assert regrade_prediction(tmp_path / "out", [path]) == summary
    other = write(tmp_path / "u.jsonl", rows[:4])
    with pytest.raises(DataError, match="unchanged"):
        regrade_prediction(tmp_path / "out", [other])


def test_traced_completions_are_not_those_that_ended_first(tmp_path):
    path = write(tmp_path / "t.jsonl", [(0, "math", "test", n, "stop") for n in (30, 10, 20)])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[2], lines[0]]) + "\n")  # as a sampler writes them
    [group] = load_groups([path]).evaluated
    assert group.lengths == [30, 10, 20]


def test_another_value_model_in_an_old_folder_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", [(0, "math", "test", 40, "stop")] * 2)
    run_prediction(PredictionConfig((path,)), Known({0: 40}), tmp_path / "out")
    other = Known({0: 40})
    other.gamma = 0.5
    with pytest.raises(InputError, match="gamma"):
        run_prediction(PredictionConfig((path,)), other, tmp_path / "out")


def test_nothing_to_measure_is_an_error_that_says_what_there_is(tmp_path):
    path = write(tmp_path / "t.jsonl", [(0, "math", "train", 40, "stop")] * 3)
    with pytest.raises(DataError, match="the files hold the splits train"):
        load_groups([path])
    assert len(load_groups([path], split="all").evaluated) == 1
    with pytest.raises(InputError, match="split"):
        load_groups([path], split="tests")


# -- baselines ------------------------------------------------------------------------------------


def group(name: str, domain: str, text: str, prompt_tokens: int, lengths: list[int]) -> PromptGroup:
    return PromptGroup(name, domain, text, [3] * prompt_tokens, [[7] * n for n in lengths])


def test_the_constant_is_constant_in_u(tmp_path):
    training = [group("a", "math", "x", 3, [10, 30]), group("b", "code", "x", 3, [300])]
    found, fitted = predict_baselines([group("c", "code", "y", 3, [5])], training, GAMMA)
    assert fitted == "train"
    assert found["constant"][0] == pytest.approx(true_length([10, 30, 300], GAMMA))
    assert found["constant_per_domain"][0] == pytest.approx(300)


def test_regressions_find_what_the_prompt_gives_away():
    rng = np.random.default_rng(0)

    def make(name: int) -> PromptGroup:
        code = rng.random() < 0.5
        size = int(rng.integers(5, 200))
        text = ("```code``` " if code else "why? ") + "word " * size
        return group(str(name), "any", text, size, [int(size * (4 if code else 1)) + 1])

    evaluated = [make(i) for i in range(120)]
    found, fitted = predict_baselines(evaluated, [], 0.9999)
    truth = np.array([g.lengths[0] for g in evaluated])
    errors = {n: float(np.abs(np.log(p / truth)).mean()) for n, p in found.items()}
    assert fitted == "cross-fit"
    assert errors["ridge"] < 0.15 < errors["prompt_length"] < errors["constant"]


def test_cross_fitted_baselines_do_not_see_their_own_prompt():
    evaluated = [group(str(i), "any", "x", 3, [10]) for i in range(40)]
    evaluated[7] = group("7", "any", "x", 3, [9999])
    found, _ = predict_baselines(evaluated, [], 0.9999)
    assert found["constant"][7] == pytest.approx(10)


def test_a_constant_has_no_rank_correlation(tmp_path):
    rows = [(i, "math" if i % 2 else "code", "test", 20 + i, "stop") for i in range(12)] * 2
    path = write(tmp_path / "t.jsonl", rows)
    lengths = {i: 20 + i for i in range(12)}
    domains = run_prediction(PredictionConfig((path,)), Known(lengths), tmp_path / "o")["domains"]
    for domain, told in (("all", True), ("math", False)):
        baselines = domains[domain]["baselines"]
        assert (baselines["constant"]["spearman"], baselines["constant"]["kendall"]) == (None, None)
        assert (baselines["constant_per_domain"]["spearman"] is not None) == told
        assert baselines["prompt_length"]["mre"] is not None


def test_one_prompt_still_has_baselines():
    found, _ = predict_baselines([group("a", "math", "x", 3, [10, 20])], [], GAMMA)
    assert all(np.isfinite(p).all() for p in found.values())
    assert np.isfinite(surface_features(group("a", "m", "", 1, [1]))).all()


# -- distributions --------------------------------------------------------------------------------


def exponential_quantiles(scale: float) -> dict[str, float]:
    levels = [round(0.025 * i, 3) for i in range(1, 40)]
    return {str(q): float(-scale * math.log(1 - q)) for q in levels}


def test_calibrated_quantiles_cover_what_they_say_and_have_a_flat_pit():
    rng = np.random.default_rng(0)
    grades = []
    for i in range(400):
        scale = float(rng.uniform(200, 2000))
        lengths = [max(1, round(rng.exponential(scale))) for _ in range(10)]
        record = {
            "id": str(i),
            "domain": "any",
            "lengths": lengths,
            "censored": [],
            "prediction": {
                "value": -0.5,
                "length": scale,
                "quantiles": exponential_quantiles(scale),
            },
            "positions": [],
        }
        grades.append(grade_prompt(record, {"constant": 1.0}, GAMMA, "distribution"))
    summary = summarise_domain(grades, 4000)
    for name, expected in (("50", 0.5), ("80", 0.8), ("95", 0.95)):
        interval = summary["coverage"][name]
        assert interval["value"] == pytest.approx(expected, abs=0.02)
    assert summary["pit"] == pytest.approx([0.1] * 10, abs=0.02)


def test_pit_of_a_length_at_a_quantile_and_beyond_all():
    quantiles = {str(round(0.1 * i, 1)): 10.0 * i for i in range(1, 10)}
    low, middle, high = pit_values(quantiles, [1, 50, 1000])
    assert low == pytest.approx(0.005)
    assert middle == pytest.approx(0.495)
    assert high == pytest.approx(0.95)
    assert pit_values({"0.5": 3.0}, [1]) is None
    assert pit_values(None, [1]) is None


@pytest.mark.parametrize("cap", [1500, 10_000])
def test_answers_that_were_cut_off_do_not_make_intervals_look_wide(cap: int):
    """Left out, they would: all of them are longer than what their interval says or unknown."""
    rng = np.random.default_rng(1)
    inside, without = [], []
    for _ in range(2000):
        scale = float(rng.uniform(100, 650))  # so that no interval ends past the lower cap
        lengths = np.maximum(1, rng.exponential(scale, 10).round()).astype(int)
        whole = lengths[lengths <= cap].tolist()
        found = inside_intervals(exponential_quantiles(scale), whole, [cap] * (10 - len(whole)))
        inside += found["80"]
        without += inside_intervals(exponential_quantiles(scale), whole)["80"]
    assert np.mean(inside) == pytest.approx(0.8, abs=0.01)
    assert np.mean(without) >= np.mean(inside)


def test_an_answer_cut_off_inside_an_interval_is_left_out():
    quantiles = {"0.1": 10.0, "0.9": 20.0}
    assert inside_intervals(quantiles, [15], [19])["80"] == [True]
    assert inside_intervals(quantiles, [15], [20])["80"] == [True, False]


def test_intervals_without_their_quantiles_are_absent():
    assert inside_intervals({"0.1": 5, "0.9": 9}, [4, 5, 9]) == {"80": [False, True, True]}
    assert inside_intervals(None, [4]) == {}


def test_a_distribution_head_answers_mean_and_median_with_its_own_numbers():
    value = -(1 - GAMMA**60)
    record = {
        "id": "a",
        "domain": "d",
        "lengths": [50, 70],
        "censored": [],
        "prediction": {"value": value, "length": 55.0, "mean": 65.0},
        "positions": [],
    }
    grade = grade_prompt(record, {}, GAMMA, "distribution")
    assert grade["predicted"] == pytest.approx(60)
    assert (grade["predicted_mean"], grade["predicted_median"]) == (65.0, 55.0)
    assert summarise_domain([grade], 2)["geometric"] is None  # a server that does not tell it
    record["prediction"]["geometric_mean"] = 1.1 * grade["length_true"]
    again = summarise_domain([grade_prompt(record, {}, GAMMA, "distribution")], 2)
    assert again["geometric"]["mre"]["value"] == pytest.approx(0.1)


# -- predictors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["scalar", "distribution"])
def test_a_value_model_predicts_in_process(tmp_path, head):
    torch.manual_seed(0)
    config = LenVMConfig(gamma=GAMMA, head=head, eos_token_ids=[EOS])
    model = LengthValueModel.build(tiny_backbone(), config)
    predictor = ValueModelPredictor(model, "tiny")
    ids = [4, 9, 5, 7, 7, 8]
    found = predictor.read([ids, ids[:3]], [[2, 4], [2]])
    raw = model.read([ids])[0]
    expected = model.belief(raw[[2, 4]]).length().tolist()
    assert [b["length"] for b in found[0]] == pytest.approx(expected, rel=1e-5)
    assert found[1][0]["length"] == pytest.approx(expected[0], rel=1e-5)
    assert ("quantiles" in found[0][0]) == (head == "distribution")
    path = write(tmp_path / "t.jsonl", [(i, "m", "test", 30, "stop") for i in range(5)] * 2)
    summary = run_prediction(PredictionConfig((path,)), predictor, tmp_path / "out")
    assert summary["head"] == head
    for told in ("coverage", "geometric"):
        assert (summary["domains"]["all"][told] is None) == (head == "scalar")


def test_a_server_predicts_over_http(tmp_path):
    def values(body):
        rows = [
            [{"value": -0.4, "length": len(ids) * 10.0, "p10": 5, "p50": 30, "p90": 90} for _ in p]
            for ids, p in zip(body["token_ids"], body["positions"], strict=True)
        ]
        return {"gamma": GAMMA, "head": "distribution", "model": "served", "values": rows}

    path = write(tmp_path / "t.jsonl", [(i, "m", "test", 40, "stop") for i in range(4)] * 2)
    with running(Stub(extra={"/v1/length/values": values})) as stub:
        predictor = EndpointPredictor(stub.url)
        summary = run_prediction(PredictionConfig((path,)), predictor, tmp_path / "out")
    assert (summary["model"], summary["gamma"]) == ("served", GAMMA)
    assert summary["domains"]["all"]["coverage"]["80"]["value"] == 1
    record = json.loads((tmp_path / "out" / "records.jsonl").read_text().splitlines()[0])
    assert record["prediction"]["quantiles"] == {"0.1": 5, "0.5": 30, "0.9": 90}


def test_a_server_without_values_is_said():
    with running(Stub()) as stub, pytest.raises(EndpointError, match="length/values failed"):
        EndpointPredictor(stub.url)
    bad = Stub(extra={"/v1/length/values": lambda b: {"values": [[]]}})
    with running(bad) as stub, pytest.raises(EndpointError, match="gamma, head, model missing"):
        EndpointPredictor(stub.url)


def test_numbers_of_a_server_become_beliefs():
    assert to_belief({"value": -0.1, "length": 3, "p5": 1, "x": 2}) == {
        "value": -0.1,
        "length": 3,
        "quantiles": {"0.05": 1},
    }


def tiny_predictor() -> ValueModelPredictor:
    config = LenVMConfig(gamma=GAMMA, eos_token_ids=[EOS])
    model = LengthValueModel.build(tiny_backbone(), config)
    model.tokenizer = tiny_tokenizer()
    return ValueModelPredictor(model, "tiny")


def change(path: Path, token: int, new: int) -> None:
    """Another id in the place of one, in all completions."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        ids = row["completion_token_ids"]
        row["completion_token_ids"] = [new if i == token else i for i in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_of_another_tokenizer_are_refused_as_training_does(tmp_path):
    rows = [(i, "m", "test", 9 + i, "length" if i == 3 else "stop") for i in range(4)]
    path = write(tmp_path / "t.jsonl", rows)
    predictor = tiny_predictor()
    predictor.check_files([path])
    change(path, 7, 9)  # inside the vocabulary: other words
    with pytest.raises(DataError, match=r"t\.jsonl was sampled with another tokenizer"):
        predictor.check_files([path])
    change(path, 9, 999_999)
    with pytest.raises(DataError, match=r"t\.jsonl.*999999"):
        predictor.check_files([path])


def test_files_that_cannot_be_written_beside_are_checked_all_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "data" / "t.jsonl", [(0, "m", "test", 9, "stop")])
    change(path, 7, 9)
    before = set((tmp_path / "data").iterdir())
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(DataError, match=rf"{path} was sampled with another tokenizer"):
        tiny_predictor().check_files([path])
    assert set((tmp_path / "data").iterdir()) == before
