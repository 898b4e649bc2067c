"""Grading in processes: order, equal tasks once, hangs and crashes."""

import time

import pytest

from lenvm.evals.tradeoff import grading_pool
from lenvm.evals.tradeoff.grading_pool import Task, grade_all


def test_results_come_in_order_and_equal_tasks_are_graded_once():
    tasks = [Task(f"\\boxed{{{i % 3}}}", "1", "math") for i in range(9)]
    seen = []
    results = grade_all(tasks, on_progress=lambda done, total: seen.append((done, total)))
    assert [r["correct"] for r in results] == [False, True, False] * 3
    assert seen[-1] == (3, 3)
    assert all(r["grader_error"] is None for r in results)


def test_a_gold_answer_that_cannot_be_parsed_is_an_error_of_the_grader():
    (result,) = grade_all([Task("\\boxed{1}", " ", "math")])
    assert not result["correct"]
    assert "is not mathematics" in result["grader_error"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import time; input(); time.sleep(60)", "took over 2 s"),
        ("input(); import os; os._exit(9)", "crashed"),
    ],
)
def test_a_process_that_hangs_or_dies_costs_one_answer(monkeypatch, code, message):
    monkeypatch.setattr(grading_pool, "COMMAND", ["-c", code])
    start = time.monotonic()
    results = grade_all([Task("a", "1", "math"), Task("b", "1", "math")], timeout_s=2)
    assert [message in r["grader_error"] for r in results] == [True, True]
    assert [r["correct"] for r in results] == [False, False]
    assert time.monotonic() - start < 30


def test_nothing_to_grade():
    assert grade_all([]) == []
