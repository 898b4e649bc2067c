"""Arms: the ways of getting a length that an evaluation compares; `kind` or `kind:number`.

A LenVM arm may bring settings of its own, `conditional:2 tolerance=0.05 horizon=none`: fields of
`LengthControl` that are no goal, over those of the run.

| arm | what it does |
|---|---|
| `prompt` | the task as it is; in trade-off: unguided |
| `countdown` | the prompt asks to count down the words; the counts are stripped from the answer |
| `concise` | the prompt asks for a short answer |
| `truncate` | cut off at the target (max_tokens) |
| `budget:N`, `budget_answer:N` | cut off at N tokens; the latter then asks for the answer at once |
| `eos_bias:B` | B is added to the logit of the ending token at every step (OpenAI `logit_bias`) |
| `eos_decay:F` | transformers' ExponentialDecayLengthPenalty, factor F, from half the target |
| `hard`, `expected`, `soft:S`, `conditional:E` | LenVM rules; S = strength, E = evidence |
| `NAME`, `NAME:S` | a rule of your own (entry point group `lenvm.rules`); S = strength |
| `shortest:Q` | LenVM, as the shortest share Q of the answers would be |
| `price:P` | LenVM, each token costs P nats |
| `tilt:S` | LenVM tilt with scale S |
| `at_most:N` | LenVM at most N tokens, by the best rule of the value model, or by `rule=NAME` |
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lenvm.errors import InputError
from lenvm.evals.generator import Feature, Generator, Sampling
from lenvm.guidance.request import BUILT_IN_RULES, MAX_CANDIDATES, LengthControl, installed_rules

DEFAULTS: dict[str, float | None] = {
    "prompt": None,
    "countdown": None,
    "concise": None,
    "truncate": None,
    "hard": None,
    "expected": None,
    "budget": None,
    "budget_answer": None,
    "eos_bias": None,
    "shortest": None,
    "price": None,
    "tilt": None,
    "at_most": None,
    "eos_decay": 1.01,
    "soft": 100.0,
    "conditional": 1.0,
}
NEEDS_NUMBER = {"budget", "budget_answer", "eos_bias", "shortest", "price", "tilt", "at_most"}
TAKES_NUMBER = NEEDS_NUMBER | {"eos_decay", "soft", "conditional"}
LABELS = {
    "prompt": "prompt only",
    "countdown": "countdown prompt",
    "concise": "“be concise” prompt",
    "truncate": "truncation at the target",
    "budget": "truncation at {} tokens",
    "budget_answer": "truncation at {} tokens, forced answer",
    "eos_bias": "EOS bias {}",
    "eos_decay": "EOS decay {}",
    "hard": "LenVM hard",
    "expected": "LenVM expected",
    "soft": "LenVM soft, strength {}",
    "conditional": "LenVM conditional, evidence {}",
    "shortest": "LenVM shortest {}",
    "price": "LenVM price {}",
    "tilt": "LenVM tilt {}",
    "at_most": "LenVM at most {} tokens",
}
TARGETS = {"equal_to", "at_most", "at_least", "shortest", "price", "tilt"}
GOALS = TARGETS | {"remaining", "rule", "strength", "evidence"}
"""What an arm is: not for its settings, but for those of SETTABLE."""
SETTABLE = {
    "price": {"evidence"},
    "shortest": {"evidence"},
    "at_most": {"rule", "strength", "evidence"},
}
FEATURES: dict[str, tuple[Feature, ...]] = {
    "countdown": (),
    "eos_bias": ("eos_bias",),
    "eos_decay": ("eos_decay",),
    "hard": ("control",),
    "expected": ("control",),
    "soft": ("control",),
    "shortest": ("control", "conditional"),
    "price": ("control", "conditional"),
    "tilt": ("control",),
    "at_most": ("control",),
    "conditional": ("control", "conditional"),
    "budget_answer": ("continue",),
}


@dataclass(frozen=True)
class Arm:
    """One way of getting a length. `name` is what results call it."""

    kind: str
    parameter: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    """Fields of LengthControl for this arm alone."""

    @classmethod
    def parse(cls, text: str, allowed: Iterable[str]) -> "Arm":
        """From `kind`, `kind:number` (any float), each with ` field=value` behind it or not.
        InputError names what may stand there."""
        whole, *fields = text.split() or [""]
        arm = cls._parse_kind(whole, allowed)
        return replace(arm, settings=_parse_settings(text, arm.kind, fields)) if fields else arm

    @classmethod
    def read(cls, name: str) -> "Arm":
        """The arm of results, by their name for it: its rule need not be installed here."""
        kind = name.split()[0].partition(":")[0]
        if kind in DEFAULTS and "rule=" not in name:
            return cls.parse(name, DEFAULTS)
        whole, *fields = name.split()
        number = whole.partition(":")[2]
        pairs = [entry.partition("=") for entry in fields]
        settings = tuple((field, _read_value(field, text)) for field, _, text in pairs)
        return cls(kind, float(number) if number else None, settings)

    @property
    def is_rule(self) -> bool:
        """It names a rule, ours or one of the user's own: the goal is the evaluation's."""
        return self.kind in BUILT_IN_RULES or self.is_own_rule

    @property
    def is_own_rule(self) -> bool:
        """It names a rule that an installed package offers."""
        return self.kind not in DEFAULTS

    @classmethod
    def _parse_kind(cls, text: str, allowed: Iterable[str]) -> "Arm":
        kind, colon, number = text.partition(":")
        kinds = list(allowed)
        own = kind not in DEFAULTS and kind in installed_rules()
        if own and not set(BUILT_IN_RULES) & set(kinds):
            raise InputError(
                f"arm is {text!r}, a rule, which needs a length to meet: here 'at_most:200 "
                f"rule={kind}'"
            )
        if own:
            check_rule(kind)
        elif kind not in kinds:
            raise InputError(f"arm is {text!r}; allowed here: {_describe_allowed(kinds)}")
        if colon and kind not in TAKES_NUMBER and not own:
            raise InputError(f"arm {kind!r} takes no number; got {text!r}")
        if not colon:
            if kind in NEEDS_NUMBER:
                raise InputError(f"arm {kind!r} needs a number, for example '{kind}:20'")
            return cls(kind, DEFAULTS.get(kind))
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            raise InputError(f"arm {text!r}: {number!r} is not a number")
        counts = kind == "at_most" or kind.startswith("budget")
        if counts and (value < 1 or value != int(value)):
            raise InputError(f"arm {text!r}: that is a whole number of tokens, at least 1")
        return cls(kind, value)

    @property
    def name(self) -> str:
        whole = self.kind if self.parameter is None else f"{self.kind}:{self.parameter:g}"
        return " ".join([whole, *(f"{k}={_show(v)}" for k, v in self.settings)])

    @property
    def label(self) -> str:
        number = "" if self.parameter is None else f"{self.parameter:g}"
        own = f"own rule {self.kind}" + (f", strength {number}" if number else "")
        label = own if self.is_own_rule else LABELS[self.kind].format(number)
        return ", ".join([label, *(f"{k.replace('_', ' ')} {_show(v)}" for k, v in self.settings)])

    def why_skipped(self, generator: Generator) -> str | None:
        """A sentence where the generator cannot run this arm, else None."""
        for feature in _features(self.kind):
            if (reason := generator.lacks(feature)) is not None:
                return reason
        return None


def _parse_settings(text: str, kind: str, fields: list[str]) -> tuple[tuple[str, Any], ...]:
    """`tolerance=0.05` ... as fields; values are JSON, `none` is null. InputError for others."""
    if "control" not in _features(kind):
        raise InputError(f"arm {text!r}: settings go with LenVM's arms only")
    goals = GOALS - SETTABLE.get(kind, set())
    values: dict[str, Any] = {}
    for entry in fields:
        name, equals, value = entry.partition("=")
        if equals and name == "rule" and name in goals and kind in (*BUILT_IN_RULES, value):
            raise InputError(
                f"arm {text!r}: {kind!r} is a rule itself; name the other one alone: --arm {value}"
            )
        if not equals or name in goals or name in values:
            raise InputError(f"arm {text!r}: {entry!r} is no field=value that an arm may set")
        try:
            values[name] = _read_value(name, value)
        except ValueError:
            raise InputError(
                f"arm {text!r}: {value!r} is not a number, true, false or none"
            ) from None
    LengthControl.parse({"at_most" if kind == "at_most" else "equal_to": 1} | values)
    if values.get("rule") is not None:
        check_rule(values["rule"])
    return tuple(values.items())


def check_rule(name: str) -> None:
    """InputError where a rule is installed and cannot be loaded, before anything is asked."""
    from lenvm.guidance.rules import find_rule

    find_rule(name)


def _features(kind: str) -> tuple[Feature, ...]:
    """What a generator must have for an arm of this kind."""
    return FEATURES.get(kind, ()) if kind in DEFAULTS else ("control",)


def _describe_allowed(kinds: list[str]) -> str:
    text = ", ".join(kinds)
    if not set(BUILT_IN_RULES) & set(kinds):
        return text
    own = ", ".join(sorted(installed_rules())) or "none is"
    return f"{text}, and installed rules of your own ({own}; docs/control.md says how)"


def _read_value(name: str, text: str) -> Any:
    """A setting: JSON, `none`, or the name of a rule. ValueError for others."""
    if text.lower() == "none":
        return None
    return text if name == "rule" else json.loads(text)


def _show(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def match_truncation(sampling: Sampling) -> dict[str, Any]:
    """Fields of LengthControl that make a LenVM arm choose among the tokens of every other arm.

    A control scores at most MAX_CANDIDATES tokens: without a `top_k` that is its limit.
    """
    return {
        "top_k": min(sampling.top_k or MAX_CANDIDATES, MAX_CANDIDATES),
        "top_p": sampling.top_p,
        "min_p": min(sampling.min_p, 0.999),
    }


def parse_arms(texts: Iterable[str], allowed: Iterable[str]) -> list[Arm]:
    """Arms in order; InputError for one that is named twice or none at all."""
    kinds = list(allowed)
    arms = [Arm.parse(text, kinds) for text in texts]
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"arms named twice: {', '.join(twice)}")
    if not arms:
        raise InputError(f"no arms; choose from {', '.join(kinds)}")
    return arms
