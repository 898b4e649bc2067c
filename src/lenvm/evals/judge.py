"""An optional judge: another model rates answers 1-10, through any OpenAI-compatible endpoint.

Ratings are appended to `judgements.jsonl` beside the records and are resumable like them. The judge
is told to leave the length out: length has its own score.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.evals.generator import GenerationRequest, GenerationResponse, Generator, Sampling
from lenvm.evals.runner import Progress, ignore_progress
from lenvm.files import JsonlWriter, claim, read_jsonl

INSTRUCTION = """You rate the quality of a text that a language model wrote for a task.

Judge: does it do what the task asks (leave out any request about its length), is it correct and
coherent, is the language natural, is it free of repetition, and does it come to an end?
Do not reward or punish length.

<task>
{task}
</task>

<text>
{text}
</text>

Give one sentence of reasons, then a last line of the form
Rating: N
where N is a whole number from 1 (useless) to 10 (excellent)."""
RATING = re.compile(r"rating\W{0,6}(10|[1-9])(?!\.?\d)", re.IGNORECASE)


def parse_rating(text: str) -> int | None:
    """The last rating from 1 to 10 of a judge's answer; None where there is none."""
    found = RATING.findall(text)
    return int(found[-1]) if found else None


@dataclass(frozen=True)
class Judge:
    """A judge model. `max_tokens` bounds its reasons."""

    generator: Generator
    max_tokens: int = 256

    def score(
        self,
        folder: Path,
        records: Sequence[dict[str, Any]],
        *,
        progress: Progress = ignore_progress,
    ) -> None:
        """Rate the records that have no rating yet. Answers that hold none are kept as `null`."""
        path = folder / "judgements.jsonl"
        claim(path, "eval.judgements", {"model": self.generator.model, "prompt": INSTRUCTION})
        texts = {r["id"]: r["text"] for r in records}
        done = {
            row["id"]
            for _, row in (read_jsonl(path) if path.exists() else ())
            if row["rating"] is not None and row["text"] == texts.get(row["id"])
        }
        rated = len(done)
        requests = [self._request(r) for r in records if r["id"] not in done]
        with JsonlWriter(path) as writer:

            def keep(response: GenerationResponse) -> None:
                rating = parse_rating(response.text) if response.error is None else None
                writer.write(
                    {
                        "id": response.id,
                        "rating": rating,
                        "text": texts[response.id],
                        "answer": response.text,
                        "error": response.error,
                    }
                )
                nonlocal rated
                rated += 1
                progress("judge", rated, len(records))

            self.generator.generate(requests, keep)

    def _request(self, record: dict[str, Any]) -> GenerationRequest:
        content = INSTRUCTION.format(task=record["case"]["prompt"], text=record["text"])
        return GenerationRequest(
            id=record["id"],
            messages=({"role": "user", "content": content},),
            max_tokens=self.max_tokens,
            sampling=Sampling(temperature=0.0),
        )


def load_judgements(folder: Path) -> dict[str, float]:
    """Ratings by record id; {} where no judge ran. Answers without a rating are absent."""
    path = folder / "judgements.jsonl"
    if not path.exists():
        return {}
    return {r["id"]: float(r["rating"]) for _, r in read_jsonl(path) if r["rating"] is not None}
