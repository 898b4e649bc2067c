"""ValueReader: what the value model believes about given texts, apart from what is generated.

Everything here runs in the engine's thread, between steps, in parts small enough that who is
generating hardly notices.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from lenvm.engines.transformers import TransformersEngine
from lenvm.guidance.scorer import CandidateScorer
from lenvm.model.prediction import belief_numbers
from lenvm.model.ragged import RaggedDecoder
from lenvm.model.value_model import LengthValueModel

PART_TOKENS = 2048
"""Tokens read between two steps."""
MAX_CANDIDATES = 256
Numbers = dict[str, Any]


class ValueReader:
    """Reads with an engine's two models; has small KV stores of its own for candidates."""

    def __init__(self, engine: TransformersEngine, model: LengthValueModel) -> None:
        self.engine, self.model = engine, model
        self._scorer: CandidateScorer | None = None
        self._decoder: RaggedDecoder | None = None

    @property
    def has_distribution(self) -> bool:
        return self.model.config.head == "distribution"

    def about(self) -> Numbers:
        """Which value model speaks."""
        return {"gamma": self.model.config.gamma, "head": self.model.config.head}

    @torch.inference_mode()
    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        *,
        quantiles: Sequence[float] = (),
        budget: int | None = None,
    ) -> list[list[Numbers]]:
        """Beliefs after the tokens at `positions` of each sequence."""
        raws = self.model.read(sequences, batch_tokens=PART_TOKENS)
        picked = torch.cat([raw[list(p)] for raw, p in zip(raws, positions, strict=True)])
        rows: list[Numbers] = list(belief_numbers(self.model, picked, budget=budget))
        if quantiles and self.has_distribution:
            belief = self.model.belief(picked)
            table = torch.stack([belief.quantile(q) for q in quantiles], -1).tolist()
            for row, found in zip(rows, table, strict=True):
                row["quantiles"] = {str(q): n for q, n in zip(quantiles, found, strict=True)}
        starts = [0]
        for place in positions:
            starts.append(starts[-1] + len(place))
        return [rows[a:b] for a, b in itertools.pairwise(starts)]

    @torch.inference_mode()
    def candidates(
        self, prefix: Sequence[int], candidate_ids: Sequence[int] | None, top_k: int
    ) -> list[Numbers]:
        """Generator's log-probability, value and predicted rest of next tokens after a prefix.

        candidate_ids None takes the likeliest `top_k`. An ending token's value is exactly 0.
        """
        scorer, decoder = self._stores()
        try:
            hidden = decoder.add({"prefix": list(prefix)})
            log_probs = self.engine.lm_head(hidden).float().log_softmax(-1)[0]
            if candidate_ids is None:
                vocabulary = min(scorer.vocab_size, len(log_probs))
                candidate_ids = log_probs[:vocabulary].topk(min(top_k, vocabulary)).indices.tolist()
            ids = list(dict.fromkeys(candidate_ids))
            scorer.add({"prefix": list(prefix)})
            raw = scorer.score_raw(["prefix"], [ids])[0]
        finally:
            for store in (decoder, scorer.decoder):
                if "prefix" in store:
                    store.remove(["prefix"])
        rows: list[Numbers] = []
        for token_id, numbers in zip(ids, belief_numbers(self.model, raw), strict=True):
            ends = token_id in self.engine.eos_token_ids
            rows.append(
                {
                    "token_id": token_id,
                    "log_prob": float(log_probs[token_id]),
                    "is_ending": ends,
                    **(dict.fromkeys(numbers, 0.0) if ends else numbers),
                }
            )
        return rows

    def _stores(self) -> tuple[CandidateScorer, RaggedDecoder]:
        if self._scorer is None or self._decoder is None:
            budget: dict[str, Any] = {
                "max_tokens": self.engine.max_length + MAX_CANDIDATES,
                "max_requests": 1,
            }
            self._scorer = CandidateScorer(self.model, max_candidates=MAX_CANDIDATES, **budget)
            self._decoder = RaggedDecoder(
                self.engine.generator.base_model, max_candidates=1, **budget
            )
        return self._scorer, self._decoder
