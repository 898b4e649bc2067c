"""The runner: resuming, failures, another configuration, one answer per case."""

import json

import pytest

from lenvm.errors import DataError, EndpointError, InputError
from lenvm.evals.generator import GenerationRequest, GenerationResponse, Sampling
from lenvm.evals.runner import (
    Case,
    load_config,
    load_records,
    note_missing,
    run_cases,
    write_results,
)


class Scripted:
    """A generator in memory: `script(request)` answers, or raises."""

    model, max_length = "scripted", None

    def __init__(self, script=lambda r: GenerationResponse(r.id, "ok.", 3, 2, "stop", -1.0)):
        self.script, self.asked = script, []

    def lacks(self, feature):
        return None

    def count_tokens(self, text):
        return len(text.split())

    def generate(self, requests, on_response):
        for request in requests:
            self.asked.append(request)
            if (answer := self.script(request)) is not None:
                on_response(answer)


def cases(count: int = 4, **fields) -> list[Case]:
    return [
        Case(
            arm="prompt",
            item=str(i),
            sample=0,
            request=GenerationRequest(
                f"prompt/{i}", ({"role": "user", "content": "x"},), 8, **fields
            ),
            fields={"gold": i},
        )
        for i in range(count)
    ]


def test_every_case_is_answered_once_and_kept_in_order(tmp_path):
    generator = Scripted()
    records = run_cases(tmp_path, "test", {"a": 1}, cases(), generator)
    assert [r["id"] for r in records] == [f"prompt/{i}" for i in range(4)]
    assert records[2]["case"] == {"gold": 2}
    again = Scripted()
    assert run_cases(tmp_path, "test", {"a": 1}, cases(), again) == records
    assert again.asked == []


def test_an_interrupted_run_asks_only_for_the_rest(tmp_path):
    def dies_at_two(request):
        if request.id == "prompt/2":
            raise EndpointError("gone")
        return GenerationResponse(request.id, "ok.", 3, 2, "stop")

    with pytest.raises(EndpointError):
        run_cases(tmp_path, "test", {}, cases(), Scripted(dies_at_two))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"schema": "lenvm.eval.record/1", "id": "prompt/2", "te')  # kill -9
    rest = Scripted()
    records = run_cases(tmp_path, "test", {}, cases(), rest)
    assert [r.id for r in rest.asked] == ["prompt/2", "prompt/3"]
    assert [r["error"] for r in records] == [None] * 4
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 4


def test_failures_are_records_and_are_asked_again(tmp_path):
    def fails(request):
        return GenerationResponse(request.id, error="HTTP 500: told to")

    records = run_cases(tmp_path, "test", {}, cases(), Scripted(fails))
    assert [r["error"] for r in records] == ["HTTP 500: told to"] * 4
    again = Scripted()
    records = run_cases(tmp_path, "test", {}, cases(), again)
    assert len(again.asked) == 4
    assert [r["error"] for r in records] == [None] * 4
    assert len(load_records(tmp_path)) == 4


def test_a_request_without_an_answer_is_a_failure(tmp_path):
    records = run_cases(tmp_path, "test", {}, cases(1), Scripted(lambda r: None))
    assert records[0]["error"] == "the generator gave no answer"


def test_another_configuration_is_refused_with_both_shown(tmp_path):
    run_cases(tmp_path, "test", {"targets": [64]}, cases(), Scripted())
    with pytest.raises(InputError, match=r"\[64\] there, \[128\] now"):
        run_cases(tmp_path, "test", {"targets": [128]}, cases(), Scripted())
    with pytest.raises(InputError, match=r"eval\.test"):
        run_cases(tmp_path, "other", {"targets": [64]}, cases(), Scripted())


def test_each_request_gets_its_own_seed_and_keeps_it(tmp_path):
    generator = Scripted()
    run_cases(tmp_path, "test", {}, cases(sampling=Sampling(seed=7)), generator)
    seeds = [r.sampling.seed for r in generator.asked]
    assert len(set(seeds)) == 4
    again = Scripted()
    run_cases(tmp_path / "b", "test", {}, cases(sampling=Sampling(seed=7)), again)
    assert [r.sampling.seed for r in again.asked] == seeds


def test_visible_tokens_are_counted_where_a_case_asks(tmp_path):
    case = Case("a", "1", 0, cases(1)[0].request, count_visible=lambda t: t + " more words")
    (record,) = run_cases(tmp_path, "test", {}, [case], Scripted())
    assert record["visible_tokens"] == 3


def test_records_of_something_else_are_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(DataError, match="not a record"):
        load_records(tmp_path)


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    run_cases(tmp_path, "test", {"a": 1}, cases(1), Scripted())
    assert load_config(tmp_path, "test") == {"a": 1}
    with pytest.raises(DataError, match=r"eval\.test"):
        load_config(tmp_path, "lifebench")


def test_results_are_whole_files(tmp_path):
    summary = write_results(
        tmp_path,
        "test",
        model="m",
        config={"a": 1},
        grades=[{"id": "\ud800"}, {"id": "b"}],
        summary={"x": None},
        num_failed=1,
        notes=["left out"],
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["num_records"] == 2
    assert len((tmp_path / "grades.jsonl").read_bytes().splitlines()) == 2


def test_a_generator_that_stops_leaves_the_rest_to_the_next_run(tmp_path):
    def only_the_first(request):
        return GenerationResponse(request.id, "ok.") if request.id == "prompt/0" else None

    some = run_cases(tmp_path, "test", {}, cases(), Scripted(only_the_first), allow_missing=True)
    assert [r["id"] for r in some] == ["prompt/0"]
    assert len(load_records(tmp_path)) == 1
    rest = Scripted()
    assert len(run_cases(tmp_path, "test", {}, cases(), rest, allow_missing=True)) == 4
    assert [r.id for r in rest.asked] == ["prompt/1", "prompt/2", "prompt/3"]


def test_arms_that_lack_requests_of_others_are_named():
    rows = [{"arm": "a", "item": i, "sample": 0} for i in range(4)]
    rows += [{"arm": "b", "item": 1, "sample": 0}]
    rows += [{"arm": "c", "item": i, "sample": 0} for i in (0, 1, 2)]
    notes = note_missing(
        rows, "abcd", ("item", "sample"), lambda arm, grade: arm != "c" or grade["item"] < 3
    )
    assert [note[:36] for note in notes] == [
        "b: 3 of 4 requests were not sent, th",
        "d: 4 of 4 requests were not sent, th",
    ]
