"""The whole evaluation against a real local server, and its numbers against hand-made records."""

import json
import math
from pathlib import Path

import pytest

from evals.stub import Stub, echo_length, find_control, running, say
from evals.test_runner import Scripted
from lenvm.errors import InputError
from lenvm.evals.arms import parse_arms
from lenvm.evals.client import connect
from lenvm.evals.generator import GenerationResponse, Sampling
from lenvm.evals.judge import Judge, parse_rating
from lenvm.evals.lifebench.arms import KINDS, strip_countdown
from lenvm.evals.lifebench.grading import grade_record
from lenvm.evals.lifebench.run import LifebenchConfig, regrade_lifebench, run_lifebench


@pytest.fixture
def file(tmp_path) -> Path:
    rows = [
        {
            "id": i,
            "category": "qa" if i < 2 else "create",
            "type": f"t{i}",
            "lang": "en",
            "task": f"Task {i}: {{word_count_type}} {{word_count}} words long.",
            "raw_data": "",
        }
        for i in range(3)
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def config(file: Path, *arms: str, **fields) -> LifebenchConfig:
    return LifebenchConfig(file, tuple(parse_arms(arms, KINDS)), **({"targets": (20, 80)} | fields))


def arm(summary, name):
    return next(a for a in summary["arms"] if a["arm"] == name)


def test_guided_arms_meet_their_targets_and_the_prompt_arm_is_scored_by_its_own(file, tmp_path):
    with running(Stub()) as stub:
        summary = run_lifebench(
            config(file, "prompt", "soft:30", "conditional"), connect(stub.url), tmp_path / "out"
        )
        controls = [find_control(b) for b in stub.bodies]
    assert len(controls) == 3 * 3 * 2
    assert {"equal_to": 20, "rule": "soft", "strength": 30.0} in controls
    assert {"equal_to": 80, "rule": "conditional", "evidence": 1.0} in controls
    guided, unguided = arm(summary, "soft:30")["equal_to"], arm(summary, "prompt")["equal_to"]
    assert guided["score"]["value"] == 100
    assert guided["deviation"]["value"] == 0
    # the stub says 40 tokens: LD = 1 at 20, LD = -0.5 at 80
    by_hand = (100 * math.exp(-2) + 100 * math.exp(-2.5)) / 2
    assert unguided["score"]["value"] == pytest.approx(by_hand)
    assert unguided["deviation"]["value"] == pytest.approx(0.75)
    assert unguided["over"]["value"] == pytest.approx(0.5)
    assert unguided["under"]["value"] == pytest.approx(0.25)
    assert unguided["deviation_signed"]["value"] == pytest.approx(0.25)
    assert [t["share_over"]["value"] for t in unguided["by_target"]] == [1, 0]
    assert [c["num"] for c in unguided["by_category"]] == [2, 4]
    assert unguided["quality"]["log_prob"]["value"] == pytest.approx(-1)
    assert unguided["quality"]["natural_end"]["value"] == 1


def test_unguided_answers_as_long_as_the_target_stand_beside_the_guided_ones(file, tmp_path):
    with running(Stub()) as stub:  # which says 40 tokens whatever is asked for
        settings = config(file, "prompt", "soft:30", targets=(20, 50))
        summary = run_lifebench(settings, connect(stub.url), tmp_path / "out")
    for name in ("prompt", "soft:30"):
        far, near = (t["unguided_as_long"] for t in arm(summary, name)["equal_to"]["by_target"])
        assert far is None
        assert near["num"] == 2 * 3
        assert near["log_prob"]["value"] == pytest.approx(-1)


def test_each_constraint_has_its_own_phrase_control_and_rule(file, tmp_path):
    with running(Stub()) as stub:
        summary = run_lifebench(
            config(
                file,
                "prompt",
                "hard",
                "truncate",
                constraints=("at_most", "at_least"),
                targets=(60,),
            ),
            connect(stub.url),
            tmp_path / "out",
        )
        bodies = stub.bodies
    unguided = arm(summary, "prompt")
    assert unguided["equal_to"] is None
    assert unguided["at_most"]["score"]["value"] == 100  # 40 tokens
    assert unguided["at_least"]["score"]["value"] == pytest.approx(
        100 * math.exp(5 * (40 - 60) / 60)
    )
    assert arm(summary, "truncate")["at_least"] is None
    prompts = {b["messages"][0]["content"] for b in bodies}
    assert "Task 0: at most 60 tokens long." in prompts
    assert "Task 0: at least 60 tokens long." in prompts
    assert {"at_least": 60, "rule": "hard"} in [find_control(b) for b in bodies]
    assert {b["max_tokens"] for b in bodies} == {60, 2048}


def test_without_the_plugin_the_unguided_arms_run_and_the_others_say_why_not(file, tmp_path):
    with running(Stub(plugin=None)) as stub:
        summary = run_lifebench(
            config(file, "prompt", "truncate", "hard", "eos_decay", "eos_bias:3", "countdown"),
            connect(stub.url),
            tmp_path / "out",
        )
    assert arm(summary, "prompt")["num_requests"] == 6
    assert arm(summary, "truncate")["skipped"] is None
    assert "no lenvm plugin" in arm(summary, "hard")["skipped"]
    assert arm(summary, "hard")["equal_to"] is None
    assert "exponential_decay" in arm(summary, "eos_decay:1.01")["skipped"]
    assert "ending tokens" in arm(summary, "eos_bias:3")["skipped"]
    assert "tokenizer" in arm(summary, "countdown")["skipped"]
    assert len(summary["notes"]) == 4


def test_failed_requests_are_counted_and_score_nothing(file, tmp_path):
    def fail(body):
        return 400 if "Task 1" in body["messages"][0]["content"] else None

    with running(Stub(fail=fail)) as stub:
        summary = run_lifebench(
            config(file, "hard", constraints=("at_most",)), connect(stub.url), tmp_path / "out"
        )
    hard = arm(summary, "hard")
    assert (summary["num_failed"], hard["num_failed"], hard["num_requests"]) == (2, 2, 6)
    assert hard["at_most"]["score"]["value"] == pytest.approx(100 * 2 / 3)
    assert hard["at_most"]["quality"]["ended_by_eos"]["value"] == pytest.approx(2 / 3)


def test_a_target_over_the_servers_limit_is_refused_before_the_first_request(file, tmp_path):
    with running(Stub(max_length=4096)) as stub:
        generator = connect(stub.url)
        with pytest.raises(
            InputError, match="targets 4096, 8192 tokens are over the limit of 4096"
        ):
            run_lifebench(
                config(file, "prompt", targets=(16, 4096, 8192)), generator, tmp_path / "out"
            )
        with pytest.raises(InputError, match="lower max_tokens"):
            run_lifebench(config(file, "prompt", max_tokens=5000), generator, tmp_path / "out")
    assert stub.bodies == []


def test_an_interrupted_run_continues_and_ends_with_the_same_summary(file, tmp_path):
    whole = Scripted(lambda r: GenerationResponse(r.id, "a b c.", 30, 5, "stop", -0.5))
    expected = run_lifebench(config(file, "prompt", "hard"), whole, tmp_path / "whole")

    class Stops(Scripted):
        def generate(self, requests, on_response):
            for i, request in enumerate(requests):
                if i == 5:
                    raise KeyboardInterrupt
                on_response(GenerationResponse(request.id, "a b c.", 30, 5, "stop", -0.5))

    with pytest.raises(KeyboardInterrupt):
        run_lifebench(config(file, "prompt", "hard"), Stops(), tmp_path / "part")
    rest = Scripted(whole.script)
    assert run_lifebench(config(file, "prompt", "hard"), rest, tmp_path / "part") == expected
    assert len(rest.asked) == 7


def test_a_folder_of_before_there_were_penalties_goes_on_and_none_is_mixed_in(file, tmp_path):
    summary = run_lifebench(config(file, "prompt"), Scripted(), tmp_path / "out")
    before = {"temperature": 1.0, "top_p": 0.999, "top_k": 15, "min_p": 0.0, "seed": None}
    assert summary["config"]["sampling"] == before
    penalised = config(file, "prompt", sampling=Sampling(**before, frequency_penalty=0.3))
    with pytest.raises(InputError):
        run_lifebench(penalised, Scripted(), tmp_path / "out")
    generator = Scripted()
    other = run_lifebench(penalised, generator, tmp_path / "other")
    assert other["config"]["sampling"] == before | {"frequency_penalty": 0.3}
    assert {r.sampling.frequency_penalty for r in generator.asked} == {0.3}


def test_another_configuration_in_an_old_folder_is_refused(file, tmp_path):
    run_lifebench(config(file, "prompt"), Scripted(), tmp_path / "out")
    with pytest.raises(InputError, match="targets"):
        run_lifebench(config(file, "prompt", targets=(64,)), Scripted(), tmp_path / "out")
    with pytest.raises(InputError, match="sampling"):
        run_lifebench(
            config(file, "prompt", sampling=Sampling(temperature=0)), Scripted(), tmp_path / "out"
        )
    file.write_text(file.read_text().replace("Task 0", "Task zero"))
    with pytest.raises(InputError, match="file_sha256"):
        run_lifebench(config(file, "prompt"), Scripted(), tmp_path / "out")


def test_grading_again_sends_nothing_and_gives_the_same(file, tmp_path):
    with running(Stub(plugin=None)) as stub:
        summary = run_lifebench(config(file, "prompt", "hard"), connect(stub.url), tmp_path / "o")
    (tmp_path / "o" / "grades.jsonl").unlink()
    assert regrade_lifebench(tmp_path / "o") == summary
    assert (tmp_path / "o" / "grades.jsonl").exists()


def record(text="One two three.", num_tokens=5, finish="stop", error=None, arm="soft:1", **case):
    fields = {"constraint": "equal_to", "target": 10, "unit": "tokens", "category": "qa"}
    return {
        "id": "x",
        "arm": arm,
        "item": "1",
        "sample": 0,
        "case": {**fields, "type": "t", "language": "en", **case},
        "text": text,
        "num_tokens": num_tokens,
        "finish_reason": finish,
        "mean_log_prob": -0.7,
        "visible_tokens": None,
        "latency_s": 0.5,
        "error": error,
    }


def test_a_grade_by_hand():
    grade = grade_record(record())
    assert grade["length"] == 5
    assert grade["deviation"] == -0.5
    assert grade["score"] == pytest.approx(100 * math.exp(-2.5))
    assert grade["controlled_score"] == grade["score"]
    assert (grade["log_prob"], grade["natural_end"]) == (-0.7, True)
    assert grade["ms_per_token"] == 100.0  # 0.5 s for 5 tokens


def test_an_answer_that_was_cut_off_is_not_controlled():
    grade = grade_record(record(num_tokens=10, finish="length"))
    assert (grade["score"], grade["controlled_score"]) == (100, 0)


@pytest.mark.parametrize("fields", [{"text": " \n"}, {"text": "", "error": "HTTP 500"}])
def test_nothing_said_scores_nothing_even_at_most(fields):
    grade = grade_record(record(constraint="at_most", num_tokens=1, **fields))
    assert (grade["score"], grade["deviation"], grade["rep_4"]) == (0, -1, None)
    assert grade["natural_end"] is False


def test_the_same_records_score_as_the_benchmark_scores_them(file, tmp_path):
    """LIFEBench's own way, from records.jsonl alone: per answer, averaged per target, then over
    targets; the deviation as the mean of |LD|."""
    lengths = iter([3, 21, 20, 200, 41, 79, 80, 81, 160, 16, 19, 24] * 9)
    script = lambda r: GenerationResponse(r.id, "a b c.", next(lengths), 5, "stop")  # noqa: E731
    constraints = ("equal_to", "at_most", "at_least")
    values = {"constraints": constraints, "num_samples": 2, "targets": (16, 20, 80)}
    summary = run_lifebench(config(file, "prompt", **values), Scripted(script), tmp_path / "out")
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    rows = [(r["case"], r["num_tokens"]) for r in map(json.loads, lines)]

    def score(constraint: str, ld: float) -> float:
        if (constraint == "at_most" and ld < 0) or (constraint == "at_least" and ld > 0):
            return 100
        return 100 * math.exp(5 * ld) if ld < 0 else 100 * math.exp(-2 * ld)

    for constraint in constraints:
        scores, deviations = [], []
        for target in (16, 20, 80):
            lds = [
                (length - target) / target
                for case, length in rows
                if (case["constraint"], case["target"]) == (constraint, target)
            ]
            assert len(lds) == 6
            scores.append(sum(score(constraint, ld) for ld in lds) / 6)
            deviations.append(sum(map(abs, lds)) / 6)
        found = arm(summary, "prompt")[constraint]
        assert found["score"]["value"] == pytest.approx(sum(scores) / 3, rel=1e-12)
        assert found["deviation"]["value"] == pytest.approx(sum(deviations) / 3, rel=1e-12)
        by_target = [row["score"]["value"] for row in found["by_target"]]
        assert by_target == pytest.approx(scores, rel=1e-12)


def test_words_are_counted_where_words_are_asked_for():
    assert grade_record(record(unit="words"))["length"] == 3


def test_countdown_marks_do_not_count():
    assert strip_countdown("<3> One <2> two <1>three.") == "One two three."
    marked = record(text="<3> One <2> two <1>three.", arm="countdown", unit="words")
    assert grade_record(marked)["length"] == 3
    in_tokens = {**marked, "case": {**marked["case"], "unit": "tokens"}, "visible_tokens": 4}
    assert grade_record(in_tokens)["length"] == 4


def test_the_countdown_arm_asks_for_words_and_counts_what_is_left(file, tmp_path):
    generator = Scripted(lambda r: GenerationResponse(r.id, "<2> a <1> b.", 9, 5, "stop"))
    summary = run_lifebench(config(file, "countdown", targets=(27,)), generator, tmp_path / "o")
    assert "<20>" in generator.asked[0].messages[0]["content"]  # 27 tokens are 20 words
    target = arm(summary, "countdown")["equal_to"]["by_target"][0]
    assert target["mean_length"]["value"] == 2


def test_the_loss_of_quality_is_paired_with_the_prompt_arm(file, tmp_path):
    def script(request):
        item = int(request.messages[0]["content"][5])
        loss = 0.0 if request.control is None else 0.25
        return GenerationResponse(request.id, "a b c.", 20, 5, "stop", -item - loss)

    fourth = json.loads(file.read_text().splitlines()[0]) | {
        "id": 3,
        "task": "Task 3: {word_count_type} {word_count}",
    }
    file.write_text(file.read_text() + json.dumps(fourth) + "\n")
    summary = run_lifebench(config(file, "prompt", "hard"), Scripted(script), tmp_path / "o")
    loss = arm(summary, "hard")["quality"]["log_prob_loss"]
    assert loss == {k: pytest.approx(0.25) for k in ("value", "low", "high")}


def test_arms_without_log_probabilities_of_the_generator_say_so(file, tmp_path):
    with running(Stub(plugin="sglang")) as stub:
        summary = run_lifebench(config(file, "prompt", "hard"), connect(stub.url), tmp_path / "o")
    assert summary["notes"] == [
        "hard: the server reports no log-probabilities of the generator itself"
    ]
    assert arm(summary, "hard")["quality"]["log_prob"] is None
    assert arm(summary, "hard")["quality"]["log_prob_loss"] is None
    assert arm(summary, "prompt")["quality"]["log_prob"]["value"] == -1


def test_a_judge_rates_through_its_own_endpoint_once_per_answer(file, tmp_path):
    def judge_answer(body):
        assert "Task" in body["messages"][0]["content"]
        assert body["temperature"] == 0
        return say("Fine. Rating: 8", 6)

    with running(Stub(answer=echo_length)) as stub, running(Stub(answer=judge_answer)) as other:
        judge = Judge(connect(other.url))
        summary = run_lifebench(
            config(file, "prompt"), connect(stub.url), tmp_path / "o", judge=judge
        )
        run_lifebench(config(file, "prompt"), connect(stub.url), tmp_path / "o", judge=judge)
    assert len(other.bodies) == 6
    assert arm(summary, "prompt")["quality"]["judge"]["value"] == 8


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good.\nRating: 7", 7),
        ("**Rating:** 10", 10),
        ("rating: 3/10", 3),
        ("Rating: 11", None),
        ("Rating: 7.5", None),
        ("Rating: 2 ... Rating: 9.", 9),
        ("no number", None),
    ],
)
def test_ratings_are_parsed(text, rating):
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ()},
        {"targets": (0,)},
        {"unit": "lines"},
        {"constraints": ("about",)},
        {"num_samples": 0},
    ],
)
def test_configurations_that_cannot_be_are_refused(file, fields):
    with pytest.raises(InputError):
        config(file, "prompt", **fields)


def test_a_control_out_of_range_is_refused_before_the_first_request(file, tmp_path):
    generator = Scripted()
    with pytest.raises(InputError, match="top_k"):
        run_lifebench(config(file, "hard", control={"top_k": 0}), generator, tmp_path / "o")
    assert generator.asked == []
