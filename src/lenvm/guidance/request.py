"""LengthControl: the one schema of per-request length control, whatever the engine or the wire.

The `length` object of our server, `custom_params.lenvm` (SGLang), `vllm_xargs.lenvm` (vLLM, a JSON
string) and the flags of `lenvm generate` are all this. Lengths are generated tokens, the ending
token counted, as `usage.completion_tokens` reports them.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lenvm.errors import ControlError

RuleName = Literal["conditional", "soft", "hard"]
MAX_LENGTH = 131_072
MAX_CANDIDATES = 256

Tokens = Annotated[int, Field(ge=1, le=MAX_LENGTH)]


class LengthControl(BaseModel):
    """What a request asks of its length, and how hard to push.

    Exactly one goal: `equal_to`; `at_most` and/or `at_least` (both = an interval); or `tilt`.
    Validation raises ControlError with field, value and allowed range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    equal_to: Tokens | None = None
    """Generate this many tokens."""
    at_most: Tokens | None = None
    """Generate no more than this many tokens."""
    at_least: Tokens | None = None
    """Generate no fewer than this many tokens."""
    tilt: Annotated[float, Field(ge=-10_000, le=10_000)] | None = None
    """Scale s of p(x) exp(-s u(x)), u = -V: s > 0 shortens, s < 0 lengthens."""

    rule: RuleName | None = None
    """How a goal acts; None takes the best that the value model allows (conditional, else soft)."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """`equal_to` T counts as met within T (1 +- tolerance)."""
    strength: Annotated[float, Field(ge=0, le=10_000)] = 100.0
    """Soft rule: p(x) exp(-strength |u(x) - u*|)."""
    evidence: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Conditional: p(x) P(length in interval | x)^evidence. 1 is Bayes' rule, 0 the generator."""

    top_k: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 15
    """At most this many candidates are scored at a step."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.999
    """Candidates are the smallest set of most likely tokens with this much probability."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Candidates have at least this fraction of the most likely token's probability."""
    min_entropy: Annotated[float, Field(ge=0)] = 0.0
    """Act only where the candidates' entropy (nats) is at least this; leave other tokens alone."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        interval = self.at_most is not None or self.at_least is not None
        goals = [self.equal_to is not None, interval, self.tilt is not None]
        if sum(goals) != 1:
            raise ValueError("exactly one of equal_to, at_most/at_least, tilt")
        if self.at_most is not None and self.at_least is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is over at_most {self.at_most}")
        return self

    @classmethod
    def parse(cls, value: "str | dict[str, Any] | LengthControl") -> "LengthControl":
        """Read a control from JSON text, a dict, or a control. Raises ControlError only."""
        if isinstance(value, LengthControl):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
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
            allowed = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                allowed = "one of the fields " + ", ".join(cls.model_fields)
            raise ControlError(field, first["input"], allowed) from None

    def interval(self) -> tuple[int, int]:
        """[least, most] allowed total lengths; (1, MAX_LENGTH) for tilt."""
        if self.equal_to is not None:
            slack = int(self.tolerance * self.equal_to)
            return max(1, self.equal_to - slack), min(MAX_LENGTH, self.equal_to + slack)
        return self.at_least or 1, self.at_most or MAX_LENGTH
