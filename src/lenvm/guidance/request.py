"""LengthControl: the one schema of per-request length control, whatever the engine or the wire.

The `length` object of our server, `custom_params.lenvm` (SGLang), `vllm_xargs.lenvm` (vLLM, a JSON
string) and the flags of `lenvm generate` are all this. Lengths are generated tokens, the ending
token counted, as `usage.completion_tokens` reports them. docs/control.md is the table for users.
"""

import functools
import json
from decimal import Decimal
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lenvm.errors import ControlError

BUILT_IN_RULES = ("conditional", "soft", "expected", "hard")
RULE_GROUP = "lenvm.rules"
"""Entry points of this group are rules that a request may name."""
MAX_LENGTH = 131_072
MAX_CANDIDATES = 256
MAX_FACTORS = 64
DEFAULT_MAX_TOKENS = 1024
"""Where a request names no max_tokens."""

Tokens = Annotated[int, Field(ge=1, le=MAX_LENGTH)]
Value = Annotated[float, Field(gt=0, lt=1)]


@functools.cache
def installed_rules() -> dict[str, EntryPoint]:
    """Rules that installed packages offer, by name. What is installed decides, never the client."""
    return {entry.name: entry for entry in entry_points(group=RULE_GROUP)}


class LengthControl(BaseModel):
    """What a request asks of its length, and how hard to push.

    Exactly one goal: a length (`equal_to`; `at_most` and/or `at_least`), a value (`value_*`, the
    same three), or a change without a target (`shortest`, `price`, `tilt`, `tilt_logit`,
    `expected_scale`). `price` also goes with `at_most` and `at_least`.
    Validation raises ControlError with field, value and allowed range.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        strict=True,
        use_attribute_docstrings=True,
    )

    equal_to: Tokens | None = None
    """Generate this many tokens."""
    at_most: Tokens | None = None
    """Generate no more than this many tokens."""
    at_least: Tokens | None = None
    """Generate no fewer than this many tokens."""
    remaining: bool = False
    """The length goal is the number of tokens still to come, the same at every step."""
    value_equal_to: Value | None = None
    """Hold the answer where u = -V is this (0 = at its end, 1 = endlessly far), at every step."""
    value_at_most: Value | None = None
    """Hold u at this or below."""
    value_at_least: Value | None = None
    """Hold u at this or above."""
    shortest: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Answer as this share of the answers to the prompt would, the shortest ones: at most the
    quantile of the length that is predicted at the end of the prompt."""
    price: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nats that a token costs: answers y follow p(y) exp(-price |y|), of all the distributions with
    their mean length the one nearest to the generator. 0.005: 200 tokens more are e times less
    likely; weakened beyond `horizon`. Alone, or within `at_most` and `at_least`."""
    tilt: Annotated[float, Field(ge=-10_000, le=10_000)] | None = None
    """Scale s of p(x) exp(-s u(x)), u = -V: s > 0 shortens, s < 0 lengthens."""
    tilt_logit: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    """Scale s of p(x) exp(-s z(x)), z the logit of u: the same sign as `tilt`."""
    expected_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """Tilt every step until E[u] is changed by this factor: below 1 shortens, 1 changes nothing."""
    expected_mode: Literal["mul", "linear", "exp", "length_mul"] = "mul"
    """What `expected_scale` multiplies: E[u], the way to the furthest candidate (linear, exp), or
    the length that E[u] stands for."""

    rule: str | None = None
    """How a goal acts: conditional, soft, expected, hard, or one that is installed (entry point
    group lenvm.rules). None takes the best the value model allows: conditional, else soft."""
    strict: bool | None = None
    """Keep the promise of a goal in tokens: no end before the least length, an end forced at the
    greatest. False leaves the end to the rule and the generator. None: yes, but for the hard rule,
    which is the paper's as published."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """`equal_to` T counts as met within T (1 +- tolerance)."""
    strength: Annotated[float, Field(ge=0, le=10_000)] = 100.0
    """Soft rule: p(x) exp(-strength |u(x) - u*|)."""
    evidence: Annotated[float, Field(ge=0, le=100)] | None = None
    """Conditional: p(x) P(length in interval | x)^evidence. 1 is Bayes' rule, 0 the generator.
    None: 2 for `equal_to`, else 1 (docs/control.md: with 2 far more answers end by themselves, at
    the same length and loss)."""
    focus: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Conditional, with `equal_to`: inside the tolerance a length counts by (its LIFEBench score /
    100)^focus: the nearer the better, and too long is cheaper than too short. 0: all alike."""
    horizon: Annotated[float, Field(ge=1)] | None = 256.0
    """Conditional: further than this many tokens from the end, the evidence is weakened by horizon
    over distance, because the value model's noise grows against what one token can tell. None:
    Bayes' rule at any distance."""
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Discount at which u is read. None = the checkpoint's; others need the distribution head."""

    top_k: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 15
    """At most this many candidates are scored at a step."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.999
    """Candidates are the smallest set of most likely tokens with this much probability."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Candidates have at least this fraction of the most likely token's probability."""
    min_entropy: Annotated[float, Field(ge=0)] = 0.0
    """Act only where the candidates' entropy (nats) is at least this; leave other tokens alone."""
    min_value: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Act only where the candidates' E[u] is at least this; leave the text before its end alone."""
    token_temperature: dict[int, Annotated[float, Field(gt=0, le=100)]] | None = None
    """Token id -> factor on its own temperature: p(x)^(1 / factor), above 1 makes it likelier."""

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str | None) -> str | None:
        if rule is None or rule in BUILT_IN_RULES or rule in installed_rules():
            return rule
        installed = ", ".join(sorted(installed_rules())) or "none"
        raise ValueError(f"{', '.join(BUILT_IN_RULES)}; installed rules: {installed}")

    @field_validator("token_temperature", mode="before")
    @classmethod
    def _token_ids(cls, value: Any) -> Any:
        """JSON has text keys only; token ids are numbers."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FACTORS:
            raise ValueError(f"at most {MAX_FACTORS} tokens")
        ids = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in value.items()}
        if any(not isinstance(k, int) or isinstance(k, bool) or k < 0 for k in ids):
            raise ValueError("an object of token ids (numbers from 0) to factors")
        return ids

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        intervals = ((self.at_least, self.at_most), (self.value_at_least, self.value_at_most))
        limits = [low if high is None else high for low, high in intervals]
        goals = [self.equal_to, self.value_equal_to, self.tilt, self.tilt_logit]
        goals += [
            self.expected_scale,
            self.shortest,
            *limits,
            self.price if limits[0] is None else None,
        ]
        if sum(goal is not None for goal in goals) != 1:
            raise ValueError(
                "exactly one of equal_to, at_most/at_least, value_equal_to, "
                "value_at_most/value_at_least, shortest, price, tilt, tilt_logit, expected_scale; "
                "price also goes with at_most/at_least"
            )
        for name, (low, high) in zip(("at_least", "value_at_least"), intervals, strict=True):
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name} up to {name.replace('least', 'most')} ({low} > {high})")
        if self.rule is not None and not self.has_target:
            raise ValueError("rule with a length or a value to meet, not with a tilt or scale")
        for name in ("price", "shortest"):
            if getattr(self, name) is not None and self.rule not in (None, "conditional"):
                raise ValueError(f"{name} with the conditional rule alone")
        if self.focus and (self.equal_to is None or self.rule not in (None, "conditional")):
            raise ValueError("focus with equal_to under the conditional rule alone")
        if self.remaining and not self.counts_tokens:
            raise ValueError("remaining with equal_to, at_most or at_least alone")
        return self

    @classmethod
    def parse(cls, value: "str | dict[str, Any] | LengthControl") -> "LengthControl":
        """Read a control from JSON text, a dict, or a control. Raises ControlError only."""
        if isinstance(value, LengthControl):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ControlError(
                    "(whole)", value, 'a JSON object such as {"equal_to": 128}'
                ) from None
        if not isinstance(value, dict):
            raise ControlError("(whole)", value, 'an object such as {"equal_to": 128}')
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "(whole)"
            allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            if first["type"] == "extra_forbidden":
                allowed = "one of the fields " + ", ".join(cls.model_fields)
            raise ControlError(field, first["input"], allowed) from None

    def resolve(self, quantile: float) -> "LengthControl":
        """`shortest` as a limit: at most `quantile` tokens, which is what was predicted for it."""
        limit = min(max(1, round(quantile)), MAX_LENGTH)
        return self.model_copy(update={"shortest": None, "at_most": limit})

    @property
    def counts_tokens(self) -> bool:
        """The goal is a number of tokens, in total or still to come."""
        return not (self.equal_to is None and self.at_most is None and self.at_least is None)

    @property
    def has_target(self) -> bool:
        """There is a length, a value or a price to meet, so a rule decides how."""
        values = (self.value_equal_to, self.value_at_most, self.value_at_least)
        others = (*values, self.price, self.shortest)
        return self.counts_tokens or any(x is not None for x in others)

    def interval(self) -> tuple[int, int]:
        """[least, most] allowed lengths in tokens; (1, MAX_LENGTH) where there is no such goal."""
        if self.equal_to is not None:
            # the tolerance as it is written: 0.29 of 100 is 29, in floating point 28.99..
            slack = int(Decimal(repr(self.tolerance)) * self.equal_to)
            return max(1, self.equal_to - slack), min(MAX_LENGTH, self.equal_to + slack)
        return self.at_least or 1, self.at_most or MAX_LENGTH

    @property
    def least(self) -> int:
        """The fewest tokens that an answer must have in all; 0 where nothing is asked."""
        asks = not self.remaining and not (self.equal_to is None and self.at_least is None)
        return self.interval()[0] if asks else 0


def pick_max_tokens(control: LengthControl | None, *, default: int, room: int) -> int:
    """max_tokens of a request that names none: `default`, or twice the length that it asks for, so
    that an answer of at least that many tokens can end by itself. No more than `room`."""
    goals = (control.equal_to, control.at_least) if control is not None else ()
    return min(room, max(default, 2 * max((goal for goal in goals if goal), default=0)))
