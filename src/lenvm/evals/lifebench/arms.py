"""LIFEBench's arms: the request that each way of length control makes of an item and a target."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lenvm.evals.arms import Arm, match_truncation
from lenvm.evals.generator import GenerationRequest, Sampling
from lenvm.evals.lifebench.items import Constraint, LifebenchItem, Unit
from lenvm.guidance.request import LengthControl

KINDS = (
    "prompt",
    "countdown",
    "truncate",
    "eos_decay",
    "eos_bias",
    "hard",
    "expected",
    "soft",
    "conditional",
)
TOKENS_PER_UNIT: dict[str, dict[Unit, float]] = {
    "en": {"tokens": 1.0, "words": 1.35, "characters": 0.25},
    "zh": {"tokens": 1.0, "words": 0.75, "characters": 0.75},
}
"""Rough rates of current tokenizers, for targets in words; `tokens_per_unit` overrides."""

COUNTDOWN = {
    "en": (
        "\n\nKeep count while you write: before every word put the number of words still to come "
        "in angle brackets, starting with <{0}> and counting down by one to <1>, and stop there. "
        "The bracketed numbers do not count as words."
    ),
    "zh": (
        "\n\n请边写边倒数：在每个字前用尖括号写出还剩多少字，从<{0}>开始，每次减一，直到<1>为止，"  # noqa: RUF001
        "然后停止。尖括号里的数字不计入字数。"
    ),
}
MARKER = re.compile(r"<\s*\d+\s*>[ \t]?")


def strip_countdown(text: str) -> str:
    """The text without its countdown marks."""
    return MARKER.sub("", text)


@dataclass(frozen=True)
class ArmSettings:
    """What all arms of a run share."""

    sampling: Sampling
    max_tokens: int
    unit: Unit = "tokens"
    tokens_per_unit: float | None = None
    control: dict[str, Any] = field(default_factory=dict)
    """Fields of LengthControl for the LenVM arms: tolerance, min_entropy ..."""

    def to_tokens(self, target: int, language: str) -> int:
        """The target in tokens."""
        rate = self.tokens_per_unit or TOKENS_PER_UNIT[language][self.unit]
        return max(1, round(target * rate))


def applies(arm: Arm, constraint: Constraint) -> bool:
    """False where an arm cannot serve a constraint: cutting off makes no answer longer."""
    return arm.kind != "truncate" or constraint != "at_least"


def build_request(
    arm: Arm, item: LifebenchItem, constraint: Constraint, target: int, s: ArmSettings, case_id: str
) -> GenerationRequest:
    """The request of one arm for one item. InputError (ControlError) for a control out of range."""
    prompt = item.prompt(constraint, target, s.unit)
    tokens = s.to_tokens(target, item.language)
    if arm.kind == "countdown":
        per_word = TOKENS_PER_UNIT[item.language]["words"]
        words = target if s.unit == "words" else max(1, round(tokens / per_word))
        prompt += COUNTDOWN[item.language].format(words)
    return GenerationRequest(
        id=case_id,
        messages=({"role": "user", "content": prompt},),
        max_tokens=min(tokens, s.max_tokens) if arm.kind == "truncate" else s.max_tokens,
        sampling=s.sampling,
        control=build_control(arm, constraint, tokens, match_truncation(s.sampling) | s.control),
        eos_bias=arm.parameter or 0.0 if arm.kind == "eos_bias" else 0.0,
        eos_decay=(tokens // 2, arm.parameter or 1.0) if arm.kind == "eos_decay" else None,
    )


def build_control(
    arm: Arm, constraint: Constraint, tokens: int, shared: Mapping[str, Any]
) -> LengthControl | None:
    """The control of a LenVM arm; None for the others."""
    if not arm.is_rule:
        return None
    fields: dict[str, Any] = {**shared, **dict(arm.settings), constraint: tokens, "rule": arm.kind}
    if arm.kind == "soft" or (arm.is_own_rule and arm.parameter is not None):
        fields["strength"] = arm.parameter
    if arm.kind == "conditional":
        fields["evidence"] = arm.parameter
    return LengthControl.parse(fields)
