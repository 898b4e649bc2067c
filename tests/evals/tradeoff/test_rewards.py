"""Trajectories as `lenvm sample` writes them, graded by their own gold answers or a file's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lenvm.data.completers import Sampled, SampleRequest
from lenvm.data.pool import to_trajectory
from lenvm.data.prompts import load_prompts
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.errors import DataError, InputError
from lenvm.evals.tradeoff import rewards
from lenvm.evals.tradeoff.items import load_questions
from lenvm.evals.tradeoff.rewards import RewardCounts, RewardReport, grade_trajectories

SUM = {"question": "What is 1 + 1?", "answer": "One and one.\n#### 2", "domain": "math"}
CHOICE = {
    "question": "What is red?",
    "options": ["the sky", "a rose"],
    "answer": "a rose",
    "domain": "science",
}
HAIKU = {"question": "Write a haiku.", "domain": "poems"}
Answer = tuple[str, str]
"""Text and finish reason."""


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(
    folder: Path, rows: Sequence[dict[str, Any]], answers: Sequence[Answer], **changes: Any
) -> Path:
    """A trajectory file: the prompts of `rows`, with one completion each."""
    prompts = load_prompts(str(write(folder / "prompts.jsonl", rows)))
    found = [
        to_trajectory(SampleRequest(p, (0,)), 0, Sampled(text, reason, [1], [5, 2]), "tiny")
        for p, (text, reason) in zip(prompts, answers, strict=True)
    ]
    found = [t.model_copy(update=changes) for t in found]
    path = folder / "t.jsonl"
    path.write_bytes(b"".join(t.to_json_line() + b"\n" for t in found))
    return path


def grade(path: Path, **options: Any) -> tuple[list[Trajectory], RewardReport]:
    output = path.with_name("graded.jsonl")
    report = grade_trajectories(path, output, **options)
    return list(read_trajectories(output)), report


@pytest.mark.parametrize(
    ("row", "text", "reason", "reward"),
    [
        (SUM, "So it is \\boxed{2}.", "stop", 1.0),
        (SUM, "So it is \\boxed{3}.", "stop", 0.0),
        (SUM, "1 + 1 = 2", "stop", 1.0),
        (SUM, "1 + 1 = 2", "length", 0.0),
        (SUM, "The answer is 2, and to be sure", "length", 1.0),
        (CHOICE, "\\boxed{B}", "stop", 1.0),
        (CHOICE, "The answer is A.", "stop", 0.0),
    ],
)
def test_an_answer_is_graded_by_the_fields_that_sampling_kept(
    row: dict[str, Any], text: str, reason: str, reward: float, tmp_path: Path
):
    path = sample(tmp_path, [row], [(text, reason)], reward=0.25)
    (graded,), report = grade(path)
    assert graded.reward == reward
    (before,) = read_trajectories(path)
    assert graded == before.model_copy(update={"reward": reward})
    assert report.total == RewardCounts(1, 1, int(reward))


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_what_has_no_answer_or_fails_passes_as_it_is_and_is_counted(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rewards, "BATCH", batch)
    odd = {**SUM, "question": "Which is odd?", "answer": "purple", "options": ["red", "blue"]}
    unread = {**SUM, "question": "And this?", "answer": "$"}
    listless = {**SUM, "question": "Which of them?", "options": {"A": "2"}}
    rows = [HAIKU, SUM, odd, unread, listless]
    answers = [("An old silent pond", "stop"), *[("\\boxed{2}", "stop")] * 4]
    path = sample(tmp_path, rows, answers, reward=0.25)
    seen: list[tuple[int, int]] = []
    graded, report = grade(path, on_progress=lambda *at: seen.append(at))
    assert [t.reward for t in graded] == [0.25, 1.0, 0.25, 0.25, 0.25]
    before, after = (p.read_bytes().splitlines() for p in (path, tmp_path / "graded.jsonl"))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]
    assert report.domains == {
        "poems": RewardCounts(num_completions=1, num_without_gold=1),
        "math": RewardCounts(4, num_graded=1, num_right=1, num_failed=3),
    }
    assert report.total == RewardCounts(5, 1, 1, 1, 3)
    assert "'purple' is none of the options" in str(report.failure)
    assert seen == sorted(seen)
    assert [at for at in seen if at[0] == 5] == [(5, 5)]


def test_questions_of_a_file_are_found_by_their_text_in_every_form(tmp_path: Path):
    source = write(tmp_path / "answers.jsonl", [SUM, CHOICE])
    questions = load_questions(str(source))
    forms = [q.prompt(concise=concise) for q in questions for concise in (False, True)]
    forms += [f"  {q.question}\n" for q in questions]
    right = ["2", "2", "B", "B", "2", "B"]
    answers = [(f"\\boxed{{{gold}}}", "stop") for gold in right]
    path = sample(tmp_path, [{"prompt": text} for text in forms], answers)
    graded, _ = grade(path, answers=str(source))
    assert [t.reward for t in graded] == [1.0] * 6
    system = {"role": "system", "content": "Be kind."}
    turns = [system, {"role": "user", "content": SUM["question"]}]
    own = {"prompt": "What is 1 + 1? ", "answer": "3"}
    rows = [{"messages": turns}, {"messages": [*turns, system]}]
    path = sample(tmp_path, rows, [("\\boxed{2}", "stop")] * 2)
    graded, _ = grade(path, answers=str(source))
    assert [t.reward for t in graded] == [1.0, 1.0]
    path = sample(tmp_path, [own], [("\\boxed{2}", "stop")])  # the metadata goes first
    graded, _ = grade(path, answers=str(source))
    assert [t.reward for t in graded] == [0.0]


def test_a_text_of_two_questions_is_not_guessed(tmp_path: Path):
    source = write(tmp_path / "answers.jsonl", [SUM, {**SUM, "answer": "3"}, SUM, CHOICE])
    rows = [{"prompt": SUM["question"]}, {"prompt": CHOICE["question"]}]
    path = sample(tmp_path, rows, [("\\boxed{2}", "stop"), ("\\boxed{B}", "stop")])
    graded, report = grade(path, answers=str(source))
    assert [t.reward for t in graded] == [None, 1.0]
    assert report.total.num_failed == 1
    assert "have different answers: What is 1 + 1?" in str(report.failure)


def test_an_answer_of_zero_is_one(tmp_path: Path):
    path = sample(tmp_path, [{"prompt": "1 - 1?", "answer": 0}], [("\\boxed{0}", "stop")])
    graded, _ = grade(path)
    assert graded[0].reward == 1.0


def test_what_cannot_be_graded_is_said_and_leaves_nothing(tmp_path: Path):
    path = sample(tmp_path, [HAIKU], [("An old silent pond", "stop")])
    with pytest.raises(
        DataError, match=r"no completion has a gold answer; looked for answer.*--an"
    ):
        grade(path)
    source = write(tmp_path / "answers.jsonl", [SUM])
    with pytest.raises(DataError, match=r"for its prompt in .*answers\.jsonl"):
        grade(path, answers=str(source))
    with pytest.raises(InputError, match="is the file to grade"):
        grade_trajectories(path, path.parent / "folder" / ".." / path.name)
    sample(tmp_path, [{**HAIKU, "answer": "$"}], [("An old silent pond", "stop")])
    with pytest.raises(DataError, match=r"though 1 have an answer; the first: .*not mathematics"):
        grade(path)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"t.jsonl", "prompts.jsonl", "answers.jsonl"}


def test_a_second_run_replaces_and_another_is_refused(tmp_path: Path):
    path = sample(tmp_path, [SUM], [("\\boxed{3}", "stop")])
    grade(path)
    sample(tmp_path, [SUM], [("\\boxed{2}", "stop")])
    graded, _ = grade(path)
    assert [t.reward for t in graded] == [1.0]
    with pytest.raises(InputError, match="made with other settings"):
        grade(path, answers="gsm8k")
