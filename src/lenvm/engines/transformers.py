"""The in-process engine: continuous batching of any Hugging Face decoder, with length control.

Requests join and leave between steps. Generator and value model each run in a `RaggedDecoder`: one
forward a step over all running requests, whatever their lengths. A request without control is
sampled from the generator alone; with one, `GuidanceSession` turns its logits into the guided
distribution over a few candidates. A row's tokens never depend on its batch-mates beyond rounding.

Shape legend: R running rows, V vocabulary, K candidates, H hidden size.
"""

import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lenvm.engines.penalties import Penalties
from lenvm.engines.request import Completion as Completion
from lenvm.engines.request import Request as Request
from lenvm.engines.sampling import adjust, draw, truncate
from lenvm.engines.text import TextStream
from lenvm.errors import CapacityError, ControlError, InputError, LenVMError, RequestError
from lenvm.guidance.scorer import CandidateScorer
from lenvm.guidance.session import GuidanceSession
from lenvm.model.bundled import resolve_model
from lenvm.model.device import upload
from lenvm.model.packed_linear import pack_linear
from lenvm.model.ragged import RaggedDecoder
from lenvm.model.reading import reading
from lenvm.model.tokenization import find_eos_token_ids, load_tokenizer
from lenvm.model.value_model import LengthValueModel

PREFILL_TOKENS = 2048
"""Prompt tokens admitted in one step, so that a queue of prompts does not stall who is running."""


class TransformersEngine:
    """Generates for many requests at once. Not thread-safe: one thread calls `step`."""

    def __init__(
        self,
        generator: Any,
        tokenizer: Any,
        value_model: LengthValueModel | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        max_requests: int = 32,
        max_tokens: int = 65_536,
        max_candidates: int = 16,
        cuda_graphs: bool = True,
    ) -> None:
        """generator: a Hugging Face causal LM; max_tokens: KV budget, in tokens over all requests.

        Raises CheckpointError where the value model was trained for another tokenizer.
        """
        self.generator, self.tokenizer, self.value_model = generator.eval(), tokenizer, value_model
        self.device = next(generator.parameters()).device
        self.eos_token_ids = tuple(eos_token_ids) or (tokenizer.eos_token_id,)
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self._admit_at_once = min(max_requests // 32, 32)
        budget: dict[str, Any] = {"max_tokens": max_tokens, "max_requests": max_requests}
        self.decoder = RaggedDecoder(generator.base_model, max_candidates=1, **budget)
        lm_head = generator.get_output_embeddings()
        self.lm_head = pack_linear(lm_head)
        self.session: GuidanceSession | None = None
        if value_model is not None:
            value_model.check_tokenizer(tokenizer)
            self.session = GuidanceSession.build(
                value_model,
                eos_token_ids=self.eos_token_ids,
                count_candidates=True,
                max_candidates=max_candidates,
                **budget,
            )
        self.vocab_size = int(lm_head.weight.shape[0])
        self.guidance_s = 0.0
        """Time spent in guidance so far."""
        self._waiting: deque[Completion] = deque()
        self._failed: list[Completion] = []
        self._followed = set[str]()
        """Requests that the session knows."""
        self._running: dict[str, Completion] = {}
        self._streams: dict[str, random.Random] = {}
        self._penalties = Penalties()

    @classmethod
    def load(
        cls,
        generator: str = "smollm2",
        value_model: LengthValueModel | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> "TransformersEngine":
        """An engine for a generator by name: `smollm2`, a folder, a hub id or a GGUF file."""
        from transformers import AutoModelForCausalLM

        path = resolve_model(generator)
        with reading("a model", path):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model = model.to(device)
        tokenizer = load_tokenizer(path)
        eos = find_eos_token_ids(path, tokenizer)
        return cls(model, tokenizer, value_model, eos_token_ids=eos, **options)

    @property
    def head(self) -> str | None:
        """Kind of the value model's head; None without a value model."""
        return None if self.value_model is None else self.value_model.config.head

    @torch.inference_mode()
    def read_weights(self) -> None:
        """Read every weight once, so that no request waits for the disk.

        On the CPU weights are mapped from their files: rows of an embedding would be read, and
        counted as this process's memory, when their token first comes.
        """
        guide = None if self.value_model is None else self.value_model.guide
        for model in (self.generator, self.value_model, guide):
            for weight in () if model is None else model.parameters():
                weight.sum()

    # -- requests ---------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and answer together."""
        limits = [self.max_tokens, self.decoder.max_positions]
        if self.session is not None and isinstance(self.session.scorer, CandidateScorer):
            limits.append(self.session.scorer.decoder.max_positions)
        return min(limits)

    def check(self, request: Request) -> None:
        """InputError, ControlError or CapacityError where the request can never run.

        Reads nothing that changes, so any thread may call it.
        """
        name, sampling = f"request {request.id}", request.sampling
        if not request.prompt_token_ids:
            raise InputError(f"{name}: the prompt is empty")
        if request.num_reserved > self.max_length:
            raise CapacityError(
                f"{name}: prompt of {len(request.prompt_token_ids)} tokens and max_tokens "
                f"{sampling.max_tokens} are over the limit of {self.max_length}; shorten the "
                "prompt or lower max_tokens"
            )
        self._check_tokens(f"{name}: the prompt", request.prompt_token_ids)
        self._check_tokens(f"{name}: logit_bias", sampling.logit_bias)
        if not request.is_tracked:
            return
        if self.session is None:
            raise InputError(f"{name} asks for length control, but no value model is loaded")
        try:
            self.session.check(request.id, request.to_guided())
        except RequestError as error:
            raise _to_control_error(request, error) from None

    def _check_tokens(self, what: str, token_ids: Iterable[int]) -> None:
        wrong = [i for i in token_ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise InputError(
                f"{what} names token {wrong[0]}; ids go from 0 to {self.vocab_size - 1}"
            )

    def submit(self, request: Request) -> Completion:
        """Queue a request. Raises what `check` raises, and InputError for an id that is there."""
        self.check(request)
        if request.id in self._running or any(c.request.id == request.id for c in self._waiting):
            raise InputError(f"request {request.id} is already there; ids are unique")
        completion = Completion(request)
        if request.stream or request.sampling.stop:
            completion.stream = TextStream(self.decode, request.sampling.stop)
        self._waiting.append(completion)
        return completion

    def cancel(self, request_id: str) -> None:
        """Forget a request, running or waiting; an unknown id is an InputError."""
        if request_id in self._running:
            self._finish([self._running[request_id]], "cancelled")
            return
        for completion in self._waiting:
            if completion.request.id == request_id:
                self._waiting.remove(completion)
                completion.finish_reason = "cancelled"
                return
        raise InputError(f"no request {request_id}")

    def abort(self, error: LenVMError) -> list[Completion]:
        """End everything with an error, and forget it; for a caller that caught a defect."""
        ended = [*self._running.values(), *self._waiting]
        self._waiting.clear()
        self._running.clear()
        self._streams.clear()
        self._penalties = Penalties()
        for completion in ended:
            completion.finish_reason, completion.error = "error", error
            request_id = completion.request.id
            if request_id in self.decoder:
                self.decoder.remove([request_id])
            if self.session is not None and request_id in self._followed:
                self.session.remove([request_id])
                self._followed.discard(request_id)
        return ended

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Run requests to their end; completions come in the order in which they finish.

        Requests are drawn from the iterable as room appears, so it may be long.
        """
        source = iter(requests)
        exhausted = False
        while True:
            while not exhausted and self.num_unfinished < self.max_requests:
                request = next(source, None)
                if request is None:
                    exhausted = True
                else:
                    self.submit(request)
            if exhausted and not self.num_unfinished:
                return
            yield from (c for c in self.step() if c.finish_reason is not None)

    # -- one step ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One token for every running request; admits waiting ones first.

        Returns the completions that got a token (their last entries are new), and those that could
        not go on (finish_reason "error"), which harm no others.
        """
        self._failed = []
        decoding = [c for c in self._running.values() if c.token_ids]
        admitted = self._admit()
        hidden = []
        if decoding:
            ids = [c.request.id for c in decoding]
            hidden.append(self.decoder.step(ids, [c.token_ids[-1] for c in decoding]))
        if admitted:
            prompts = {c.request.id: c.request.prompt_token_ids for c in admitted}
            hidden.append(self.decoder.add(prompts))
        rows = decoding + admitted
        if rows:
            logits_RV = self.lm_head(torch.cat(hidden)).float()
            tokens = self._sample(rows, logits_RV)
            self._penalties.count([c.request.id for c in rows], tokens)
            self._record(rows, tokens, logits_RV)
        return [c for c in rows if c.error is None] + self._failed

    def _admit(self) -> list[Completion]:
        """Waiting requests that fit, each with room reserved for its longest answer.

        A large batch admits a few at a time, so that not every step pays for a prefill.
        """
        if not self._waiting or 0 < self.max_requests - len(self._running) < self._admit_at_once:
            return []
        reserved = sum(c.request.num_reserved for c in self._running.values())
        admitted: list[Completion] = []
        prompts = set[tuple[int, ...]]()
        while self._waiting and len(self._running) < self.max_requests:
            request = self._waiting[0].request
            prompts.add(request.prompt_token_ids)
            too_many = sum(len(p) for p in prompts) > PREFILL_TOKENS
            if reserved + request.num_reserved > self.max_tokens or (too_many and admitted):
                break
            reserved += request.num_reserved
            admitted.append(self._waiting.popleft())
            self._running[request.id] = admitted[-1]
            self._streams[request.id] = request.sampling.random_stream(request.index)
            self._penalties.add(request.id, request.sampling, request.prompt_token_ids)
        if self.session is None:
            return admitted
        while tracked := {
            c.request.id: c.request.to_guided()
            for c in admitted
            if c.request.is_tracked and c.error is None
        }:
            with self._guidance_time():
                try:
                    self.session.add(tracked)
                    self._followed |= tracked.keys()
                    break
                except RequestError as error:
                    self._fail(error)
        return [c for c in admitted if c.error is None]

    def _sample(self, rows: list[Completion], logits_RV: Tensor) -> Tensor:
        """Next token of every row: [R]. Guided rows are drawn from their candidates."""
        params = [c.request.sampling for c in rows]
        drawn = [self._streams[c.request.id].random() for c in rows]
        uniform = upload(drawn, torch.float32, self.device)
        cold = [p.temperature == 0 for p in params]
        greedy = upload(cold, torch.bool, self.device) if any(cold) else None
        num_generated = [len(c.token_ids) for c in rows]
        logits_RV = adjust(logits_RV, params, num_generated, self.eos_token_ids)
        self._penalties.apply([c.request.id for c in rows], logits_RV)  # a copy where it has any
        free = [i for i, c in enumerate(rows) if c.request.control is None]
        if len(free) == len(rows):
            return draw(truncate(logits_RV, params), uniform, greedy_R=greedy)
        tokens = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        if free:
            index = upload(free, torch.long, self.device)
            truncated = truncate(logits_RV[index], [params[i] for i in free])
            own = None if greedy is None else greedy[index]
            tokens.index_copy_(0, index, draw(truncated, uniform[index], greedy_R=own))
        while guided := [
            i for i, c in enumerate(rows) if c.request.control is not None and c.error is None
        ]:
            assert self.session is not None
            ids = [rows[i].request.id for i in guided]
            index = upload(guided, torch.long, self.device)
            with self._guidance_time():
                try:
                    rows_RV = logits_RV if len(ids) == len(rows) else logits_RV[index]
                    candidates = self.session.step(ids, rows_RV)
                except RequestError as error:
                    self._fail(error)
                    continue
            own = None if greedy is None else greedy[index]
            column = draw(candidates.log_probs, uniform[index], greedy_R=own).unsqueeze(-1)
            tokens.index_copy_(0, index, candidates.ids.gather(-1, column).squeeze(-1))
            break
        return tokens

    def _record(self, rows: list[Completion], tokens: Tensor, logits_RV: Tensor) -> None:
        """Append what was drawn; log-probabilities are those of the generator's own logits."""
        total = logits_RV.logsumexp(-1)
        own = logits_RV.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total
        read = torch.stack([tokens.double(), own.double()]).tolist()  # one wait
        token_ids, log_probs = [int(t) for t in read[0]], read[1]
        for row, completion in enumerate(rows):
            if completion.error is not None:
                continue
            completion.token_ids.append(token_ids[row])
            completion.log_probs.append(log_probs[row])
            if k := completion.request.top_log_probs:
                top = (logits_RV[row] - total[row]).topk(min(k, logits_RV.shape[-1]))
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                completion.top_log_probs.append(list(pairs))
        self._record_predictions(rows)
        self._record_beliefs(rows, tokens)
        for completion in rows:
            if completion.error is None and (reason := self._finish_reason(completion)):
                self._finish([completion], reason)

    def _record_predictions(self, rows: list[Completion]) -> None:
        """Predicted lengths of those that have their first token, read together."""
        while first := [
            c
            for c in rows
            if c.request.is_predicted and c.predicted_length is None and c.error is None
        ]:
            assert self.session is not None
            with self._guidance_time():
                try:
                    lengths = self.session.predictions([c.request.id for c in first])
                except RequestError as error:
                    self._fail(error)
                    continue
            for completion, length in zip(first, lengths, strict=True):
                completion.predicted_length = length

    def _record_beliefs(self, rows: list[Completion], tokens: Tensor) -> None:
        while index := [i for i, c in enumerate(rows) if c.request.is_tracked and c.error is None]:
            assert self.session is not None
            tracked = [rows[i] for i in index]
            ids = [c.request.id for c in tracked]
            with self._guidance_time():
                try:
                    own = upload(index, torch.long, self.device)
                    self.session.commit(ids, tokens if len(ids) == len(rows) else tokens[own])
                except RequestError as error:
                    self._fail(error)
                    continue
                found = zip(
                    tracked, self.session.values(ids), self.session.remaining(ids), strict=True
                )
            for completion, value, remaining in found:
                completion.values.append(value)
                completion.remaining.append(remaining)
            return

    def _finish_reason(self, completion: Completion) -> str | None:
        sampling, token = completion.request.sampling, completion.token_ids[-1]
        if completion.stream is not None:
            completion.stream.push(token)
        if token in sampling.stop_token_ids:
            return "stop"
        if token in self.eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if completion.stream is not None and completion.stream.stopped:
            return "stop"
        return "length" if len(completion.token_ids) >= sampling.max_tokens else None

    def _fail(self, error: RequestError) -> None:
        """End the requests that an error names; the caller goes on with the others."""
        named = [self._running[r] for r in error.request_ids if r in self._running]
        if not named:
            raise error
        for completion in named:
            completion.error = error
        self._finish(named, "error")
        self._failed += named

    def _finish(self, completions: Sequence[Completion], reason: str) -> None:
        for completion in completions:
            request_id = completion.request.id
            completion.finish_reason = reason
            if completion.stream is not None:
                completion.stream.finish()
                completion.text = completion.stream.text
            else:
                completion.text = self.decode(completion.token_ids)
            del self._running[request_id], self._streams[request_id]
            self._penalties.remove(request_id)
            if request_id in self.decoder:
                self.decoder.remove([request_id])
            if self.session is not None and request_id in self._followed:
                self.session.remove([request_id])
                self._followed.discard(request_id)

    @contextmanager
    def _guidance_time(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.guidance_s += time.perf_counter() - start

    def decode(self, token_ids: list[int]) -> str:
        """Text of generated tokens, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def _to_control_error(request: Request, error: RequestError) -> ControlError:
    """Which field of the control a value model cannot serve: the message's first word names it."""
    fault = str(error.cause)
    field = fault.split()[0]
    if request.control is None or field not in type(request.control).model_fields:
        given = request.control.model_dump(exclude_defaults=True) if request.control else None
        return ControlError("(whole)", given, fault)
    return ControlError(field, getattr(request.control, field), fault)
