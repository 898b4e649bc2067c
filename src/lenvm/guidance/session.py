"""GuidanceSession: per-request state between an engine and the scorer.

An engine adds requests, hands over the logits of those with a control each step, draws from the
candidates it gets back, and commits what it drew. Requests without control may be added too: they
are only tracked (their values are reported), and take no part in `step`.

Nothing here waits for the device: parameters stay there while the same requests step together, and
what is reported (`remaining`, `values`, `predictions`) is fetched when asked for.

Where the scorer's model is a guide, a predictor reads the prompts, for `shortest` and
`predictions` alone.

Errors: a `RequestError` names the requests that cannot go on. The others are unharmed: the engine
fails the named ones, removes them, and calls again.

Shape legend: R rows of a step, V vocabulary, K candidates.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lenvm.errors import InputError, LenVMError, RequestError
from lenvm.guidance.candidates import Candidates, Truncation, write_back
from lenvm.guidance.graphs import StepGraphs
from lenvm.guidance.params import Asked, RuleParams, build_truncation, pad
from lenvm.guidance.params import Guided as Guided
from lenvm.guidance.prompts import Place, PromptReader, asks_prediction, prefix_of
from lenvm.guidance.rules import RuleFailure, apply_rules
from lenvm.guidance.scorer import CandidateScorer, PromptScorer
from lenvm.guidance.scoring import (
    Draw,
    Predictor,
    Scorer,
    find_candidates,
    find_fault,
    keep_candidates,
    read_drawn,
    search_fused,
)
from lenvm.model.device import upload
from lenvm.model.head import LengthBelief

if TYPE_CHECKING:
    from lenvm.model.value_model import LengthValueModel


@dataclass
class _Reading:
    """Values [R] and remaining lengths [R] of some requests, on the device."""

    values: Tensor
    lengths: Tensor

    @cached_property
    def on_host(self) -> tuple[list[float], list[float]]:
        """(values, lengths), fetched together and once."""
        values, lengths = torch.stack([self.values, self.lengths]).tolist()
        return values, lengths


@dataclass
class _State:
    guided: Guided
    asked: Asked
    endings: tuple[int, ...]
    num_generated: int
    start: tuple[_Reading, int] | None
    """The belief at `add`, and the request's row in it; with a predictor its belief at the prompt's
    end, None until it was asked."""
    now: tuple[_Reading, int]


@dataclass
class _Batch:
    """Device tensors of requests that step together; reused while they do."""

    request_ids: tuple[str, ...]
    states: list[_State]
    truncation: Truncation
    params: RuleParams


@dataclass
class _Step:
    """What the last `step` scored; `rows` shrinks as requests commit."""

    rows: dict[str, int]
    peeked: bool
    """The scorer still holds every candidate of these rows: commit needs to read nothing back."""
    scored_ids: Tensor
    ending_ids: Tensor
    values: Tensor
    lengths: Tensor
    drawn: tuple[Tensor, Tensor] | None = None
    """Values and lengths [R] of the tokens that `draw` drew, once read."""


class GuidanceSession:
    """State of many requests over one scorer. Errors of one request harm no other."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        eos_token_ids: Sequence[int],
        gamma: float | None = None,
        count_candidates: bool = False,
        graphs: StepGraphs | bool = True,
        predictor: Predictor | None = None,
    ) -> None:
        """gamma: discount for controls that name none; None = the checkpoint's.

        count_candidates: tell the scorer how many candidates are real, so that it does no work on
        padding; on a GPU that is one wait a step.

        graphs: on a GPU, replay what a step runs beside the scorer from CUDA graphs.

        predictor: foretells lengths from prompts; None: the scorer does, from its own prefill.
        """
        self.scorer, self.count_candidates = scorer, count_candidates
        self.predictor = predictor
        self._prompts = PromptReader(scorer, predictor)
        self.gamma = scorer.gamma if gamma is None else gamma
        self.eos_token_ids = tuple(eos_token_ids)
        self.graphs = (StepGraphs() if graphs is True else graphs) or None
        self._states: dict[str, _State] = {}
        self._batch: _Batch | None = None
        self._step: _Step | None = None

    @classmethod
    def build(
        cls,
        model: "LengthValueModel",
        *,
        eos_token_ids: Sequence[int],
        count_candidates: bool = False,
        **options: Any,
    ) -> Self:
        """A session over a value model: its guide scores, where it has one, and it predicts.

        options: of the `CandidateScorer`.
        """
        guide = model.guide
        return cls(
            CandidateScorer(model if guide is None else guide, **options),
            eos_token_ids=eos_token_ids,
            count_candidates=count_candidates,
            predictor=None if guide is None else PromptScorer(model, **options),
        )

    # -- requests ---------------------------------------------------------------------------------

    def check(self, request_id: str, guided: Guided) -> None:
        """RequestError where the value model cannot serve the control. Runs before admission."""
        fault = find_fault(guided, self.scorer)
        if fault is not None:
            raise RequestError([request_id], InputError(fault))

    @torch.inference_mode()
    def add(self, requests: Mapping[str, Guided]) -> None:
        """Start requests: prefill of their prompts, and of what a resumed one has generated.

        Requests with the same tokens share one prefill. RequestError names those that cannot be
        added; then none is.
        """
        for request_id, guided in requests.items():
            self.check(request_id, guided)
            if request_id in self._states:
                fault = InputError("it is already there; remove it first")
                raise RequestError([request_id], fault)
        prefixes = {r: prefix_of(guided, self.scorer) for r, guided in requests.items()}
        firsts: dict[tuple[int, ...], str] = {}
        for request_id, prefix in prefixes.items():
            firsts.setdefault(prefix, request_id)
        try:
            belief = self.scorer.add({r: list(p) for p, r in firsts.items()})
            for request_id, prefix in prefixes.items():
                if firsts[prefix] != request_id:
                    self.scorer.fork(firsts[prefix], request_id)
            row = {prefix: index for index, prefix in enumerate(firsts)}
            here = {r: (belief, row[prefix]) for r, prefix in prefixes.items()}
            resolved, read = self._prompts.resolve(requests, here)
        except Exception as error:
            for request_id in requests:  # whatever went wrong, nothing stays behind
                with suppress(LenVMError):
                    self.scorer.remove([request_id])
            if not isinstance(error, LenVMError):
                raise
            raise self._blame(requests, error, lambda r: self._try_add(r, requests[r])) from error
        now = self._to_readings(here)
        start = now if self.predictor is None else self._to_readings(read)
        for request_id, guided in resolved.items():
            eos = () if guided.ignore_eos else self.eos_token_ids
            endings = tuple(dict.fromkeys((*eos, *guided.stop_token_ids)))
            done = len(guided.generated_token_ids)
            asked = Asked.read(
                guided.control,
                has_distribution=self.scorer.has_distribution,
                gamma=self.gamma,
            )
            self._states[request_id] = _State(
                guided, asked, endings, done, start.get(request_id), now[request_id]
            )

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests and their KV."""
        for request_id in request_ids:
            self._state(request_id)
        self.scorer.remove(request_ids)
        for request_id in request_ids:
            del self._states[request_id]
            if self._step is not None:
                self._step.rows.pop(request_id, None)
        self._forget_batch(request_ids)

    # -- one token --------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, request_ids: Sequence[str], logits_RV: Tensor) -> Candidates:
        """The guided distribution over candidates of each row. logits: the generator's own.

        May be called again for other rows or logits before `commit`; nothing is kept but the
        scores of the last call. RequestError for an unknown request or one without control.
        """
        return self._guide(request_ids, logits_RV)[0]

    @torch.inference_mode()
    def draw(
        self, request_ids: Sequence[str], logits_RV: Tensor, draw: Draw, given: Sequence[Tensor]
    ) -> Tensor:
        """`step`, and the tokens drawn from it: draw(log-probabilities, ids, *given), [R].

        On a GPU the draw and what is read of its tokens join the rule's graph. Only these tokens
        may be committed as a tensor then."""
        candidates, tokens = self._guide(request_ids, logits_RV, draw, given)
        return draw(candidates.log_probs, candidates.ids, *given) if tokens is None else tokens

    def _guide(
        self,
        request_ids: Sequence[str],
        logits_RV: Tensor,
        draw: Draw | None = None,
        given: Sequence[Tensor] = (),
    ) -> tuple[Candidates, Tensor | None]:
        """What `step` returns, and tokens if a graph has drawn them."""
        if len(request_ids) != len(logits_RV):
            raise InputError(f"{len(request_ids)} requests, but {len(logits_RV)} rows of logits")
        batch = self._batch_of(request_ids)
        asked = batch.truncation, batch.params
        logits = logits_RV[:, : self.scorer.vocab_size]
        candidates, scored_ids = self._find(logits, *asked)
        num = int((scored_ids >= 0).sum()) if self.count_candidates else None
        try:
            belief = self.scorer.score(request_ids, scored_ids, num_candidates=num)
        except LenVMError as error:
            rows = {r: scored_ids[i : i + 1] for i, r in enumerate(request_ids)}
            raise self._blame(
                request_ids, error, lambda r: self.scorer.score([r], rows[r])
            ) from error
        gamma = self._gamma_of_values
        ruled: tuple[Tensor, ...] | None = None
        if self.graphs:
            ruled = self.graphs.apply_rules(
                candidates, belief, *asked, gamma, scored_ids, draw, given
            )
        if ruled is None:
            belief = belief.with_terminal(candidates.is_ending)
        values, lengths, *drawn = ruled[1:] if ruled else (belief.value(gamma), belief.length())
        self._step = _Step(
            rows=dict(zip(request_ids, range(len(request_ids)), strict=True)),
            peeked=batch.params.scores_all,
            scored_ids=scored_ids,
            ending_ids=batch.truncation.ending_ids,
            values=values,
            lengths=lengths,
            drawn=(drawn[1], drawn[2]) if drawn else None,
        )
        candidates.log_probs = ruled[0] if ruled else self._apply_rules(candidates, belief, batch)
        return candidates, drawn[0] if drawn else None

    def _find(
        self, logits_RV: Tensor, truncation: Truncation, params: RuleParams
    ) -> tuple[Candidates, Tensor]:
        """Candidates of each row and the ids to score [R, K]. Only where no kernel searches does a
        graph get the logits, for which they are copied."""
        asked = truncation, params
        top = search_fused(logits_RV, *asked)
        if top is not None:
            kept = self.graphs.keep_candidates(*top, *asked) if self.graphs else None
            return kept or keep_candidates(*top, *asked)
        found = self.graphs.find_candidates(logits_RV, *asked) if self.graphs else None
        return found or find_candidates(logits_RV, *asked)

    @torch.inference_mode()
    def commit(self, request_ids: Sequence[str], token_ids_R: Tensor | Sequence[int]) -> None:
        """Append the drawn tokens.

        A tensor of tokens promises that rows of the last `step` drew from their candidates: then
        nothing is read back. A list may hold any tokens. Rows that did not step, or drew what was
        not scored, are forwarded now, so that the KV is always complete.
        """
        if not request_ids:
            return
        stepped = self._step.rows if self._step is not None else {}
        batch = self._batch
        if batch is not None and tuple(request_ids) == batch.request_ids == tuple(stepped):
            self._commit_scored(request_ids, batch.states, token_ids_R)
            batch.params = batch.params.advanced()
            return
        states = [self._state(r) for r in request_ids]
        if all(r in stepped for r in request_ids):
            self._commit_scored(request_ids, states, token_ids_R)
        else:
            known = [i for i, r in enumerate(request_ids) if r in stepped]
            new = [i for i, r in enumerate(request_ids) if r not in stepped]
            if known:
                ids, own = [request_ids[i] for i in known], [states[i] for i in known]
                self._commit_scored(ids, own, _pick(token_ids_R, known))
            tokens = torch.as_tensor(_pick(token_ids_R, new))
            self._commit_new([request_ids[i] for i in new], [states[i] for i in new], tokens)
        self._forget_batch(request_ids)

    @torch.inference_mode()
    def write_back(
        self,
        request_ids: Sequence[str],
        candidates: Candidates,
        logits_BV: Tensor,
        rows_R: Tensor | None = None,
    ) -> None:
        """Put what `step` gave for these requests into the engine's logits, in place.

        rows_R: their rows of the engine's batch, int64 (None: the first R). Other rows stay bit for
        bit as they are. The engine still divides by its temperature; that is compensated.
        """
        batch = self._batch_of(request_ids)
        if rows_R is None:
            rows_R = torch.arange(len(request_ids), device=logits_BV.device)
        write_back(candidates, logits_BV, rows_R=rows_R, temperature_R=batch.truncation.temperature)

    # -- what is reported (each call waits for the device) ----------------------------------------

    def remaining(self, request_ids: Sequence[str]) -> list[float]:
        """Predicted tokens still to come (median or the scalar head's length), without control.

        0 after an ending token. Where a shut gate let a token be drawn that was not scored, it is
        that of the row's likeliest candidate.
        """
        return self._read(request_ids)[1]

    def values(self, request_ids: Sequence[str]) -> list[float]:
        """V of the state that each request is in, at the session's gamma."""
        return self._read(request_ids)[0]

    @torch.inference_mode()
    def predictions(self, request_ids: Sequence[str]) -> list[float]:
        """Predicted length of each request at the prompt boundary.

        The predictor reads the prompts that it has not read yet, together. Without one, that of a
        resumed request is where it was resumed.
        """
        states = {r: self._state(r) for r in request_ids}
        if unread := {r: s.guided for r, s in states.items() if s.start is None}:
            try:
                read = self._prompts.read(unread)
            except LenVMError as error:
                raise self._blame(
                    unread, error, lambda r: self._prompts.read({r: unread[r]})
                ) from error
            for request_id, start in self._to_readings(read).items():
                states[request_id].start = start
        lengths = []
        for state in (states[r] for r in request_ids):
            assert state.start is not None
            reading, row = state.start
            done = len(state.guided.generated_token_ids) if self.predictor is None else 0
            lengths.append(reading.on_host[1][row] + done)
        return lengths

    def prediction(self, request_id: str) -> float:
        """`predictions` of one request."""
        return self.predictions([request_id])[0]

    # -- inside -----------------------------------------------------------------------------------

    def _state(self, request_id: str) -> _State:
        if request_id not in self._states:
            fault = InputError("no such request: never added, or removed")
            raise RequestError([request_id], fault)
        return self._states[request_id]

    def _read(self, request_ids: Sequence[str]) -> tuple[list[float], list[float]]:
        """(values, lengths)"""
        places = [self._state(r).now for r in request_ids]
        values = [reading.on_host[0][row] for reading, row in places]
        return values, [reading.on_host[1][row] for reading, row in places]

    @property
    def _gamma_of_values(self) -> float | None:
        return None if self.gamma == self.scorer.gamma else self.gamma

    def _batch_of(self, request_ids: Sequence[str]) -> _Batch:
        """Parameters on the device, made anew only where other requests step together."""
        key = tuple(request_ids)
        if self._batch is not None and self._batch.request_ids == key:
            return self._batch
        states = [self._state(r) for r in key]
        if len(set(key)) != len(key):
            raise InputError("a request is named twice in one step")
        if tracked := [r for r, s in zip(key, states, strict=True) if s.guided.control is None]:
            fault = InputError("it has no length control: it is only tracked")
            raise RequestError(tracked, fault)
        device = states[0].now[0].lengths.device
        params = RuleParams.build(
            [s.asked for s in states], [s.num_generated for s in states], device=device
        )
        truncation = build_truncation(
            [s.guided for s in states],
            [s.endings for s in states],
            self.scorer.vocab_size,
            device,
        )
        self._batch = _Batch(key, states, truncation, params)
        return self._batch

    def _forget_batch(self, request_ids: Sequence[str]) -> None:
        if self._batch is not None and not set(request_ids).isdisjoint(self._batch.request_ids):
            self._batch = None

    def _apply_rules(self, candidates: Candidates, belief: LengthBelief, batch: _Batch) -> Tensor:
        try:
            return apply_rules(candidates, belief, batch.params)
        except RuleFailure as error:
            controls = {r: self._states[r].guided.control for r in batch.request_ids}
            own = [r for r, c in controls.items() if c is not None and c.rule == error.rule]
            raise RequestError(own, error) from error

    def _commit_scored(
        self,
        request_ids: Sequence[str],
        states: Sequence[_State],
        tokens_R: Tensor | Sequence[int],
    ) -> None:
        step = self._step
        assert step is not None
        drawn = isinstance(tokens_R, Tensor)
        self.scorer.commit(request_ids, tokens_R, peeked=step.peeked and drawn)
        rows = [step.rows.pop(r) for r in request_ids]
        known = step.drawn if drawn else None
        found: tuple[Tensor, ...]
        found = known or (step.scored_ids, step.ending_ids, step.values, step.lengths)
        if rows != list(range(len(step.scored_ids))):
            index = upload(rows, torch.long, step.scored_ids.device)
            found = tuple(x[index] for x in found)
        if not known:
            tokens = torch.as_tensor(tokens_R).to(step.scored_ids.device, non_blocking=True)
            now = self.graphs.read_drawn(tokens, *found) if self.graphs else None
            found = now or read_drawn(tokens, *found)
        _move(states, _Reading(*found))

    def _commit_new(
        self, request_ids: Sequence[str], states: Sequence[_State], tokens_R: Tensor
    ) -> None:
        device = states[0].now[0].lengths.device
        tokens = tokens_R.to(device, non_blocking=True)
        if self._step is not None:
            self._step.peeked = False  # the scorer holds the candidates of one call only
        belief = self.scorer.score(
            request_ids, tokens.unsqueeze(-1), num_candidates=len(request_ids)
        )
        self.scorer.commit(request_ids, tokens, peeked=True)
        ended = (pad([s.endings for s in states], device) == tokens.unsqueeze(-1)).any(-1)
        belief = belief.with_terminal(ended.unsqueeze(-1))
        values = belief.value(self._gamma_of_values)
        _move(states, _Reading(values[:, 0], belief.length()[:, 0]))

    def _to_readings(self, places: Mapping[str, Place]) -> dict[str, tuple[_Reading, int]]:
        """Places as readings; those of one belief share theirs."""
        readings: dict[int, _Reading] = {}
        for belief, _ in places.values():
            if id(belief) not in readings:
                reading = _Reading(belief.value(self._gamma_of_values), belief.length())
                readings[id(belief)] = reading
        return {r: (readings[id(belief)], row) for r, (belief, row) in places.items()}

    def _try_add(self, request_id: str, guided: Guided) -> None:
        self.scorer.add({request_id: list(prefix_of(guided, self.scorer))})
        self.scorer.remove([request_id])
        if self.predictor is not None and asks_prediction(guided):
            self._prompts.read({request_id: guided})

    def _blame(
        self, request_ids: Iterable[str], error: LenVMError, attempt: Callable[[str], object]
    ) -> RequestError:
        """Whose fault an error of a batch is: those that fail alone; all, where none does."""
        guilty, cause = [], error
        for request_id in request_ids:
            try:
                attempt(request_id)
            except LenVMError as own:
                guilty.append(request_id)
                cause = own
        return RequestError(guilty or list(request_ids), cause)


def _move(states: Sequence[_State], reading: _Reading) -> None:
    """A token more for each of these requests, which are in the states that were read."""
    for row, state in enumerate(states):
        state.num_generated += 1
        state.now = (reading, row)


def _pick(tokens_R: Tensor | Sequence[int], rows: list[int]) -> Tensor | Sequence[int]:
    return tokens_R[rows] if isinstance(tokens_R, Tensor) else [tokens_R[i] for i in rows]
