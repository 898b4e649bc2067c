"""The in-process engine: continuous batching of any Hugging Face decoder, with length control.

Requests join and leave between steps. Generator and value model each run in a `RaggedDecoder`: one
forward a step over all running requests, whatever their lengths. A request without control is
sampled from the generator alone; with one, `GuidanceSession` turns its logits into the guided
distribution over a few candidates. A row's tokens never depend on its batch-mates beyond rounding.

Shape legend: R running rows, V vocabulary, K candidates, H hidden size.
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lenvm.engines.sampling import SamplingParams, draw, truncate
from lenvm.errors import CapacityError, InputError
from lenvm.guidance.request import LengthControl
from lenvm.guidance.scorer import CandidateScorer
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.bundled import resolve_model
from lenvm.model.ragged import RaggedDecoder
from lenvm.model.tokenization import find_eos_token_ids, load_tokenizer
from lenvm.model.value_model import LengthValueModel


@dataclass(frozen=True)
class Request:
    """One completion to generate. `index` tells the n completions of one seeded prompt apart."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    control: LengthControl | None = None
    track: bool = False
    """Report the predicted remaining length at every token (costs the value model's forward)."""
    index: int = 0


@dataclass
class Completion:
    """A request's answer so far; `finish_reason` is None while it runs.

    "stop": ended by itself, by EOS, a stop token or a stop text; "length": cut at max_tokens;
    "cancelled".
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """Log-probability of each token under the generator itself, at temperature 1, unguided."""
    remaining: list[float] = field(default_factory=list)
    """Predicted tokens still to come after each token, where guided or tracked."""
    predicted_length: float | None = None
    """Predicted length at the prompt boundary, where guided or tracked."""
    text: str = ""
    finish_reason: str | None = None

    @property
    def ended_by_itself(self) -> bool:
        return self.finish_reason == "stop"


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
        self.lm_head = generator.get_output_embeddings()
        self.session: GuidanceSession | None = None
        if value_model is not None:
            value_model.check_tokenizer(tokenizer)
            scorer = CandidateScorer(value_model, max_candidates=max_candidates, **budget)
            self.session = GuidanceSession(
                scorer, eos_token_ids=self.eos_token_ids, count_candidates=True
            )
        self._waiting: deque[Completion] = deque()
        self._running: dict[str, Completion] = {}
        self._streams: dict[str, random.Random] = {}

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
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        tokenizer = load_tokenizer(path)
        eos = find_eos_token_ids(path, tokenizer)
        return cls(model, tokenizer, value_model, eos_token_ids=eos, **options)

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> Completion:
        """Queue a request. Raises InputError or CapacityError where it can never run."""
        need = len(request.prompt_token_ids) + request.sampling.max_tokens
        limit = min(self.max_tokens, self.decoder.max_positions)
        if not request.prompt_token_ids:
            raise InputError(f"request {request.id}: the prompt is empty")
        if need > limit:
            raise CapacityError(
                f"request {request.id}: prompt of {len(request.prompt_token_ids)} tokens and "
                f"max_tokens {request.sampling.max_tokens} are over the limit of {limit}; "
                "shorten the prompt or lower max_tokens"
            )
        if (request.control or request.track) and self.session is None:
            raise InputError(
                f"request {request.id} asks for length control, but no value model is loaded"
            )
        if request.id in self._running or any(c.request.id == request.id for c in self._waiting):
            raise InputError(f"request {request.id} is already there; ids are unique")
        completion = Completion(request)
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

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Run requests to their end; completions come in the order in which they finish.

        Requests are drawn from the iterable as room appears, so it may be long.
        """
        source = iter(requests)
        exhausted = False
        while True:
            while not exhausted and len(self._waiting) < self.max_requests:
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

        Returns the completions that got a token (their last entries are new).
        """
        admitted = self._admit()
        decoding = [c for c in self._running.values() if c.token_ids]
        hidden = []
        if decoding:
            ids = [c.request.id for c in decoding]
            hidden.append(self.decoder.step(ids, [c.token_ids[-1] for c in decoding]))
        if admitted:
            prompts = {c.request.id: c.request.prompt_token_ids for c in admitted}
            hidden.append(self.decoder.add(prompts))
        rows = decoding + admitted
        if not rows:
            return []
        logits_RV = self.lm_head(torch.cat(hidden)).float()
        tokens = self._sample(rows, logits_RV)
        self._record(rows, tokens, logits_RV)
        return rows

    def _admit(self) -> list[Completion]:
        """Waiting requests that fit, each with room reserved for its longest answer.

        A large batch admits a few at a time, so that not every step pays for a prefill.
        """
        if not self._waiting or 0 < self.max_requests - len(self._running) < self._admit_at_once:
            return []
        reserved = sum(_reserve(c) for c in self._running.values())
        admitted: list[Completion] = []
        while self._waiting and len(self._running) < self.max_requests:
            need = _reserve(self._waiting[0])
            if reserved + need > self.max_tokens:
                break
            reserved += need
            completion = self._waiting.popleft()
            admitted.append(completion)
            request = completion.request
            self._running[request.id] = completion
            self._streams[request.id] = request.sampling.random_stream(request.index)
        if self.session is not None and (guided := [c for c in admitted if _is_tracked(c)]):
            self.session.add({c.request.id: _to_guided(c.request) for c in guided})
        return admitted

    def _sample(self, rows: list[Completion], logits_RV: Tensor) -> Tensor:
        """Next token of every row: [R]. Guided rows are drawn from their candidates."""
        params = [c.request.sampling for c in rows]
        uniform = torch.tensor([self._streams[c.request.id].random() for c in rows])
        greedy = torch.tensor([p.temperature == 0 for p in params])
        uniform, greedy = uniform.to(self.device), greedy.to(self.device)
        guided = [i for i, c in enumerate(rows) if c.request.control is not None]
        free = [i for i, c in enumerate(rows) if c.request.control is None]
        tokens = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        if free:
            truncated = truncate(logits_RV[free], [params[i] for i in free])
            tokens[free] = draw(truncated, uniform[free], greedy_R=greedy[free])
        if guided and self.session is not None:
            ids = [rows[i].request.id for i in guided]
            candidates = self.session.step(ids, logits_RV[guided])
            index = draw(candidates.log_probs, uniform[guided], greedy_R=greedy[guided])
            tokens[guided] = candidates.ids.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return tokens

    def _record(self, rows: list[Completion], tokens: Tensor, logits_RV: Tensor) -> None:
        log_probs = logits_RV.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits_RV.logsumexp(-1)
        token_ids, log_prob_list = tokens.tolist(), log_probs.tolist()
        for completion, token, log_prob in zip(rows, token_ids, log_prob_list, strict=True):
            completion.token_ids.append(token)
            completion.log_probs.append(log_prob)
        self._record_beliefs(rows, tokens)
        for completion in rows:
            if reason := self._finish_reason(completion):
                self._finish([completion], reason)

    def _record_beliefs(self, rows: list[Completion], tokens: Tensor) -> None:
        index = [i for i, c in enumerate(rows) if _is_tracked(c)]
        if not index or self.session is None:
            return
        guided = [rows[i] for i in index]
        ids = [c.request.id for c in guided]
        self.session.commit(ids, tokens if len(index) == len(rows) else tokens[index])
        for completion, remaining in zip(guided, self.session.remaining(ids), strict=True):
            completion.remaining.append(remaining)
            if completion.predicted_length is None:
                completion.predicted_length = self.session.prediction(completion.request.id)

    def _finish_reason(self, completion: Completion) -> str | None:
        sampling, token = completion.request.sampling, completion.token_ids[-1]
        if token in sampling.stop_token_ids:
            return "stop"
        if token in self.eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if sampling.stop:
            text = self.decode(completion.token_ids)
            ends = [text.find(stop) for stop in sampling.stop if stop in text]
            if ends:
                completion.text = text[: min(ends)]
                return "stop"
        return "length" if len(completion.token_ids) >= sampling.max_tokens else None

    def _finish(self, completions: list[Completion], reason: str) -> None:
        for completion in completions:
            request_id = completion.request.id
            completion.finish_reason = reason
            completion.text = completion.text or self.decode(completion.token_ids)
            del self._running[request_id], self._streams[request_id]
            self.decoder.remove([request_id])
            if _is_tracked(completion) and self.session is not None:
                self.session.remove([request_id])

    def decode(self, token_ids: list[int]) -> str:
        """Text of generated tokens, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def _to_guided(request: Request) -> Guided:
    sampling = request.sampling
    return Guided(
        prompt_token_ids=request.prompt_token_ids,
        control=request.control,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        stop_token_ids=sampling.stop_token_ids,
    )


def _is_tracked(completion: Completion) -> bool:
    return completion.request.control is not None or completion.request.track


def _reserve(completion: Completion) -> int:
    return len(completion.request.prompt_token_ids) + completion.request.sampling.max_tokens
