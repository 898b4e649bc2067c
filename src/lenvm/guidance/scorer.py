"""CandidateScorer: the value of every candidate next token of every request, one forward a step.

A RaggedDecoder of the value model's backbone with its head. It knows nothing of ending tokens:
rules put those to exactly 0 with `LengthBelief.with_terminal`.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenvm.model.head import LengthBelief
from lenvm.model.ragged import RaggedDecoder
from lenvm.model.tokenization import MAX_CONTROL_TOKENS

if TYPE_CHECKING:
    from lenvm.model.value_model import LengthValueModel


class CandidateScorer:
    """Beliefs about candidates. Options are those of `RaggedDecoder`; so are the errors."""

    def __init__(self, model: "LengthValueModel", **options: Any) -> None:
        self.model = model.eval()
        if getattr(model.config, "control_input", False) and "max_tokens" in options:
            options["max_tokens"] += options["max_requests"] * MAX_CONTROL_TOKENS
        self.gamma = model.config.gamma
        self.decoder = RaggedDecoder(model.backbone, head=model.head, **options)

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

    def encode_control(self, control: Mapping[str, Any] | None) -> list[int]:
        """Tokens in front of a prompt answered under a control; see the model's."""
        return self.model.encode_control(control)

    @torch.inference_mode()
    def add(self, requests: Mapping[str, Sequence[int]]) -> LengthBelief:
        """Prefill prompts: belief at each prompt boundary, over [R]."""
        return self.model.belief(self.decoder.add(requests))

    @torch.inference_mode()
    def extend(self, requests: Mapping[str, Sequence[int]]) -> LengthBelief:
        """Append tokens: belief after each last one, over [R]."""
        return self.model.belief(self.decoder.extend(requests))

    @torch.inference_mode()
    def score(
        self,
        request_ids: Sequence[str],
        candidate_ids_RK: Tensor | Sequence[Sequence[int]],
        *,
        num_candidates: int | None = None,
    ) -> LengthBelief:
        """Belief in the state after each candidate, over [R, K]; -1 pads and means nothing there.

        `num_candidates`: see `RaggedDecoder.peek`."""
        raw = self.score_raw(request_ids, candidate_ids_RK, num_candidates=num_candidates)
        return self.model.belief(raw)

    def score_raw(
        self,
        request_ids: Sequence[str],
        candidate_ids_RK: Tensor | Sequence[Sequence[int]],
        *,
        num_candidates: int | None = None,
    ) -> Tensor:
        """Raw head outputs after each candidate: [R, K, D] fp32, 0 for padding."""
        return self.decoder.peek(request_ids, candidate_ids_RK, num_candidates=num_candidates)

    def commit(
        self,
        request_ids: Sequence[str],
        token_ids_R: Tensor | Sequence[int],
        *,
        peeked: bool = False,
    ) -> None:
        """Keep the chosen candidates; see `RaggedDecoder.commit`."""
        self.decoder.commit(request_ids, token_ids_R, peeked=peeked)

    def step(self, request_ids: Sequence[str], token_ids_R: Tensor | Sequence[int]) -> LengthBelief:
        """Append one token to each request without scoring others: belief after it, over [R].

        For rows whose gate is shut, or which are only tracked."""
        return self.model.belief(self.decoder.step(request_ids, token_ids_R))

    def fork(self, parent_id: str, child_id: str) -> None:
        """A new request with the parent's prefix."""
        self.decoder.fork(parent_id, child_id)

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""
        self.decoder.remove(request_ids)


class PromptScorer:
    """Beliefs at the end of prompts, by a model whose guide scores the candidates.

    On the CPU as the model would as a scorer: faster than its plain forward and less rounded.
    Made at the first call; its KV store takes no memory that no prompt touched.
    """

    def __init__(self, model: "LengthValueModel", **options: Any) -> None:
        self.model, self.options = model, options

    @cached_property
    def _scorer(self) -> CandidateScorer:
        return CandidateScorer(self.model, **{**self.options, "max_candidates": 1})

    def encode_control(self, control: Mapping[str, Any] | None) -> list[int]:
        """As the scorer's."""
        return self.model.encode_control(control)

    def read_ends(self, sequences: Sequence[Sequence[int]]) -> LengthBelief:
        """Belief at the end of each token sequence, over [R]."""
        if next(self.model.parameters()).device.type != "cpu":
            return self.model.read_ends(sequences)  # no second KV store on a GPU
        requests = {str(row): ids for row, ids in enumerate(sequences)}
        belief = self._scorer.add(requests)
        self._scorer.remove(list(requests))
        return belief
