"""What controls ask, as tensors: one row a request, so that mixed rules share one batch.

Built on the host when the set of requests that step together changes; between changes only the
count of generated tokens moves on. What must be known without waiting for the device (which rules
and gammas are in use, the widest top_k) is kept beside the tensors as plain Python.

Shape legend: R rows, E ending tokens, M tokens with a temperature factor.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm import returns
from lenvm.guidance.candidates import Truncation
from lenvm.guidance.request import MAX_CANDIDATES, LengthControl
from lenvm.model.device import upload
from lenvm.model.head import Peak


@dataclass(frozen=True)
class Guided:
    """A request as guidance sees it. `control` None = tracked only.

    Truncation of the request and of the control both apply. `generated_token_ids` resumes one.
    """

    prompt_token_ids: Sequence[int]
    control: LengthControl | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    generated_token_ids: Sequence[int] = ()


SHORT_RATE, LONG_RATE = 5.0, 2.0
"""LIFEBench's score is 100 exp(-rate * relative deviation), short of the target and past it."""
EXPECTED_MODES = ("mul", "linear", "exp", "length_mul")


@dataclass(frozen=True)
class Asked:
    """A control as numbers: found once a request, for every batch that it will be in."""

    rule: str | None
    """None: the generator."""
    gamma: float
    floats: tuple[float, ...]
    """low, high, scale, horizon, min_entropy, min_value, centre, below, above, may_end_from,
    must_end_from of `RuleParams`."""
    integers: tuple[int, ...]
    """mode, is_total, neutral."""

    @classmethod
    def read(
        cls, control: LengthControl | None, *, has_distribution: bool, gamma: float
    ) -> "Asked":
        """None leaves its row to the generator. A target without a rule gets `conditional` where
        the head allows, else `soft`. gamma: the checkpoint's, for a control that names none."""
        name = None if control is None else rule_name(control, has_distribution=has_distribution)
        gamma = gamma if control is None else control.gamma or gamma
        low, high = _bounds(control, gamma)
        control = control or LengthControl(tilt=0.0)
        scale, unchanged = _scale(control, name)
        gates = (control.horizon or math.inf, control.min_entropy, control.min_value)
        mode = EXPECTED_MODES.index(control.expected_mode)
        total = control.counts_tokens and not control.remaining
        strict = name != "hard" if control.strict is None else control.strict
        ends = (low, high) if total and strict else (-math.inf, math.inf)
        floats = (low, high, scale, *gates, *_peak(control), *ends)
        return cls(name, gamma, floats, (mode, total, scale == unchanged))


@dataclass
class RuleParams:
    """Per-row parameters, [R] each, and what is known of them on the host (no synchronisation).

    low and high are fp32 tokens, -inf and inf where open; in total where `is_total`, else still to
    come at every step. `num_generated` is t.
    """

    code: Tensor
    """Index into `rules`; -1: the generator."""
    low: Tensor
    high: Tensor
    is_total: Tensor
    scale: Tensor
    """Tilt scale s, soft strength, conditional evidence, or expected_scale."""
    centre: Tensor
    """Length that counts most, in total or still to come as `is_total` says; see `peak`."""
    below: Tensor
    """Nats that a token less than the centre costs."""
    above: Tensor
    """Nats that a token more than the centre costs."""
    may_end_from: Tensor
    """Tokens in total, the ending one among them, from which on the answer may end; -inf: any."""
    must_end_from: Tensor
    """The same, from which on it must end; inf: none."""
    mode: Tensor
    """Index into EXPECTED_MODES."""
    horizon: Tensor
    min_entropy: Tensor
    min_value: Tensor
    neutral: Tensor
    """The rule changes nothing (tilt 0, evidence 0, ...): the generator, exactly."""
    gamma_index: Tensor
    """Index into `gammas`."""
    num_generated: Tensor
    rules: tuple[str, ...] = ()
    """Names of the rules in use."""
    gammas: tuple[float, ...] = ()
    has_value_gate: bool = False
    has_peak: bool = False
    """Lengths inside the goal do not all count alike in some row."""
    scores_all: bool = True
    """No row is neutral or has an entropy gate: every candidate of every row is scored."""

    @classmethod
    def build(
        cls,
        asked: Sequence[Asked],
        num_generated: Sequence[int],
        *,
        device: torch.device | str = "cpu",
    ) -> "RuleParams":
        """Of these rows, in two transfers to `device`."""
        rules = tuple(sorted({a.rule for a in asked if a.rule}))
        gammas = tuple(sorted({a.gamma for a in asked}))
        codes: dict[str | None, int] = {name: code for code, name in enumerate(rules)}
        codes[None] = -1
        floats = [a.floats for a in asked]
        integers = [
            (codes[a.rule], gammas.index(a.gamma), done, *a.integers)
            for a, done in zip(asked, num_generated, strict=True)
        ]
        low_R, high_R, scale_R, horizon, min_entropy, min_value, *peak_and_ends = _upload_columns(
            floats, torch.float32, device
        )
        centre, below, above, may_end_from, must_end_from = peak_and_ends
        code_R, gamma_index, done_R, mode_R, total_R, neutral = _upload_columns(
            integers, torch.int64, device
        )
        return cls(
            code=code_R,
            low=low_R,
            high=high_R,
            is_total=total_R.bool(),
            scale=scale_R,
            centre=centre,
            below=below,
            above=above,
            may_end_from=may_end_from,
            must_end_from=must_end_from,
            mode=mode_R,
            horizon=horizon,
            min_entropy=min_entropy,
            min_value=min_value,
            neutral=neutral.bool(),
            gamma_index=gamma_index,
            num_generated=done_R,
            rules=rules,
            gammas=gammas,
            has_value_gate=any(row[5] > 0 for row in floats),
            has_peak=any(row[7] > 0 or row[8] > 0 for row in floats),
            scores_all=not any(row[4] > 0 for row in floats) and not any(r[-1] for r in integers),
        )

    def rest(self) -> tuple[Tensor, Tensor]:
        """What a candidate should leave to come, (least, most): fp32 [R, 1] each, +-inf if open."""
        left = torch.where(self.is_total, self.num_generated + 1, 0)
        return (self.low - left).unsqueeze(-1), (self.high - left).unsqueeze(-1)

    def peak(self) -> Peak:
        """Weights of the lengths that a candidate may leave: [R, 1] each; see rules."""
        left = torch.where(self.is_total, self.num_generated + 1, 0)
        return Peak(*(x.unsqueeze(-1) for x in (self.centre - left, self.below, self.above)))

    def endings(self) -> tuple[Tensor, Tensor]:
        """(may end with the next token, must end with it): bool [R] each."""
        length = self.num_generated + 1
        return length >= self.may_end_from, length >= self.must_end_from

    def advanced(self) -> "RuleParams":
        """The same one token later."""
        return dataclasses.replace(self, num_generated=self.num_generated + 1)


def rule_name(control: LengthControl, *, has_distribution: bool) -> str:
    """The rule that acts for a control: one of RULES or a user's own."""
    if control.has_target:
        return control.rule or ("conditional" if has_distribution else "soft")
    if control.tilt is not None:
        return "tilt"
    return "tilt_logit" if control.tilt_logit is not None else "expected_scale"


def _bounds(control: LengthControl | None, gamma: float) -> tuple[float, float]:
    """(least, most) tokens of a control's target; -inf and inf where open."""
    if control is None or not control.has_target:
        return -math.inf, math.inf
    if control.counts_tokens:
        low, high = control.interval()
        two_sided = control.equal_to is not None
        return (
            low if two_sided or control.at_least is not None else -math.inf,
            high if two_sided or control.at_most is not None else math.inf,
        )
    least = control.value_equal_to or control.value_at_least
    most = control.value_equal_to or control.value_at_most
    rate = returns.log_discount(gamma)
    return (
        -math.inf if least is None else -math.log1p(-least) / rate,
        math.inf if most is None else -math.log1p(-most) / rate,
    )


def _peak(control: LengthControl) -> tuple[float, float, float]:
    """(centre, cost of a token below, of one above): of `focus`, of `price`, or of neither."""
    if control.equal_to is not None:
        rate = control.focus / control.equal_to
        return control.equal_to, SHORT_RATE * rate, LONG_RATE * rate
    return 0, 0.0, control.price or 0.0


def _scale(control: LengthControl, name: str | None) -> tuple[float, float]:
    """(scale of the row's rule, the scale at which that rule changes nothing)."""
    if name == "conditional":
        by_default = 1.0 if control.equal_to is None else 2.0
        return by_default if control.evidence is None else control.evidence, 0.0
    if name == "expected_scale":
        return control.expected_scale or 0.0, 1.0
    if name in ("tilt", "tilt_logit"):
        return control.tilt or control.tilt_logit or 0.0, 0.0
    return control.strength, 0.0 if name == "soft" else math.nan


def widest(guided: Guided, vocab_size: int) -> int:
    """Candidates of a row: the tighter of the request's top_k and the control's."""
    limit = MAX_CANDIDATES if guided.control is None else guided.control.top_k
    return min(guided.top_k if guided.top_k > 0 else limit, limit, vocab_size)


def build_truncation(
    guided: Sequence[Guided],
    endings: Sequence[Sequence[int]],
    vocab_size: int,
    device: torch.device | str,
) -> Truncation:
    """Truncation of guided requests, each with its ending tokens."""
    controls = [g.control for g in guided if g.control is not None]
    top_k = [widest(g, vocab_size) for g in guided]
    floats = [
        (g.temperature, min(g.top_p, c.top_p), max(g.min_p, c.min_p))
        for g, c in zip(guided, controls, strict=True)
    ]
    temperature, top_p, min_p = _upload_columns(floats, torch.float32, device)
    factors = [c.token_temperature or {} for c in controls]
    some = any(factors)
    return Truncation(
        temperature=temperature,
        top_k=upload(top_k, torch.int64, device),
        top_p=top_p,
        min_p=min_p,
        ending_ids=pad(endings, device),
        max_candidates=max(top_k),
        factor_ids=pad([list(f) for f in factors], device) if some else None,
        factors=pad([list(f.values()) for f in factors], device) if some else None,
    )


def pad(rows: Sequence[Sequence[float]], device: torch.device | str) -> Tensor:
    """Rows of unequal length as one tensor of at least one column, -1 at the end."""
    width = max(1, *(len(row) for row in rows))
    padded: Tensor = upload([[*row, *[-1] * (width - len(row))] for row in rows], None, device)
    return padded


def _upload_columns(
    rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """The columns of rows, each of them contiguous."""
    columns: Tensor = upload(torch.tensor(rows, dtype=dtype).T.contiguous(), dtype, device)
    return columns
