"""A Markov generator whose remaining length is known exactly, and a scorer that knows it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lenvm.errors import InputError
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.head import DistributionBelief, LengthBelief, LengthBins, ScalarBelief
from lenvm.returns import length_to_logit

EOS = 0
GAMMA = 0.95
BINS = LengthBins(num_single=200, growth=1.5)


class Markov:
    """Token x follows y with probability transition[y, x]; token 0 ends."""

    def __init__(self, size: int = 4, seed: int = 0, end: float = 0.15) -> None:
        generator = torch.Generator().manual_seed(seed)
        moves = torch.rand(size, size, generator=generator, dtype=torch.float64) + 0.05
        moves[:, EOS] = 0
        ends = end * (0.3 + 1.4 * torch.rand(size, generator=generator, dtype=torch.float64))
        self.transition = moves / moves.sum(1, keepdim=True) * (1 - ends[:, None])
        self.transition[:, EOS] = ends
        # after[n, y] = P(n more tokens | last token y), n = 1 .. 200
        after = [self.transition[:, EOS]]
        stay = self.transition.clone()
        stay[:, EOS] = 0
        for _ in range(199):
            after.append(stay @ after[-1])
        self.after = torch.stack(after)

    def logits(self, token: int) -> Tensor:
        return self.transition[token].log().float()


class OracleScorer:
    """CandidateScorer's interface with exact beliefs, scalar or distribution.

    `requests` holds each request's tokens as committed; `num_scored` counts candidates scored.
    """

    gamma = GAMMA
    max_candidates = 256
    vocab_size = 1000

    def __init__(self, markov: Markov, head: str = "distribution") -> None:
        self.markov, self.has_distribution = markov, head == "distribution"
        self.requests: dict[str, list[int]] = {}
        self.num_scored = self.num_prefilled = 0
        self.held: dict[str, list[int]] = {}

    def belief(self, tokens: Tensor) -> LengthBelief:
        raw = self.raw(tokens)
        if not self.has_distribution:
            return ScalarBelief(raw.squeeze(-1), GAMMA)
        return DistributionBelief(raw, GAMMA, BINS)

    def raw(self, tokens: Tensor) -> Tensor:
        probs = self.markov.after[:, tokens.clamp(0, self.markov.after.shape[1] - 1)].movedim(0, -1)
        if not self.has_distribution:
            n = torch.arange(1, 201, dtype=torch.float64)
            u = (probs * -torch.expm1(n * torch.tensor(GAMMA).double().log())).sum(-1)
            return torch.logit(u).float().unsqueeze(-1)
        logits = torch.full((*tokens.shape, len(BINS)), -60.0)
        logits[..., :200] = probs.clamp(min=1e-30).log().float()
        return logits

    def encode_control(self, control: Mapping[str, Any] | None) -> list[int]:
        return []

    def add(self, requests: Mapping[str, Sequence[int]]) -> LengthBelief:
        for request_id, ids in requests.items():
            if not ids:
                raise InputError(f"request {request_id!r}: the prompt is empty")
        self.requests.update({r: list(ids) for r, ids in requests.items()})
        self.num_prefilled += len(requests)
        return self.belief(torch.tensor([ids[-1] for ids in requests.values()]))

    def fork(self, parent_id: str, child_id: str) -> None:
        self.requests[child_id] = list(self.requests[parent_id])

    def score(
        self,
        request_ids: Sequence[str],
        candidate_ids_RK: Tensor,
        *,
        num_candidates: int | None = None,
    ) -> LengthBelief:
        assert all(r in self.requests for r in request_ids)
        assert candidate_ids_RK.shape[0] == len(request_ids)
        self.held = dict(zip(request_ids, candidate_ids_RK.tolist(), strict=True))
        self.num_scored += int((candidate_ids_RK >= 0).sum())
        return self.belief(candidate_ids_RK)

    def commit(
        self,
        request_ids: Sequence[str],
        token_ids_R: Tensor | Sequence[int],
        *,
        peeked: bool = False,
    ) -> None:
        tokens = torch.as_tensor(token_ids_R).tolist()
        for request_id, token in zip(request_ids, tokens, strict=True):
            assert not peeked or token in self.held[request_id], "the promise of peeked is broken"
            self.requests[request_id].append(token)

    def remove(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if request_id not in self.requests:
                raise InputError(f"no request {request_id!r}: never added, or removed")
            del self.requests[request_id]


class PointScorer(OracleScorer):
    """Token k >= 1 means: exactly k more tokens follow. The generator counts down to EOS."""

    def raw(self, tokens: Tensor) -> Tensor:
        return length_to_logit(tokens.clamp(min=1), GAMMA).unsqueeze(-1)


def session(markov: Markov, head: str = "distribution") -> GuidanceSession:
    return GuidanceSession(OracleScorer(markov, head), eos_token_ids=[EOS])


def step_probs(guidance: GuidanceSession, markov: Markov, name: str, last: int) -> dict[int, float]:
    """Probability of each next token under guidance."""
    found = guidance.step([name], markov.logits(last).unsqueeze(0))
    probs = found.log_probs[0].exp().tolist()
    return {t: p for t, p in zip(found.ids[0].tolist(), probs, strict=True) if t >= 0}


__all__ = ["BINS", "EOS", "GAMMA", "Guided", "Markov", "OracleScorer", "session", "step_probs"]
