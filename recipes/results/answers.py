"""Steps that ask the generator: LIFEBench, the trade-off, and how fast it answers."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from recipes.results.lab import MEAN_PROMPT, Found, Lab, Options, end_of
from recipes.results.prompts import load_prompts

from lenvm.cli._engine_generator import EngineGenerator
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Request
from lenvm.evals.arms import parse_arms
from lenvm.evals.generator import GenerationRequest, OnResponse, Sampling
from lenvm.guidance.request import LengthControl
from lenvm.model.tokenization import encode_prompt


class TimedGenerator:
    """An engine that begins no answer after `end` and finishes those begun; `num_left` are for the
    next call. Answers are begun sample by sample and item by item, so that what fits the time is
    the same for every arm. Forced answers, which are short, are always given."""

    def __init__(self, inner: EngineGenerator, end: float) -> None:
        self.inner, self.end, self.model = inner, end, inner.model
        self.tokens, self.seconds, self.num_begun, self.num_left = 0, 0.0, 0, 0

    @property
    def max_length(self) -> int:
        return self.inner.max_length

    def lacks(self, feature: Any) -> str | None:
        return self.inner.lacks(feature)

    def count_tokens(self, text: str) -> int:
        return self.inner.count_tokens(text)

    def generate(self, requests: Iterable[GenerationRequest], on_response: OnResponse) -> None:
        ordered = sorted(requests, key=_sample_and_item)
        start, begun = time.monotonic(), self.num_begun

        def until_the_end() -> Iterator[GenerationRequest]:
            for request in ordered:
                if time.monotonic() > self.end and not request.answer_prefix:
                    return
                self.num_begun += 1
                yield request

        def count(response: Any) -> None:
            self.tokens += response.num_tokens
            on_response(response)

        self.inner.generate(until_the_end(), count)
        self.seconds += time.monotonic() - start
        self.num_left += len(ordered) - (self.num_begun - begun)


def _sample_and_item(request: GenerationRequest) -> tuple[int, str, str]:
    """Ids are arm/item/.../sample: by sample, then all arms and targets of an item together, and
    equal prompts side by side, since the engine runs those once."""
    parts = request.id.removesuffix("/forced").split("/")
    return int(parts[-1]), parts[1], str(request.messages)


def _answer(lab: Lab, o: Options, run: Callable[[TimedGenerator], Any]) -> Found:
    """Run an evaluation's requests in the time there is."""
    engine = lab.engine(
        o["generator"],
        o.get("value_model"),
        batch=o["batch"],
        tokens=o["max_tokens"] + MEAN_PROMPT,
        candidates=o["sampling"].get("top_k") or 16,
    )
    before = engine.guidance_s
    generator = TimedGenerator(
        EngineGenerator(engine, o["generator"]), end_of(lab, o.get("seconds"))
    )
    run(generator)
    return {
        "generator": o["generator"],
        "value_model": o.get("value_model"),
        "num_answers": generator.num_begun,
        "num_left": generator.num_left,
        "tokens": generator.tokens,
        "seconds": generator.seconds,
        "tokens_per_s": generator.tokens / max(generator.seconds, 1e-9),
        "guidance_s": engine.guidance_s - before,
    }, generator.num_left == 0


def lifebench(lab: Lab, name: str, o: Options) -> Found:
    """LIFEBench: {generator, value_model, arms, constraints, targets, samples, limit, max_tokens,
    sampling, batch, seconds}. `sampling`: fields of `Sampling`, over those of the defaults."""
    from lenvm.evals.lifebench.arms import KINDS
    from lenvm.evals.lifebench.run import LifebenchConfig, run_lifebench

    config = LifebenchConfig(
        file=lab.data / "lifebench" / "data_en.jsonl",
        arms=tuple(parse_arms(o["arms"], KINDS)),
        constraints=tuple(o["constraints"]),
        targets=tuple(o["targets"]),
        num_samples=o.get("samples", 1),
        limit=o.get("limit"),
        max_tokens=o["max_tokens"],
        sampling=Sampling(seed=o.get("seed", 2), **o["sampling"]),
    )
    folder = lab.folder / "answers" / name
    return _answer(lab, o, lambda g: run_lifebench(config, g, folder, allow_missing=True))


def tradeoff(lab: Lab, name: str, o: Options) -> Found:
    """Questions by arms: {generator, value_model, source, arms, samples, limit, max_tokens,
    sampling, batch, seconds, arms_from?}. Graded by `collect`, which adds the arms of the steps in
    `arms_from`: those without a value model, and all where it is the same."""
    from lenvm.evals.tradeoff.arms import KINDS
    from lenvm.evals.tradeoff.run import TradeoffConfig, answer_questions

    config = TradeoffConfig(
        source=str(lab.data / o["source"]),
        arms=tuple(parse_arms(o["arms"], KINDS)),
        num_samples=o["samples"],
        limit=o.get("limit"),
        max_tokens=o["max_tokens"],
        sampling=Sampling(seed=o.get("seed", 3), **o["sampling"]),
    )
    folder = lab.folder / "answers" / name
    return _answer(lab, o, lambda g: answer_questions(config, g, folder, allow_missing=True))


def speed(lab: Lab, name: str, o: Options) -> Found:
    """Tokens per second without and with control, each alone: {generator, value_models, batches,
    length}. Every request ends at `length` tokens; prefill is counted."""
    found: dict[str, Any] = {}
    for value_model in [None, *o["value_models"]]:
        for batch in o["batches"]:
            if lab.remaining_s <= 0:
                return found, False
            _pace(lab, o, value_model, batch)  # compiles and captures
            key = f"{value_model or 'unguided'}, {batch} requests"
            found[key] = _pace(lab, o, value_model, batch)
            print(f"  {key}: {found[key]}", flush=True)
    lab.release()
    return found, True


def _pace(lab: Lab, o: Options, value_model: str | None, batch: int) -> dict[str, float]:
    """One batch from its first prefill to its last token."""
    engine = lab.engine(
        o["generator"], value_model, batch=batch, tokens=o["length"] + MEAN_PROMPT, candidates=16
    )
    control = None
    if value_model is not None:
        control = LengthControl.parse({"equal_to": o["length"], "top_k": 15})
    sampling = SamplingParams(
        max_tokens=o["length"], ignore_eos=control is None, top_k=15, top_p=0.999, seed=1
    )
    prompts = [
        tuple(encode_prompt(engine.tokenizer, p.conversation))
        for p in load_prompts(lab.data, "held_out", batch)[:batch]
    ]
    requests = [
        Request(str(i), prompts[i % len(prompts)], sampling, control, index=i) for i in range(batch)
    ]
    guidance_s, start = engine.guidance_s, time.monotonic()
    tokens = sum(len(c.token_ids) for c in engine.generate(requests))
    seconds = time.monotonic() - start
    share = (engine.guidance_s - guidance_s) / seconds
    return {"tokens_per_s": tokens / seconds, "guidance_share": share, "tokens": tokens}
