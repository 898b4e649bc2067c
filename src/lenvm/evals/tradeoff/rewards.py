"""Rewards of trajectories whose answers can be checked: 1.0 right, 0.0 wrong.

The gold answer is a field of the prompt's row (`items.find_gold`), which sampling keeps in the
trajectory's metadata, or that of a question file in which the prompt is found by its text. What is
right is the trade-off's rule (`grader`).
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path

from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.errors import DataError, InputError
from lenvm.evals.tradeoff.grading_pool import Result, Task, grade_all
from lenvm.evals.tradeoff.items import ANSWER, Gold, find_gold, load_questions
from lenvm.files import claiming, read_lines, replace_jsonl

BATCH = 16_384
"""Completions whose texts are in memory at once."""
Golds = dict[str, Gold | None]
"""Text of a prompt -> gold answer; None where questions with that text have different ones."""


@dataclass
class RewardCounts:
    """Completions of a domain."""

    num_completions: int = 0
    num_graded: int = 0
    num_right: int = 0
    num_without_gold: int = 0
    num_failed: int = 0
    """With a gold answer, and yet not graded."""


@dataclass
class RewardReport:
    """What was graded."""

    domains: dict[str, RewardCounts] = field(default_factory=dict)
    failure: str | None = None
    """The first of the failed ones, and why."""

    @property
    def total(self) -> RewardCounts:
        """Over all domains."""
        columns = zip(*map(astuple, self.domains.values()), strict=True)
        return RewardCounts(*map(sum, columns))


def grade_trajectories(
    source: Path,
    output: Path,
    *,
    answers: str | None = None,
    num_processes: int = 2,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RewardReport:
    """Write the trajectories of `source` to `output`, in order, with a reward where they can be
    graded; all others as they are.

    answers: questions (`load_questions`) for trajectories whose metadata has no gold answer; the
    user's last message is a question or what `Question.prompt` makes of it, white space apart. A
    completion that the grader fails at (a gold answer it cannot read, no end within its time) is
    neither right nor wrong: it is counted and keeps the reward it had. `output` is written once all
    are graded, and replaced in one step.

    Raises InputError where `output` is `source` or was made otherwise, or math-verify is missing;
    DataError where no completion could be graded.
    """
    if output.resolve() == source.resolve():
        raise InputError(f"{output} is the file to grade; name another one to write")
    with claiming(output, "trajectories", {"grades_of": str(source), "answers": answers}):
        golds = index_answers(answers) if answers else {}
        total = sum(1 for _ in read_lines(source))
        report = RewardReport()
        rewards: list[float | None] = []
        rows = _read_tasks(source, golds, report)
        while batch := list(islice(rows, BATCH)):
            results = iter(
                grade_all(
                    [task for _, _, task in batch if task is not None],
                    num_processes=num_processes,
                    on_progress=lambda done, _: on_progress(
                        min(len(rewards) + done, total - 1), total
                    ),
                )
            )
            for name, domain, task in batch:
                reward = None if task is None else _count(name, domain, next(results), report)
                rewards.append(reward)
            on_progress(len(rewards), total)
        if not report.total.num_graded:
            raise DataError(f"{source}: {_why_none(report, answers)}")
        with replace_jsonl(output) as writer:  # without what was sampled since
            for t, reward in zip(read_trajectories(source), rewards, strict=False):
                changed = t if reward is None else t.model_copy(update={"reward": reward})
                writer.write_lines([changed.to_json_line()])
    return report


def index_answers(source: str) -> Golds:
    """Gold answers of a question file by each text that its questions are asked with."""
    golds: Golds = {}
    for question in load_questions(source):
        gold = Gold(question.gold, question.kind, question.options)
        prompts = (question.prompt(concise=concise) for concise in (False, True))
        for text in map(_fold, (question.question, *prompts)):
            if golds.setdefault(text, gold) != gold:
                golds[text] = None
    return golds


def _read_tasks(
    source: Path, golds: Golds, report: RewardReport
) -> Iterator[tuple[str, str, Task | None]]:
    """(id, domain, what to grade) of each trajectory; counts those with nothing to grade."""
    for t in read_trajectories(source):
        counts = report.domains.setdefault(t.domain, RewardCounts())
        counts.num_completions += 1
        gold = None
        try:
            gold = _find(t, golds)
            counts.num_without_gold += gold is None
        except InputError as error:
            counts.num_failed += 1
            report.failure = report.failure or f"{t.id}: {error}"
        task = gold and Task(t.completion_text, *gold, complete=t.is_complete)
        yield t.id, t.domain, task


def _find(trajectory: Trajectory, golds: Golds) -> Gold | None:
    """Its own gold answer, else that of its question. InputError where it cannot be told."""
    if (own := find_gold(trajectory.metadata)) is not None:
        return own
    users = [m for m in trajectory.messages or () if m.get("role") == "user"]
    prompt = Prompt(users[-1:] or trajectory.messages, trajectory.prompt_text)
    text = _fold(prompt.text)
    if text in golds and golds[text] is None:
        raise InputError(f"questions with this text have different answers: {text:.80}")
    return golds.get(text)


def _count(name: str, domain: str, result: Result, report: RewardReport) -> float | None:
    """The reward; None where the grader failed."""
    counts = report.domains[domain]
    if result["grader_error"] is not None:
        counts.num_failed += 1
        report.failure = report.failure or f"{name}: {result['grader_error']}"
        return None
    counts.num_graded += 1
    counts.num_right += result["correct"]
    return float(result["correct"])


def _fold(text: str) -> str:
    return " ".join(text.split())


def _why_none(report: RewardReport, answers: str | None) -> str:
    if report.failure is not None:
        return (
            f"no completion could be graded, though {report.total.num_failed} have an answer; the "
            f"first: {report.failure}"
        )
    where = f" and for its prompt in {answers}" if answers else ""
    return (
        f"no completion has a gold answer; looked for {', '.join(ANSWER)} in its metadata{where}. "
        "`lenvm sample` keeps the prompt file's fields there; else name the questions with "
        "--answers: a file with question and answer in each row, or a benchmark such as gsm8k"
    )
