"""CUDA graphs of a guided step: about two hundred small kernels, launched twice.

The tensor code of `candidates`, `scoring` and `rules` stays the only truth: here it runs once, over
static buffers, while a graph records it, and is replayed from then on. Inputs are copied into the
buffers and results out of them, so nothing that is handed out is ever overwritten, and neither
order nor number of calls matters. Every function is row-wise: rows are padded to a bucket with
whatever the buffers hold.

`StepGraphs` answers None where the caller must run the function itself: on the CPU, while the host
engine captures a graph of its own, for a user's own rule, for a shape met too seldom, for logits
that are too large, and where a capture failed once.

Shape legend: R rows of a step, S rows of its bucket, V vocabulary, K candidates, E ending tokens.
"""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lenvm.guidance.candidates import Candidates, Truncation, find_endings
from lenvm.guidance.params import RuleParams
from lenvm.guidance.rules import RULES, apply_rules
from lenvm.guidance.scoring import Draw, find_candidates, keep_candidates, read_drawn
from lenvm.model.head import LengthBelief

MAX_GRAPHS = 128
"""Graphs that are kept, two or three a shape of a step; the one not used for longest goes."""
MAX_FAILURES = 3
"""Captures that may fail before no more are tried."""
NUM_SIGHTINGS = 3
"""Calls of a shape before it is worth a capture."""
MAX_NUMBERS = 20_000_000
"""Logits of a step. Beyond it the kernels take longer than their launches, and the buffers (about
five times the logits in fp32, for good) would take room that the engine may need."""
ALIGNED = 16
"""Bytes: what the scorer's kernels like to read at."""
LARGE = 1 << 20
"""Numbers of an input from which on graphs share its buffer, and it is copied alone."""

Tensors = Sequence[Tensor]
Outputs = tuple[Tensor, ...]
log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records a function of no arguments that reads and returns tensors at fixed places."""

    def can_record(self, x: Tensor) -> bool:
        """Whether functions of tensors such as x can be recorded and replayed now."""
        ...

    def capture(self, fn: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A replay of fn. What it returns is good until any other replay of this recorder."""
        ...


class CudaRecorder:
    """CUDA graphs in one memory pool of their own, recorded on one side stream.

    Only this thread's calls can disturb a capture ("thread_local"): an engine's other threads and
    its own graphs are left alone. Replays come on one stream, as the scorer's do.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def can_record(self, x: Tensor) -> bool:
        return (
            x.is_cuda
            and x.device.index == torch.cuda.current_device()
            and not torch.cuda.is_current_stream_capturing()
        )

    def capture(self, fn: Callable[[], Outputs]) -> Callable[[], Outputs]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        try:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                fn()  # kernels are compiled, tables uploaded
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            mode = {"pool": self._pool, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, stream=self._stream, **mode):
                outputs = fn()
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own behind

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class StepGraphs:
    """Graphs of guided steps, one a shape. See the module for when an answer is None."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or CudaRecorder()
        self.num_replays = 0
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._sightings: OrderedDict[Hashable, int] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._large: dict[Hashable, Tensor] = {}

    # -- the parts of a step ----------------------------------------------------------------------

    def find_candidates(
        self, logits_RV: Tensor, truncation: Truncation, params: RuleParams
    ) -> tuple[Candidates, Tensor] | None:
        """`scoring.find_candidates`: candidates over [R, K] and the ids to score [R, K]."""

        def run(given: Tensors, fixed: Tensors) -> Outputs:
            logits, done = given
            cut, asked = _with_tensors(truncation, params, fixed, done)
            found, scored = find_candidates(logits, cut, asked)
            return scored, found.ids, found.log_probs, found.mask, found.is_ending

        key = ("find_candidates", *_key(truncation, params))
        given = (logits_RV, params.num_generated)
        found = self.call(key, run, given, lambda: _tensors(truncation, params), truncation)
        return None if found is None else (Candidates(*found[1:]), found[0])

    def keep_candidates(
        self, top_RK: Tensor, ids_RK: Tensor, truncation: Truncation, params: RuleParams
    ) -> tuple[Candidates, Tensor] | None:
        """`scoring.keep_candidates`: the same, from what a search outside of graphs has found."""

        def run(given: Tensors, fixed: Tensors) -> Outputs:
            top, ids, done = given
            cut, asked = _with_tensors(truncation, params, fixed, done)
            found, scored = keep_candidates(top, ids, cut, asked)
            return scored, found.ids, found.log_probs, found.mask, found.is_ending

        key = ("keep_candidates", *_key(truncation, params))
        given = (top_RK, ids_RK, params.num_generated)
        found = self.call(key, run, given, lambda: _tensors(truncation, params), truncation)
        return None if found is None else (Candidates(*found[1:]), found[0])

    def apply_rules(
        self,
        candidates: Candidates,
        belief: LengthBelief,
        truncation: Truncation,
        params: RuleParams,
        gamma: float | None,
        scored_RK: Tensor,
        draw: Draw | None = None,
        drawn_by: Tensors = (),
    ) -> Outputs | None:
        """(guided log-probabilities, values at gamma, lengths) of candidates: fp32 [R, K] each.
        With a draw also the tokens draw(log-probabilities, ids, *drawn_by) [R], and what
        `scoring.read_drawn` reads of them: their values and lengths [R].

        belief: over [R, K], as the scorer gave it."""
        if not RULES.keys() >= set(params.rules):
            return None

        def run(given: Tensors, fixed: Tensors) -> Outputs:
            raw, done, ids, log_probs, *more = given
            cut, asked = _with_tensors(truncation, params, fixed, done)
            mask = ids >= 0
            found = Candidates(ids, log_probs, mask, find_endings(ids, cut) & mask)
            known = belief.with_raw(raw).with_terminal(found.is_ending)
            guided = apply_rules(found, known, asked)
            read = known.value(gamma), known.length()
            if draw is None:
                return guided, *read
            scored, *by = more
            tokens = draw(guided, ids, *by)
            return guided, *read, tokens, *read_drawn(tokens, scored, cut.ending_ids, *read)

        parts = (candidates.ids, candidates.log_probs)
        key = ("apply_rules", draw, type(belief), gamma, *_key(truncation, params))
        own = () if draw is None else (scored_RK, *drawn_by)
        given = (belief.raw, params.num_generated, *parts, *own)
        return self.call(key, run, given, lambda: _tensors(truncation, params), truncation)

    def read_drawn(
        self, tokens_R: Tensor, scored_RK: Tensor, endings_RE: Tensor, *read_RK: Tensor
    ) -> Outputs | None:
        """`scoring.read_drawn`: what `read_RK` say of the drawn tokens, [R] each."""
        given = (tokens_R, scored_RK, endings_RE, *read_RK)
        return self.call("read_drawn", lambda x, _: read_drawn(*x), given)

    # -- any row-wise function --------------------------------------------------------------------

    def call(
        self,
        key: Hashable,
        fn: Callable[[Tensors, Tensors], Outputs],
        given: Tensors,
        fixed: Callable[[], list[Tensor]] = list,
        owner: object = None,
    ) -> Outputs | None:
        """fn(given, fixed) from a graph, in tensors of the caller's own; None: not from a graph.

        All tensors are [R, ...] on one device, and fn is row-wise and pure. Functions of one key
        are the same for tensors of the same shapes. `fixed` is read anew where `owner` is another
        object than at the last call.
        """
        first, rows = given[0], len(given[0])
        if not rows or not self.recorder.can_record(first):
            return None
        size = bucket(rows)
        if size * (first.numel() // rows) > MAX_NUMBERS:
            return None
        key = (key, size, *((x.shape[1:], x.dtype) for x in given))
        graph = self._graphs.get(key)
        if graph is None:
            if not self._is_due(key):
                return None
            try:
                graph = self._record(fn, size, given, fixed())
            except Exception as error:  # whatever it is: the plain code does the same, slower
                self._failed.add(key)
                reason = error.__context__ or error  # ending a broken capture fails as well
                log.warning("lenvm: a guided step runs without its CUDA graph: %r", reason)
                return None
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        self.num_replays += 1
        return graph.run(given, fixed, owner)

    def _is_due(self, key: Hashable) -> bool:
        """Whether this shape has come often enough, counting now, and may be recorded."""
        if key in self._failed or len(self._failed) >= MAX_FAILURES:
            return False
        count = self._sightings.pop(key, 0) + 1
        if count >= NUM_SIGHTINGS:
            return True
        self._sightings[key] = count
        if len(self._sightings) > 8 * MAX_GRAPHS:
            self._sightings.popitem(last=False)
        return False

    def _record(
        self, fn: Callable[[Tensors, Tensors], Outputs], size: int, given: Tensors, fixed: Tensors
    ) -> "_Graph":
        buffers = [self._buffer(i, x, size) for i, x in enumerate(given)]
        return _Graph(self.recorder, fn, buffers, [_padded(x, size) for x in fixed])

    def _buffer(self, index: int, x: Tensor, size: int) -> Tensor:
        """Room for the input x [R, ...] of that index: [S, ...]. Graphs share large ones, which
        every call writes before it reads."""
        if size * x[0].numel() < LARGE:
            return _padded(x, size)
        key = (index, x.shape[1:], x.dtype)
        if key not in self._large or len(self._large[key]) < size:
            self._large[key] = x.new_zeros((size, *x.shape[1:]))
        return self._large[key][:size]


class _Graph:
    """One recorded function over its buffers: inputs `given` and `fixed` [S, ...]."""

    def __init__(
        self,
        recorder: Recorder,
        fn: Callable[[Tensors, Tensors], Outputs],
        given: list[Tensor],
        fixed: list[Tensor],
    ) -> None:
        self._given, self._fixed = given, fixed
        self._fn = fn  # what it holds, the graph reads: a belief's tables
        self._owner: object = self  # nobody's yet
        self._groups = _group(given)
        self._rows, self._views = 0, given
        self._layout: list[_Place] = []

        def run() -> Outputs:
            """All outputs in one block of bytes, so that one copy takes them out."""
            outputs = self._fn(self._given, self._fixed)
            self._layout, num_bytes = _lay_out(outputs)
            block = torch.empty(num_bytes, dtype=torch.uint8, device=outputs[0].device)
            for x, place in zip(outputs, self._layout, strict=True):
                place.find(block, len(x)).copy_(x)
            return (block,)

        self._replay = recorder.capture(run)

    def run(self, given: Tensors, fixed: Callable[[], list[Tensor]], owner: object) -> Outputs:
        rows = len(given[0])
        if rows != self._rows:
            self._rows, self._views = rows, [x[:rows] for x in self._given]
        _copy(self._views, given, self._groups)
        if owner is not self._owner:
            _copy([x[:rows] for x in self._fixed], fixed(), _group(self._fixed))
            self._owner = owner
        block = self._replay()[0].clone()
        return tuple(place.find(block, rows) for place in self._layout)


@dataclass(frozen=True)
class _Place:
    """Where an output [S, ...] lies in a block of bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of a row."""
    strides: tuple[int, ...]
    start: int
    """In numbers of its type."""

    def find(self, block: Tensor, rows: int) -> Tensor:
        """The first rows of it."""
        numbers: Tensor = block.view(self.dtype)
        return numbers.as_strided((rows, *self.shape), self.strides, self.start)


def _lay_out(outputs: Outputs) -> tuple[list[_Place], int]:
    """(a place for each, the size of them all), each begins at a multiple of ALIGNED bytes."""
    places, end = [], 0
    for x in outputs:
        strides = torch.empty(x.shape, device="meta").stride()
        places.append(_Place(x.dtype, tuple(x.shape[1:]), strides, end // x.itemsize))
        end += -(-x.numel() * x.itemsize // ALIGNED) * ALIGNED
    return places, end


def bucket(rows: int) -> int:
    """The least of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ... that is at least `rows`."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 32 and rows <= power * 3 // 4 else power


def _padded(x: Tensor, size: int) -> Tensor:
    """A new tensor [S, ...] of x [R, ...], the first row again where there is none."""
    return torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])


def _group(tensors: Tensors) -> list[list[int]]:
    """Which tensors are copied in one launch: those of one type; a large one alone."""
    groups: dict[Hashable, list[int]] = {}
    for index, x in enumerate(tensors):
        groups.setdefault(index if x.numel() >= LARGE else x.dtype, []).append(index)
    return list(groups.values())


def _copy(to: Tensors, given: Tensors, groups: list[list[int]]) -> None:
    for own in groups:
        if len(own) == 1:
            to[own[0]].copy_(given[own[0]])
        else:
            torch._foreach_copy_([to[i] for i in own], [given[i] for i in own])


def _key(truncation: Truncation, params: RuleParams) -> tuple[Hashable, ...]:
    """All of them that is no tensor, and shapes over [R]: what a graph is recorded for."""
    factors = truncation.factors
    own = None if factors is None else (factors.shape[1], factors.dtype)
    widths = (truncation.ending_ids.shape[1], own)
    flags = (params.has_value_gate, params.has_peak)
    return (truncation.max_candidates, *widths, params.rules, params.gammas, *flags)


def _names(x: Truncation | RuleParams) -> list[str]:
    """Fields that are tensors and stay while the same requests step together."""
    return [n for n, v in vars(x).items() if isinstance(v, Tensor) and n != "num_generated"]


def _tensors(truncation: Truncation, params: RuleParams) -> list[Tensor]:
    return [getattr(x, name) for x in (truncation, params) for name in _names(x)]


def _with_tensors(
    truncation: Truncation, params: RuleParams, fixed: Tensors, num_generated: Tensor
) -> tuple[Truncation, RuleParams]:
    """Both over other tensors, in the order of `_tensors`."""
    cut, asked = _names(truncation), _names(params)
    changed: dict[str, Any] = dict(zip((*cut, *asked), fixed, strict=True))
    return (
        dataclasses.replace(truncation, **{n: changed[n] for n in cut}),
        dataclasses.replace(params, num_generated=num_generated, **{n: changed[n] for n in asked}),
    )
