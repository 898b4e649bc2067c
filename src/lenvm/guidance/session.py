"""GuidanceSession: per-request state between an engine and the scorer.

An engine adds requests, hands over the logits of those with a control each step, draws from the
candidates it gets back, and commits what it drew. Requests without control may be added too: they
are only tracked (their values are reported), and take no part in `step`.

Shape legend: R rows of a step, V vocabulary, K candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lenvm.errors import InputError
from lenvm.guidance.candidates import Candidates, build_candidates
from lenvm.guidance.request import MAX_CANDIDATES, LengthControl
from lenvm.guidance.rules import RuleParams, apply_rules, entropy
from lenvm.guidance.scorer import CandidateScorer
from lenvm.model.head import LengthBelief


@dataclass(frozen=True)
class Guided:
    """A request as guidance sees it. `control` None = tracked only.

    Truncation of the request and of the control both apply. `generated_token_ids` resumes one.
    """

    prompt_token_ids: Sequence[int]
    control: LengthControl | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: Sequence[int] = ()
    generated_token_ids: Sequence[int] = ()


@dataclass
class _State:
    guided: Guided
    num_generated: int
    prediction: float
    remaining: float
    scored: dict[int, float] = field(default_factory=dict)
    """Predicted remaining of the candidates of the current step, by token id."""


class GuidanceSession:
    """State of many requests over one scorer. Errors of one request harm no other."""

    def __init__(self, scorer: CandidateScorer, *, eos_token_ids: Sequence[int]) -> None:
        self.scorer = scorer
        self.eos_token_ids = tuple(eos_token_ids)
        self._states: dict[str, _State] = {}

    def add(self, requests: Mapping[str, Guided]) -> None:
        """Start requests: prefill of their prompts, and of what a resumed one has generated."""
        for request_id, guided in requests.items():
            self.check(request_id, guided)
        belief = self.scorer.add(
            {r: [*g.prompt_token_ids, *g.generated_token_ids] for r, g in requests.items()}
        )
        for (request_id, guided), remaining in zip(
            requests.items(), belief.length().tolist(), strict=True
        ):
            done = len(guided.generated_token_ids)
            self._states[request_id] = _State(guided, done, remaining + done, remaining)

    def check(self, request_id: str, guided: Guided) -> None:
        """InputError where the value model cannot serve the control."""
        control = guided.control
        if control is None or control.rule != "conditional":
            return
        if self.scorer.model.config.head != "distribution":
            raise InputError(
                f"request {request_id!r}: rule 'conditional' needs a value model with the "
                "distribution head; this one has the scalar head: use rule 'soft' or 'hard'"
            )

    def step(self, request_ids: Sequence[str], logits_RV: Tensor) -> Candidates:
        """The guided distribution over candidates of each row. logits: the generator's own.

        Raises InputError for an unknown request or one without control.
        """
        states = [self._state(r) for r in request_ids]
        controls = [_control(r, s) for r, s in zip(request_ids, states, strict=True)]
        for state in states:
            state.scored = {}
        candidates = self._candidates(states, logits_RV)
        params = RuleParams.build(
            controls,
            [s.num_generated for s in states],
            has_distribution=self.scorer.model.config.head == "distribution",
            device=logits_RV.device,
        )
        worth = self._worth_scoring(candidates, params)
        if not bool(worth.any()):
            ones = torch.zeros((*candidates.ids.shape, self.scorer.model.head.num_outputs))
            belief: LengthBelief = self.scorer.model.belief(ones.to(logits_RV.device))
        else:
            scored_ids = candidates.ids.masked_fill(candidates.is_ending | ~worth.unsqueeze(-1), -1)
            belief = self._score(request_ids, scored_ids, worth)
            self._remember(states, scored_ids, belief)
        belief = belief.with_terminal(candidates.is_ending)
        params.min_entropy = torch.where(worth, params.min_entropy, torch.inf)
        candidates.log_probs = apply_rules(candidates, belief, params, self.scorer.gamma)
        return candidates

    def commit(self, request_ids: Sequence[str], token_ids: Sequence[int]) -> None:
        """Append the drawn tokens. What was not scored in `step` is forwarded now."""
        rows = [(r, int(t)) for r, t in zip(request_ids, token_ids, strict=True)]
        kept = [(r, t) for r, t in rows if t in self._state(r).scored]
        new = [(r, t) for r, t in rows if t not in self._state(r).scored]
        if kept:
            self.scorer.commit([r for r, _ in kept], [t for _, t in kept])
            for request_id, token in kept:
                self._states[request_id].remaining = self._states[request_id].scored[token]
        if new:
            belief = self.scorer.extend({r: [t] for r, t in new})
            for (request_id, token), remaining in zip(new, belief.length().tolist(), strict=True):
                ends = token in self._endings(self._states[request_id])
                self._states[request_id].remaining = 0.0 if ends else remaining
        for request_id, _ in rows:
            self._states[request_id].num_generated += 1
            self._states[request_id].scored = {}

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests and their KV."""
        for request_id in request_ids:
            self._state(request_id)
        self.scorer.remove(request_ids)
        for request_id in request_ids:
            del self._states[request_id]

    def remaining(self, request_ids: Sequence[str]) -> list[float]:
        """Predicted tokens still to come (median or the scalar head's length), without control."""
        return [self._state(r).remaining for r in request_ids]

    def prediction(self, request_id: str) -> float:
        """Predicted length at the prompt boundary."""
        return self._state(request_id).prediction

    # -- inside -----------------------------------------------------------------------------------

    def _state(self, request_id: str) -> _State:
        if request_id not in self._states:
            raise InputError(f"no request {request_id!r}: never added, or removed")
        return self._states[request_id]

    def _endings(self, state: _State) -> tuple[int, ...]:
        return (*self.eos_token_ids, *state.guided.stop_token_ids)

    def _candidates(self, states: list[_State], logits_RV: Tensor) -> Candidates:
        device, vocabulary = logits_RV.device, logits_RV.shape[-1]
        endings = [self._endings(s) for s in states]
        most = max(len(e) for e in endings)
        limits = [_truncation(s.guided, vocabulary) for s in states]
        top_k, top_p, min_p = zip(*limits, strict=True)
        goal = [_control("", s).tilt is None for s in states]
        return build_candidates(
            logits_RV,
            temperature_R=torch.tensor([s.guided.temperature for s in states], device=device),
            top_k_R=torch.tensor(top_k, device=device),
            top_p_R=torch.tensor(top_p, device=device),
            min_p_R=torch.tensor(min_p, device=device),
            ending_ids_RE=torch.tensor(
                [[*e, *[-1] * (most - len(e))] for e in endings], device=device
            ),
            keep_endings_R=torch.tensor(goal, device=device),
            max_candidates=max(top_k),
        )

    def _worth_scoring(self, candidates: Candidates, params: RuleParams) -> Tensor:
        """Rows in which the rule can change anything: [R]."""
        several = candidates.mask.sum(-1) > 1
        open_ = entropy(candidates.log_probs) >= params.min_entropy
        return several & open_ & (params.code > 0)

    def _score(self, request_ids: Sequence[str], ids_RK: Tensor, worth: Tensor) -> LengthBelief:
        """Score the rows that are worth it, in columns that are used; the rest reads as zeros."""
        rows = worth.nonzero().squeeze(-1)
        columns = (ids_RK[rows] >= 0).any(0).nonzero().squeeze(-1)
        raw = self.scorer.score_raw(
            [request_ids[i] for i in rows.tolist()], ids_RK[rows][:, columns]
        )
        full = raw.new_zeros(*ids_RK.shape, raw.shape[-1])
        full[rows.unsqueeze(-1), columns] = raw
        return self.scorer.model.belief(full)

    def _remember(self, states: list[_State], ids_RK: Tensor, belief: LengthBelief) -> None:
        ids, lengths = ids_RK.tolist(), belief.length().tolist()
        for state, row, remaining in zip(states, ids, lengths, strict=True):
            state.scored = {t: n for t, n in zip(row, remaining, strict=True) if t >= 0}


def _control(request_id: str, state: _State) -> LengthControl:
    if state.guided.control is None:
        raise InputError(f"request {request_id!r} has no length control: it is only tracked")
    return state.guided.control


def _truncation(guided: Guided, vocabulary: int) -> tuple[int, float, float]:
    """(top_k, top_p, min_p): the tighter of the request's and the control's."""
    control = guided.control
    assert control is not None
    top_k = min(guided.top_k or MAX_CANDIDATES, control.top_k, vocabulary)
    return top_k, min(guided.top_p, control.top_p), max(guided.min_p, control.min_p)
