"""What an evaluation asks of a generator, whatever runs it.

`HttpGenerator` (client.py) reaches any OpenAI-compatible server; an in-process engine is another
implementation. A generator answers every request exactly once: a failure is an answer with `error`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lenvm.guidance.request import LengthControl

Feature = Literal["control", "conditional", "eos_decay", "eos_bias", "continue", "count_tokens"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the same for every arm of an evaluation."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = no limit."""
    min_p: float = 0.0
    seed: int | None = None
    """Each request gets its own seed, made from this one and its id. None = the server's choice."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def penalties(self) -> dict[str, float]:
        """Those that change something, by their names."""
        neutral = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
        return {k: v for k, n in neutral.items() if (v := getattr(self, k)) != n}

    def to_json(self) -> dict[str, Any]:
        """For manifests. No penalty that changes nothing, so that runs of before there were
        penalties are continued and graded."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        return {name: getattr(self, name) for name in names} | self.penalties


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate. `id` comes back with it."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    control: LengthControl | None = None
    eos_bias: float = 0.0
    """Added to the logit of the ending token at every step."""
    eos_decay: tuple[int, float] | None = None
    """(start, factor) of transformers' ExponentialDecayLengthPenalty, start in generated tokens."""
    answer_prefix: str = ""
    """The answer so far, to be continued."""


@dataclass(frozen=True)
class GenerationResponse:
    """One answer. `error` is a sentence where the request failed; the rest is then empty."""

    id: str
    text: str = ""
    num_tokens: int = 0
    """Generated tokens, the ending token counted, as the server counts them."""
    num_prompt_tokens: int = 0
    finish_reason: str = ""
    """"stop" = ended by itself, "length" = cut off at max_tokens."""
    mean_log_prob: float | None = None
    """Mean log-probability of the answer's tokens under the generator itself, unguided; None where
    the server reports another distribution's, or none."""
    latency_s: float = 0.0
    error: str | None = None
    last_log_prob: float | None = None
    """Log-probability of the last token alone: of the ending, where the answer ended by itself."""


OnResponse = Callable[[GenerationResponse], None]


class Generator(Protocol):
    """Anything that answers requests."""

    @property
    def model(self) -> str:
        """The generator's name, as results are labelled."""
        ...

    @property
    def max_length(self) -> int | None:
        """Most tokens of prompt and answer together; None where unknown."""
        ...

    def lacks(self, feature: Feature) -> str | None:
        """None where the feature is there, else a sentence that says what is missing."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text; only where `lacks("count_tokens")` is None."""
        ...

    def generate(self, requests: Iterable[GenerationRequest], on_response: OnResponse) -> None:
        """Answer every request; `on_response` is called in this thread, in any order.

        Raises EndpointError where the server stops answering altogether.
        """
        ...
