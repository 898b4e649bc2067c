"""GuidedBatch: guidance inside another engine's batch. One core for vLLM and SGLang.

The engine hands over the logits of its batch at every step. Rows under guidance get their token
here: it is drawn from the rule's distribution, and the row is left with that one token possible.
Whatever the engine's sampler does afterwards (temperature, truncation, penalties) cannot change
the distribution, and the token is known on the device: nothing is read back, so the engine may
schedule the next step before it knows this one's tokens. Other rows stay bit for bit as they are,
and the engine's own random numbers are not touched.

Engines also sample rows whose token they throw away (a prompt that is cut in chunks, a request
that is taken back). So a drawn token joins its request only when the engine says so: `settle`.

A request whose guidance fails (an error of a rule, memory, anything) ends with a reason, alone.

Under tensor parallelism rank 0 draws, and the other ranks (`FollowingBatch`) get its tokens: they
agree by construction, and one copy of the value model is enough.

Shape legend: B rows of the engine's batch, R guided rows, V vocabulary, K candidates.
"""

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lenvm.engines.penalties import Penalties
from lenvm.engines.sampling import draw
from lenvm.errors import LenVMError, RequestError
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.device import upload

MAX_RETRIES = 3
"""Requests that one step sacrifices one by one to an error that names nobody, before all go."""

T = TypeVar("T")
Share = Callable[[Tensor], Tensor]
"""Rank 0's tokens [R] int64 on every tensor-parallel rank."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admission:
    """A request as an engine admits it. Penalties are vLLM's; logits come without them."""

    guided: Guided
    seed: int | None = None
    """The request's own random numbers; None takes the batch's."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    failure_token_id: int | None = None
    """What a failed request is made to say: a token that ends it. Never drawn otherwise."""


@dataclass
class _State:
    admission: Admission
    stream: random.Random
    order: int
    uniform: float | None = None
    """The number of the coming draw; used up when the drawn token is kept."""
    is_prefilled: bool = False
    failure: str | None = None
    kept: list[tuple[list[Tensor], int]] = field(default_factory=list)
    """Its tokens since admission as (tokens of steps [R] each, its place); read only to rebuild."""


@dataclass
class _Draw:
    """What holds while the same live requests are drawn together: found once."""

    request_ids: list[str]
    states: list[_State]
    is_penalised: bool
    """Some of them have penalties."""
    banned: list[int]
    """Tokens that are never drawn: they have one meaning only."""
    greedy_R: Tensor | None
    """Rows that take the likeliest candidate; None: no row does."""
    kept: list[Tensor]
    """Tokens of the steps that were kept whole; every state has it in its own `kept`."""


@dataclass
class _Drawn:
    request_ids: list[str] = field(default_factory=list)
    tokens_R: Tensor | None = None


class Batch(Protocol):
    """What an engine's adapter asks of a batch: `GuidedBatch` on rank 0, `FollowingBatch` else."""

    def add(self, request_id: str, admission: Admission) -> None: ...
    def remove(self, request_id: str) -> None: ...
    def fail(self, request_id: str, reason: str) -> None: ...
    def settle(self, kept: Sequence[str]) -> None: ...
    def step(self, request_ids: Sequence[str], rows: Sequence[int], logits_BV: Tensor) -> None: ...


class FollowingBatch:
    """Requests of a tensor-parallel rank over 0: the tokens come from rank 0, in the same order."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def add(self, request_id: str, admission: Admission) -> None:
        """Rank 0 does."""

    def remove(self, request_id: str) -> None:
        """Rank 0 does."""

    def fail(self, request_id: str, reason: str) -> None:
        """Rank 0 does."""

    def settle(self, kept: Sequence[str]) -> None:
        """Rank 0 does."""

    def step(self, request_ids: Sequence[str], rows: Sequence[int], logits_BV: Tensor) -> None:
        """Write rank 0's tokens into these rows of the logits, in place."""
        if request_ids:
            device = logits_BV.device
            tokens = torch.zeros(len(request_ids), dtype=torch.long, device=device)
            _force(logits_BV, upload(list(rows), torch.long, device), self.share(tokens))


class GuidedBatch:
    """Guided requests of one engine process."""

    def __init__(
        self,
        session: GuidanceSession,
        *,
        seed: int = 0,
        share: Share | None = None,
        on_failure: Callable[[str, str], None] | None = None,
    ) -> None:
        """seed: of requests without one. share: sends tokens to the other tensor-parallel ranks.
        on_failure(request_id, reason) tells the engine, where it listens."""
        self.session, self.seed, self.share, self.on_failure = session, seed, share, on_failure
        self._states: dict[str, _State] = {}
        self._penalties = Penalties()
        self._num_admitted = 0
        self._drawn = _Drawn()
        self._rows: tuple[list[int], Tensor] | None = None
        self._draw: _Draw | None = None

    # -- requests ---------------------------------------------------------------------------------

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def __len__(self) -> int:
        return len(self._states)

    def failure(self, request_id: str) -> str | None:
        """Why the request's guidance failed; None while it goes on."""
        return self._states[request_id].failure

    def add(self, request_id: str, admission: Admission) -> None:
        """Admit a request. Its prompt (and what it has generated) is prefilled with its first step,
        together with the others'."""
        number = self._num_admitted
        self._num_admitted += 1
        own = admission.seed
        stream = random.Random(f"{self.seed}/{number}" if own is None else f"seed/{own}")
        for _ in admission.guided.generated_token_ids:
            stream.random()  # a resumed request goes on where it was
        self._states[request_id] = _State(admission, stream, number)
        guided = admission.guided
        self._penalties.add(
            request_id, admission, guided.prompt_token_ids, guided.generated_token_ids
        )
        self._draw = None

    def remove(self, request_id: str) -> None:
        """Forget a request and free its value cache."""
        state = self._states.pop(request_id)
        self._penalties.remove(request_id)
        self._draw = None
        if state.is_prefilled:
            self.session.remove([request_id])

    def fail(self, request_id: str, reason: str) -> None:
        """End a request's guidance, and with it the request. Others go on."""
        state = self._states[request_id]
        if state.failure is not None:
            return
        self._draw = None
        state.failure = reason
        self._penalties.remove(request_id)
        log.error("lenvm: request %s ends, its guidance failed: %s", request_id, reason)
        if state.is_prefilled:
            state.is_prefilled = False
            self.session.remove([request_id])
        if self.on_failure is not None:
            self.on_failure(request_id, reason)

    # -- one token --------------------------------------------------------------------------------

    @torch.inference_mode()
    def settle(self, kept: Sequence[str]) -> None:
        """Say whose token of the last `step` the engine kept. The others' are forgotten, and are
        drawn again with the same random number."""
        drawn, self._drawn = self._drawn, _Drawn()
        if drawn.tokens_R is None:
            return
        plan, ids, tokens = self._draw, drawn.request_ids, drawn.tokens_R
        chosen = set(kept)
        if plan is not None and plan.request_ids == ids and chosen.issuperset(ids):
            states = plan.states
            plan.kept.append(tokens)
        else:
            self._draw = None  # its steps go on no longer for all alike
            rows = [i for i, r in enumerate(ids) if r in chosen and self._is_live(r)]
            if not rows:
                return
            if len(rows) < len(ids):
                tokens = tokens[upload(rows, torch.long, tokens.device)]
            ids = [ids[i] for i in rows]
            states = [self._states[r] for r in ids]
            for index, state in enumerate(states):
                state.kept.append(([tokens], index))
        for state in states:
            state.uniform = None
        self._penalties.count(ids, tokens)
        try:
            self.session.commit(ids, tokens)
        except torch.AcceleratorError:
            raise  # the device itself is lost; nothing in this process can go on
        except Exception as error:  # some may be committed and some not: start them again
            guilty = self._blame(ids, error, spare=True)
            self._rebuild([r for r in ids if r not in guilty])

    @torch.inference_mode()
    def step(self, request_ids: Sequence[str], rows: Sequence[int], logits_BV: Tensor) -> None:
        """Draw the next token of these requests, which stand at these rows of the engine's logits
        (in place). `settle` must have been called since the last step."""
        if not request_ids:
            return
        row_of = dict(zip(request_ids, rows, strict=True))
        live = list(request_ids)
        if self._draw is None or self._draw.request_ids != live:
            self._prefill([r for r in request_ids if self._is_new(r)])
            live = [r for r in request_ids if self._is_live(r)]
        live, drawn = self._attempt(live, lambda some: self._sample(some, row_of, logits_BV))
        if drawn is not None:
            self._drawn = _Drawn(live, drawn)
        tokens = self._with_failures(request_ids, live, drawn, logits_BV)
        if self.share is not None:
            tokens = self.share(tokens)
        _force(logits_BV, self._index(list(rows), logits_BV), tokens)

    # -- inside -----------------------------------------------------------------------------------

    def _is_live(self, request_id: str) -> bool:
        state = self._states.get(request_id)
        return state is not None and state.failure is None and state.is_prefilled

    def _is_new(self, request_id: str) -> bool:
        state = self._states[request_id]
        return state.failure is None and not state.is_prefilled

    def _prefill(self, request_ids: list[str]) -> None:
        def add(some: list[str]) -> None:
            self.session.add({r: self._states[r].admission.guided for r in some})

        added, _ = self._attempt(request_ids, add)
        for request_id in added:
            self._states[request_id].is_prefilled = True

    def _sample(self, request_ids: list[str], row_of: dict[str, int], logits_BV: Tensor) -> Tensor:
        """Next tokens, [R] int64."""
        index = self._index([row_of[r] for r in request_ids], logits_BV)
        logits = logits_BV if index is None else logits_BV.index_select(0, index)
        plan = self._plan(request_ids, logits)
        if plan.is_penalised:
            logits = logits.clone() if logits is logits_BV else logits
            self._penalties.apply(request_ids, logits)
        for token in plan.banned:
            logits.select(1, token).fill_(-torch.inf)
        for state in plan.states:
            if state.uniform is None:
                state.uniform = state.stream.random()
        uniform = upload([s.uniform for s in plan.states], torch.float32, logits_BV.device)
        given = [uniform] if plan.greedy_R is None else [uniform, plan.greedy_R]
        return self.session.draw(request_ids, logits, _draw_tokens, given)

    def _plan(self, request_ids: list[str], logits_RV: Tensor) -> _Draw:
        if self._draw is not None and self._draw.request_ids == request_ids:
            return self._draw
        states = [self._states[r] for r in request_ids]
        cold = [s.admission.guided.temperature == 0 for s in states]
        banned = {s.admission.failure_token_id for s in states}
        self._draw = _Draw(
            request_ids=list(request_ids),
            states=states,
            is_penalised=any(r in self._penalties for r in request_ids),
            banned=[t for t in banned if t is not None and t < logits_RV.shape[-1]],
            greedy_R=upload(cold, torch.bool, logits_RV.device) if any(cold) else None,
            kept=[],
        )
        for index, state in enumerate(states):
            state.kept.append((self._draw.kept, index))
        return self._draw

    def _with_failures(
        self,
        request_ids: Sequence[str],
        live: list[str],
        drawn: Tensor | None,
        logits_BV: Tensor,
    ) -> Tensor:
        """Tokens of all these requests: drawn, or the one that ends a failed request."""
        if drawn is not None and len(live) == len(request_ids):
            return drawn
        endings = [self._ending_token(self._states[r], logits_BV.shape[-1]) for r in request_ids]
        tokens: Tensor = upload(endings, torch.long, logits_BV.device)
        if drawn is not None:
            place = {r: i for i, r in enumerate(request_ids)}
            tokens[upload([place[r] for r in live], torch.long, tokens.device)] = drawn
        return tokens

    @staticmethod
    def _ending_token(state: _State, vocab_size: int) -> int:
        admission = state.admission
        token = admission.failure_token_id
        if token is not None and token < vocab_size:
            return token
        return next(iter(admission.guided.stop_token_ids), 0)

    def _rebuild(self, request_ids: Sequence[str]) -> None:
        """Forget what the scorer holds of these requests; their next step prefills them again."""
        self._draw = None
        for request_id in request_ids:
            state = self._states[request_id]
            with suppress(LenVMError):
                self.session.remove([request_id])
            state.is_prefilled = False
            tokens = tuple(int(t[index]) for steps, index in state.kept for t in steps)
            guided = state.admission.guided
            guided = replace(guided, generated_token_ids=(*guided.generated_token_ids, *tokens))
            state.admission = replace(state.admission, guided=guided)
            state.kept.clear()

    def _index(self, rows: list[int], logits_BV: Tensor) -> Tensor | None:
        """These rows on the device; None for all of them in order."""
        if rows == list(range(len(logits_BV))):
            return None
        if self._rows is None or self._rows[0] != rows:
            self._rows = rows, upload(rows, torch.long, logits_BV.device)
        return self._rows[1]

    def _attempt(
        self, request_ids: list[str], call: Callable[[list[str]], T]
    ) -> tuple[list[str], T | None]:
        """call(requests) without those that it fails for: (who is left, what it returned)."""
        left, num_unnamed = list(request_ids), 0
        while left:
            try:
                return left, call(left)
            except torch.AcceleratorError:
                raise  # the device itself is lost; nothing in this process can go on
            except Exception as error:  # whatever it is, it ends the request at hand and no other
                guilty = self._blame(left, error, spare=num_unnamed < MAX_RETRIES)
                num_unnamed += 1
                left = [r for r in left if r not in guilty]
        return [], None

    def _blame(self, request_ids: Sequence[str], error: Exception, *, spare: bool) -> set[str]:
        """End the requests that an error names. Where it names nobody, or everybody (none failed
        alone: memory for all of them is short): the newest, or (not `spare`) all."""
        named = error.request_ids if isinstance(error, RequestError) else ()
        guilty = [r for r in request_ids if r in named]
        if not guilty or len(guilty) == len(request_ids):
            newest = max(request_ids, key=lambda r: self._states[r].order)
            guilty = [newest] if spare else list(request_ids)
        cause = error.cause if isinstance(error, RequestError) else error
        for request_id in guilty:
            self.fail(request_id, f"{type(cause).__name__}: {cause}")
        return set(guilty)


def _draw_tokens(
    log_probs_RK: Tensor, ids_RK: Tensor, uniform_R: Tensor, greedy_R: Tensor | None = None
) -> Tensor:
    """Tokens [R] by one uniform number a row; the likeliest of greedy rows."""
    index = draw(log_probs_RK, uniform_R, greedy_R=greedy_R)
    return ids_RK.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _force(logits_BV: Tensor, rows_R: Tensor | None, tokens_R: Tensor) -> None:
    """Leave these rows (None: all) with one possible token each, in place. Log-probability 0
    survives every temperature, penalty and truncation."""
    if rows_R is None:
        logits_BV.fill_(-torch.inf).scatter_(1, tokens_R.unsqueeze(1), 0.0)
        return
    logits_BV.index_fill_(0, rows_R, -torch.inf)
    logits_BV.index_put_((rows_R, tokens_R), torch.zeros_like(tokens_R, dtype=logits_BV.dtype))
