"""CandidateScorer: the value of every candidate next token of every request, one forward a step.

A RaggedDecoder of the value model's backbone, and its head. It knows nothing of ending tokens:
rules put those to exactly 0 with `LengthBelief.with_terminal`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lenvm.model.head import LengthBelief
from lenvm.model.ragged import RaggedDecoder
from lenvm.model.value_model import LengthValueModel


class CandidateScorer:
    """Beliefs about candidates. Options are those of `RaggedDecoder`; so are the errors."""

    def __init__(self, model: LengthValueModel, **options: Any) -> None:
        self.model = model.eval()
        self.gamma = model.config.gamma
        self.decoder = RaggedDecoder(model.backbone, **options)

    @property
    def has_distribution(self) -> bool:
        """Whether beliefs know interval probabilities and any gamma."""
        return self.model.config.head == "distribution"

    @property
    def max_candidates(self) -> int:
        """Candidates of a row that one call takes."""
        return self.decoder.max_candidates

    @property
    def vocab_size(self) -> int:
        """Tokens that the value model knows: ids below this."""
        return self.decoder.vocab_size

    @torch.inference_mode()
    def add(self, requests: Mapping[str, Sequence[int]]) -> LengthBelief:
        """Prefill prompts: belief at each prompt boundary, over [R]."""
        return self.model.belief(self.model.head(self.decoder.add(requests)))

    @torch.inference_mode()
    def extend(self, requests: Mapping[str, Sequence[int]]) -> LengthBelief:
        """Append tokens: belief after each last one, over [R]."""
        return self.model.belief(self.model.head(self.decoder.extend(requests)))

    @torch.inference_mode()
    def score(
        self,
        request_ids: Sequence[str],
        candidate_ids_RK: Tensor,
        *,
        num_candidates: int | None = None,
    ) -> LengthBelief:
        """Belief in the state after each candidate, over [R, K]; -1 pads. `num_candidates`: how
        many are not -1, where the caller knows."""
        return self.model.belief(self.score_raw(request_ids, candidate_ids_RK))

    @torch.inference_mode()
    def score_raw(self, request_ids: Sequence[str], candidate_ids_RK: Tensor) -> Tensor:
        """Raw head outputs after each candidate: [R, K, D] fp32."""
        raw: Tensor = self.model.head(self.decoder.peek(request_ids, candidate_ids_RK))
        return raw

    def commit(
        self,
        request_ids: Sequence[str],
        token_ids_R: Tensor | Sequence[int],
        *,
        peeked: bool = False,
    ) -> None:
        """Keep the chosen candidates. `peeked` promises that the last `score` had them all."""
        self.decoder.commit(request_ids, token_ids_R)

    def fork(self, parent_id: str, child_id: str) -> None:
        """A new request with the parent's prefix."""
        self.decoder.fork(parent_id, child_id)

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""
        self.decoder.remove(request_ids)
