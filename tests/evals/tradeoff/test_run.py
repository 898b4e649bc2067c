"""The whole trade-off against a real local server; questions of every shape."""

import json
import re
from pathlib import Path

import pytest

from evals.stub import Stub, find_control, running, say
from evals.test_runner import Scripted
from lenvm.errors import DataError, InputError
from lenvm.evals.arms import parse_arms
from lenvm.evals.client import connect
from lenvm.evals.generator import GenerationResponse, Sampling
from lenvm.evals.tradeoff.arms import KINDS, force_answer
from lenvm.evals.tradeoff.grading import join_forced
from lenvm.evals.tradeoff.items import load_questions
from lenvm.evals.tradeoff.run import TradeoffConfig, regrade_tradeoff, run_tradeoff

SHARED = Path("/work/shared/data")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": f"work\n#### {2 * i}"} for i in range(4)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def config(file: Path, *arms: str, **fields) -> TradeoffConfig:
    values = {"num_samples": 2, "max_tokens": 200} | fields
    return TradeoffConfig(str(file), tuple(parse_arms(arms, KINDS)), **values)


def arm(summary, name):
    return next(a for a in summary["arms"] if a["arm"] == name)


def sums(body):
    """Right after 100 tokens; a tilt s takes 100 - s; question 3 is always answered wrongly."""
    question = body["messages"][0]["content"]
    n = int(re.search(r"What is (\d+)", question)[1])
    right = 2 * n if n != 3 else 0
    if body["messages"][-1]["role"] == "assistant":
        return say(f"{right}}}", 5)
    need = 100 - int((find_control(body) or {}).get("tilt", 0))
    if "concise" in question:
        need = 60
    if body["max_tokens"] < need:
        return say("Let me think", body["max_tokens"], "length")
    return say(f"Let me think. The answer is \\boxed{{{right}}}.", need)


def test_accuracy_against_length_arm_by_arm(file, tmp_path):
    with running(Stub(answer=sums)) as stub:
        summary = run_tradeoff(
            config(file, "prompt", "tilt:12.5", "tilt:40", "budget:50", "concise"),
            connect(stub.url),
            tmp_path / "out",
        )
        bodies = stub.bodies
    assert arm(summary, "prompt")["pass_at_1"]["value"] == 0.75
    assert arm(summary, "prompt")["mean_length"]["value"] == 100
    assert arm(summary, "tilt:12.5")["mean_length"]["value"] == 88
    assert arm(summary, "tilt:40")["relative_length"]["value"] == pytest.approx(0.6)
    assert arm(summary, "tilt:40")["pass_at_k"] == {
        "1": arm(summary, "tilt:40")["pass_at_1"],
        "2": arm(summary, "tilt:40")["pass_at_1"],
    }
    assert arm(summary, "budget:50")["pass_at_1"]["value"] == 0
    assert arm(summary, "budget:50")["truncated"]["value"] == 1
    assert arm(summary, "budget:50")["quality"]["ended_by_eos"]["value"] == 0
    assert arm(summary, "tilt:40")["quality"]["natural_end"]["value"] == 1
    assert arm(summary, "tilt:40")["quality"]["log_prob_loss"]["value"] == 0
    assert arm(summary, "prompt")["quality"]["ms_per_token"]["value"] > 0
    assert summary["pareto"] == ["budget:50", "tilt:40"]
    assert summary["curves"]["tilt"]["arms"] == ["tilt:40", "tilt:12.5", "prompt"]
    at = {a["fraction"]: a["accuracy"] for a in summary["curves"]["tilt"]["accuracy_at"]}
    assert at[0.667]["value"] == pytest.approx(0.75)
    assert at[0.5] is None
    # tilt is flat at .75; budget goes 0 -> .75 on [50, 100], so the mean gap on [60, 100] is .3
    area = next(a for a in summary["area_between"] if a["against"] == "budget")
    assert (area["from"], area["to"]) == (60, 100)
    assert area["area"]["value"] == pytest.approx(0.3)
    # the same sampling and the same truncation for every arm
    assert {(b["temperature"], b["top_p"], b["min_p"]) for b in bodies} == {(1.0, 1.0, 0.01)}
    assert {b["max_tokens"] for b in bodies} == {200, 50}
    assert {json.dumps(c) for b in bodies if (c := find_control(b))} == {
        json.dumps({"tilt": s, "top_k": 256, "top_p": 1.0, "min_p": 0.01}) for s in (12.5, 40.0)
    }


def test_a_forced_answer_continues_the_draft_and_counts_both(file, tmp_path):
    with running(Stub(answer=sums)) as stub:
        summary = run_tradeoff(
            config(file, "prompt", "budget_answer:50"), connect(stub.url), tmp_path / "out"
        )
        forced = [b for b in stub.bodies if b["messages"][-1]["role"] == "assistant"]
        again = connect(stub.url)
        stub.bodies.clear()
        assert run_tradeoff(
            config(file, "prompt", "budget_answer:50"), again, tmp_path / "out"
        ) == (summary)
        assert stub.bodies == []
    found = arm(summary, "budget_answer:50")
    assert found["pass_at_1"]["value"] == 0.75
    assert found["mean_length"]["value"] == 55
    assert found["num_requests"] == 8
    assert len(forced) == 8
    assert forced[0]["messages"][-1]["content"].endswith("The final answer is \\boxed{")
    assert forced[0]["continue_final_message"] is True


def test_a_forced_answer_ends_with_its_box():
    draft = {"text": "So", "num_tokens": 10, "error": None, "case": {}, "latency_s": 2.0}
    forced = {
        "text": "\\frac{1}{2}} and \\boxed{7}",
        "num_tokens": 9,
        "error": None,
        "latency_s": 0.5,
    }
    answer = join_forced(draft, forced)
    assert answer["text"].endswith("is \\boxed{\\frac{1}{2}}")
    assert answer["num_tokens"] == 10 + 5  # 13 of 27 characters
    assert answer["latency_s"] == 2.5
    open_ended = join_forced(draft, {**forced, "text": "7 and"})
    assert open_ended["num_tokens"] == 19


def test_thinking_is_closed_before_an_answer_is_forced():
    assert force_answer("<think>so").startswith("<think>so\n</think>\n\n")
    assert "</think>" not in force_answer("so").replace("so", "")
    assert force_answer("<think>a</think> b").count("</think>") == 1


def test_failed_requests_are_wrong_and_counted(file, tmp_path):
    def script(request):
        if "What is 1" in request.messages[0]["content"]:
            return GenerationResponse(request.id, error="HTTP 500")
        return GenerationResponse(request.id, "\\boxed{4}", 10, 5, "stop")

    summary = run_tradeoff(config(file, "prompt"), Scripted(script), tmp_path / "out")
    assert summary["num_failed"] == 2
    assert arm(summary, "prompt")["pass_at_1"]["value"] == 0.25  # question 2 of 4
    assert arm(summary, "prompt")["mean_length"]["value"] == 10


def test_an_arm_of_failures_alone_has_no_length(file, tmp_path):
    def script(request):
        if request.control is not None:
            return GenerationResponse(request.id, error="HTTP 500")
        return GenerationResponse(request.id, "\\boxed{4}", 10, 5, "stop")

    summary = run_tradeoff(config(file, "prompt", "tilt:3"), Scripted(script), tmp_path / "out")
    assert arm(summary, "tilt:3")["pass_at_1"]["value"] == 0
    assert arm(summary, "tilt:3")["mean_length"] is None


def test_without_the_plugin_the_other_arms_run(file, tmp_path):
    with running(Stub(plugin=None, answer=sums)) as stub:
        summary = run_tradeoff(
            config(file, "prompt", "tilt:3", "budget:50", "at_most:50"),
            connect(stub.url),
            tmp_path / "out",
        )
    assert "no lenvm plugin" in arm(summary, "tilt:3")["skipped"]
    assert arm(summary, "at_most:50")["pass_at_1"] is None
    assert arm(summary, "budget:50")["pass_at_1"]["value"] == 0
    assert list(summary["curves"]) == ["budget"]


def test_without_the_unguided_arm_there_are_points_but_no_curves(file, tmp_path):
    with running(Stub(answer=sums)) as stub:
        summary = run_tradeoff(config(file, "tilt:3"), connect(stub.url), tmp_path / "out")
    assert summary["curves"] == {}
    assert arm(summary, "tilt:3")["relative_length"] is None


def test_grading_again_gives_the_same(file, tmp_path):
    generator = Scripted(lambda r: GenerationResponse(r.id, "\\boxed{4}", 10, 5, "stop"))
    summary = run_tradeoff(config(file, "prompt", "tilt:2"), generator, tmp_path / "out")
    assert regrade_tradeoff(tmp_path / "out") == summary


def test_another_configuration_and_other_questions_are_refused(file, tmp_path):
    generator = Scripted(lambda r: GenerationResponse(r.id, "\\boxed{4}", 10, 5, "stop"))
    run_tradeoff(config(file, "prompt"), generator, tmp_path / "out")
    with pytest.raises(InputError, match="min_p"):
        run_tradeoff(config(file, "prompt", sampling=Sampling()), generator, tmp_path / "out")
    file.write_text(file.read_text().replace("What is 0", "How much is 0"))
    with pytest.raises(InputError, match="questions"):
        run_tradeoff(config(file, "prompt"), generator, tmp_path / "out")


def test_max_tokens_over_the_servers_limit_is_refused(file, tmp_path):
    with running(Stub(max_length=200)) as stub, pytest.raises(InputError, match="lower max_tokens"):
        run_tradeoff(config(file, "prompt"), connect(stub.url), tmp_path / "out")


@pytest.mark.parametrize("fields", [{"num_samples": 0}, {"max_tokens": 0}])
def test_configurations_that_cannot_be_are_refused(file, fields):
    with pytest.raises(InputError):
        config(file, "prompt", **fields)


# -- questions ------------------------------------------------------------------------------------


def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_questions_of_the_usual_shapes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"jpg")
    source = write(
        tmp_path / "x.jsonl",
        {"question": "Q1", "answer": "so 2\n#### 1,234"},
        {"problem": "Q2", "solution": "long", "answer": r"\frac{1}{2}", "unique_id": "test/2.json"},
        {"Problem": "Q3", "Answer": 204, "ID": "2024-I-1"},
        {"question": "<image1> Q4", "options": ["red", "blue"], "answer": "B", "image": "a.jpg"},
        {"query": "Q5", "choices": ["12", "15"], "answer": "15", "pid": 7},
        {"question": "Who?", "answer": r"\text{Evelyn}"},
    )
    one, two, three, four, five, six = load_questions(source)
    assert (one.id, one.gold, one.kind) == ("0", "1,234", "math")
    assert (two.id, two.gold) == ("test/2.json", r"\frac{1}{2}")
    assert (three.id, three.gold, three.kind) == ("2024-I-1", "204", "math")
    assert (four.gold, four.kind) == ("B", "choice")
    assert (five.gold, five.kind) == ("B", "choice")
    assert six.kind == "text"
    picture, text = four.messages(concise=False)[0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert text["text"].startswith("Q4\n\nA. red\nB. blue\n\n")
    assert "letter of the right choice" in text["text"]
    assert "Be concise" in one.prompt(concise=True)
    assert "Be concise" not in one.prompt(concise=False)
    assert len(load_questions(source, limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "no question"),
        ({"question": "Q"}, "no answer"),
        ({"question": "Q", "answer": "x", "options": ["a", "b"]}, "none of the options"),
        ({"question": "Q", "answer": "1", "image": "gone.jpg"}, "gone.jpg"),
    ],
)
def test_rows_that_cannot_be_used_name_their_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as caught:
        load_questions(write(tmp_path / "x.jsonl", {"question": "Q", "answer": "1"}, row))
    assert "x.jsonl:2" in str(caught.value)


def test_an_id_twice_and_an_empty_file_are_refused(tmp_path):
    row = {"question": "Q", "answer": "1", "id": 1}
    with pytest.raises(DataError, match="occurs twice"):
        load_questions(write(tmp_path / "x.jsonl", row, row))
    with pytest.raises(DataError, match="no questions"):
        load_questions(write(tmp_path / "y.jsonl"))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data folder is not here")
@pytest.mark.parametrize(
    ("name", "count"),
    [("gsm8k/test_first660.jsonl", 660), ("math/math500_first250.jsonl", 250)],
)
def test_the_shared_benchmarks_load(name, count):
    assert len(load_questions(str(SHARED / name))) == count


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data folder is not here")
def test_the_questions_of_math_vision_that_have_their_image_load():
    questions = load_questions(str(SHARED / "math_vision/testmini.jsonl"), limit=100)
    assert len(questions) == 100
    assert {q.kind for q in questions} == {"choice", "math"}
