"""The trade-off's arms: the request that each makes of a question. Sampling is the same for all."""

from dataclasses import dataclass, field
from typing import Any

from lenvm.evals.arms import Arm, match_truncation
from lenvm.evals.generator import GenerationRequest, Sampling
from lenvm.evals.tradeoff.items import Question
from lenvm.guidance.request import LengthControl

OWN = ("shortest", "price", "tilt", "at_most")
"""LenVM's, of which each is the name of a control's goal."""
KINDS = ("prompt", *OWN, "budget", "budget_answer", "concise", "eos_bias")
FORCED = "\n\nThe final answer is \\boxed{"
FORCED_TOKENS = 48


@dataclass(frozen=True)
class ArmSettings:
    """What all arms of a run share."""

    sampling: Sampling
    max_tokens: int
    control: dict[str, Any] = field(default_factory=dict)


def build_request(arm: Arm, question: Question, s: ArmSettings, case_id: str) -> GenerationRequest:
    """The request of one arm for one question; of `budget_answer`, the first of its two."""
    max_tokens = s.max_tokens
    if arm.kind in ("budget", "budget_answer"):
        max_tokens = min(max_tokens, int(arm.parameter or 0))
    control = None
    if arm.kind in OWN:
        value = int(arm.parameter or 0) if arm.kind == "at_most" else arm.parameter
        shared = match_truncation(s.sampling) | s.control | dict(arm.settings)
        fields = shared | {arm.kind: value}
        control = LengthControl.parse(fields)
    return GenerationRequest(
        id=case_id,
        messages=question.messages(concise=arm.kind == "concise"),
        max_tokens=max_tokens,
        sampling=s.sampling,
        control=control,
        eos_bias=arm.parameter or 0.0 if arm.kind == "eos_bias" else 0.0,
    )


def end_of_box(continuation: str) -> int:
    """Where a continuation of `\\boxed{` closes it, the brace included; else its end."""
    depth = 1
    for index, character in enumerate(continuation):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return index + 1
    return len(continuation)


def force_answer(draft: str) -> str:
    """A draft that was cut off, up to where the answer has to stand."""
    thinking = "<think>" in draft and "</think>" not in draft
    return draft + ("\n</think>" if thinking else "") + FORCED
