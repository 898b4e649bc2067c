"""Answers in the time there is: the same questions for every arm, none begun too late."""

import time
from dataclasses import dataclass, field

from recipes.results.answers import TimedGenerator
from recipes.results.collect import keep_complete

from lenvm.evals.generator import GenerationRequest, GenerationResponse


@dataclass
class Slow:
    """Answers one request at a time, each in `seconds`."""

    seconds: float = 0.0
    asked: list[str] = field(default_factory=list)
    model = "slow"

    def generate(self, requests, on_response):
        for request in requests:
            time.sleep(self.seconds)
            self.asked.append(request.id)
            on_response(GenerationResponse(request.id, "ok.", 5, 2, "stop"))


def request(request_id: str, **fields) -> GenerationRequest:
    return GenerationRequest(request_id, (), 8, **fields)


def test_answers_are_begun_sample_by_sample_and_item_by_item():
    inner = Slow()
    wanted = [f"{a}/{i}/equal_to-8/{s}" for a in ("prompt", "hard") for i in "01" for s in (0, 1)]
    generator = TimedGenerator(inner, time.monotonic() + 60)
    generator.generate((request(name) for name in wanted), lambda r: None)
    assert [(name[-1], name.split("/")[1]) for name in inner.asked] == [
        (s, i) for s in "01" for i in "01" for _ in range(2)
    ]
    assert (generator.num_begun, generator.num_left, generator.tokens) == (8, 0, 40)


def test_nothing_is_begun_after_the_end_but_forced_answers():
    inner = Slow(0.03)
    generator = TimedGenerator(inner, time.monotonic() + 0.1)
    generator.generate((request(f"prompt/{i:02}/0") for i in range(40)), lambda r: None)
    begun = len(inner.asked)
    assert 1 <= begun < 20
    assert generator.num_left == 40 - begun
    late = [request("budget_answer:3/00/0/forced", answer_prefix="so"), request("prompt/00/1")]
    generator.generate(late, lambda r: None)
    assert inner.asked[begun:] == ["budget_answer:3/00/0/forced"]
    assert generator.num_left == 41 - begun


def test_half_a_run_compares_the_arms_on_what_all_have_answered():
    def record(arm: str, item: str, sample: int, forced: bool = False) -> dict:
        return {"arm": arm, "item": item, "sample": sample, "case": {"forced": forced}}

    whole = [record(a, i, 0) for i in "ab" for a in ("prompt", "hard", "budget_answer:3")]
    forced = record("budget_answer:3", "a", 0, forced=True)
    part = [record("prompt", "a", 1), record("hard", "a", 1)]
    assert keep_complete([*whole, forced, *part]) == [*whole, forced]
