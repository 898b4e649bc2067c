"""What guidance asks of a scorer, and which candidates of a step are worth asking for.

`CandidateScorer` is the scorer of a value model; tests have one that knows the truth.

Shape legend: R rows of a step, K candidates.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lenvm.errors import InputError
from lenvm.guidance.candidates import Candidates, Truncation, entropy, search, truncate
from lenvm.guidance.params import Guided, RuleParams, rule_name, widest
from lenvm.guidance.rules import find_rule
from lenvm.model.device import has_triton
from lenvm.model.head import LengthBelief

log = logging.getLogger(__name__)
Draw = Callable[..., Tensor]
"""(log-probabilities [R, K], ids [R, K], the engine's own [R] each) -> tokens [R]; row-wise."""


class Scorer(Protocol):
    """What guidance asks of `CandidateScorer`. It knows nothing of ending tokens."""

    @property
    def gamma(self) -> float: ...
    @property
    def has_distribution(self) -> bool: ...
    @property
    def max_candidates(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def encode_control(self, control: Mapping[str, Any] | None) -> list[int]: ...
    def add(self, requests: Mapping[str, Sequence[int]]) -> LengthBelief: ...
    def fork(self, parent_id: str, child_id: str) -> None: ...
    def score(
        self,
        request_ids: Sequence[str],
        candidate_ids_RK: Tensor,
        *,
        num_candidates: int | None = None,
    ) -> LengthBelief: ...
    def commit(
        self,
        request_ids: Sequence[str],
        token_ids_R: Tensor | Sequence[int],
        *,
        peeked: bool = False,
    ) -> None: ...
    def remove(self, request_ids: Sequence[str]) -> None: ...


class Predictor(Protocol):
    """What reads prompts where the scorer's model is a guide: `PromptScorer`."""

    def encode_control(self, control: Mapping[str, Any] | None) -> list[int]: ...
    def read_ends(self, sequences: Sequence[Sequence[int]]) -> LengthBelief: ...


def find_candidates(
    logits_RV: Tensor, truncation: Truncation, params: RuleParams
) -> tuple[Candidates, Tensor]:
    """Candidates of each row, and those of them to score: ids [R, K], -1 elsewhere."""
    may_end, must_end = params.endings()
    found = search(logits_RV, truncation, may_end_R=may_end, must_end_R=must_end)
    return keep_candidates(*found, truncation, params)


def keep_candidates(
    top_RK: Tensor, ids_RK: Tensor, truncation: Truncation, params: RuleParams
) -> tuple[Candidates, Tensor]:
    """`find_candidates` from what `search` has found."""
    candidates = truncate(top_RK, ids_RK, truncation)
    return candidates, to_score(candidates, params)


def search_fused(
    logits_RV: Tensor, truncation: Truncation, params: RuleParams
) -> tuple[Tensor, Tensor] | None:
    """`search` by kernels that read the logits once, in place and in their own type: ids of equal
    logits may differ, the lowest come first. None where the kernels do not apply."""
    if not logits_RV.is_cuda or not _can_fuse():
        return None
    from lenvm.guidance import search_kernels

    if not search_kernels.can_search(logits_RV, truncation):
        return None
    ends = params.may_end_from, params.must_end_from
    found: tuple[Tensor, Tensor] = search_kernels.search(
        logits_RV, truncation, params.num_generated, *ends
    )
    return found


@functools.cache
def _can_fuse() -> bool:
    """Whether the kernels run here: tried once, on a row of their own, so that a Triton that cannot
    compile them costs speed and no answer."""
    if not has_triton():
        return False
    from lenvm.guidance import search_kernels

    try:
        search_kernels.try_out()
    except torch.AcceleratorError:
        raise  # the device itself is lost
    except Exception:
        log.warning("candidates are searched without kernels: they failed here", exc_info=True)
        return False
    return True


def read_drawn(
    tokens_R: Tensor, scored_RK: Tensor, endings_RE: Tensor, *read_RK: Tensor
) -> tuple[Tensor, ...]:
    """What was read of each drawn token, [R] each: 0 of an ending token; of one that was not
    scored, that of the first column (the likeliest candidate)."""
    tokens = tokens_R.unsqueeze(-1)
    column = (scored_RK == tokens).int().argmax(-1, keepdim=True)
    ended = (endings_RE == tokens).any(-1)
    return tuple(x.gather(-1, column).squeeze(-1).masked_fill(ended, 0) for x in read_RK)


def to_score(candidates: Candidates, params: RuleParams) -> Tensor:
    """Ids to score, [R, K], -1 elsewhere. Where no rule can change anything (one candidate, a shut
    gate, a scale of zero) the likeliest candidate is fed alone: mostly it is what is drawn, and
    then its KV is there; another one is forwarded at commit."""
    several = (candidates.mask.sum(-1) > 1) & ~params.neutral
    several &= entropy(candidates.log_probs) >= params.min_entropy
    first = torch.arange(candidates.ids.shape[-1], device=candidates.ids.device) == 0
    return candidates.ids.masked_fill(~(several.unsqueeze(-1) | first), -1)


def find_fault(guided: Guided, scorer: Scorer) -> str | None:
    """Why this scorer cannot serve a request's control; None where it can."""
    control = guided.control
    if control is None:
        return None
    rule = rule_name(control, has_distribution=scorer.has_distribution)
    for name in ("price", "shortest"):
        if getattr(control, name) is not None and not scorer.has_distribution:
            return (
                f"{name} needs a value model with the distribution head; this one has the scalar "
                "head: use tilt"
            )
    if rule == "conditional" and not scorer.has_distribution:
        return (
            "rule 'conditional' needs a value model with the distribution head; this one has the "
            "scalar head: use rule 'soft', 'expected' or 'hard'"
        )
    if control.gamma not in (None, scorer.gamma) and not scorer.has_distribution:
        return (
            f"gamma {control.gamma} needs a value model with the distribution head; this one "
            f"knows gamma {scorer.gamma} only"
        )
    width = widest(guided, scorer.vocab_size)
    if width > scorer.max_candidates:
        return (
            f"top_k {width} is over the {scorer.max_candidates} candidates that this scorer "
            "takes: lower top_k, or start the engine with more max_candidates"
        )
    if control.token_temperature and max(control.token_temperature) >= scorer.vocab_size:
        return (
            f"token_temperature names token {max(control.token_temperature)}; ids go from 0 to "
            f"{scorer.vocab_size - 1}"
        )
    try:
        find_rule(rule)
    except InputError as error:
        return str(error)
    return None
