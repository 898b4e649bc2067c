"""Request and Completion: what the in-process engine takes, and what it gives back as it grows."""

from dataclasses import dataclass, field

from lenvm.engines.sampling import SamplingParams
from lenvm.engines.text import TextStream
from lenvm.errors import LenVMError
from lenvm.guidance.params import Guided
from lenvm.guidance.request import LengthControl


@dataclass(frozen=True)
class Request:
    """One completion to generate. `index` tells the n completions of one seeded prompt apart."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    control: LengthControl | None = None
    track: bool = False
    """Report the predicted remaining length at every token (costs the value model's forward)."""
    predict: bool = False
    """Report the length predicted at the prompt's end (where the value model has a guide: its own
    forward over the prompt). `track` does so too."""
    index: int = 0
    stream: bool = False
    """Keep `Completion.stream` up to date at every token."""
    top_log_probs: int = 0
    """Report that many of the most likely tokens at every step."""

    @property
    def is_tracked(self) -> bool:
        """The value model follows it."""
        return self.control is not None or self.track

    @property
    def is_predicted(self) -> bool:
        """Its completion has a `predicted_length`."""
        return self.track or (self.predict and self.is_tracked)

    @property
    def num_reserved(self) -> int:
        """Room for its longest answer, in tokens."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    def to_guided(self) -> Guided:
        """The request as guidance sees it."""
        sampling = self.sampling
        return Guided(
            prompt_token_ids=self.prompt_token_ids,
            control=self.control,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
        )


@dataclass
class Completion:
    """A request's answer so far; `finish_reason` is None while it runs.

    "stop": ended by itself, by EOS, a stop token or a stop text; "length": cut at max_tokens;
    "cancelled"; "error": it could not go on, `error` says why.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """Log-probability of each token under the generator itself, at temperature 1, unguided."""
    top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    """(token, log-probability) of the likeliest tokens at each step, where asked for."""
    values: list[float] = field(default_factory=list)
    """V of the state after each token, where guided or tracked."""
    remaining: list[float] = field(default_factory=list)
    """Predicted tokens still to come after each token, where guided or tracked."""
    predicted_length: float | None = None
    """Predicted length at the prompt boundary, where the request asked for it."""
    text: str = ""
    stream: TextStream | None = None
    """The text token by token, where the request has stop texts or is streamed."""
    finish_reason: str | None = None
    error: LenVMError | None = None

    @property
    def ended_by_itself(self) -> bool:
        return self.finish_reason == "stop"
