"""Trajectories from the in-process engine: n completions per prompt, appended as they finish.

The counterpart of `lenvm.data.sampler`, which samples from servers; both write the same records and
both continue where a killed run stopped.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Completion, Request, TransformersEngine
from lenvm.errors import InputError
from lenvm.files import JsonlWriter, claim, read_jsonl
from lenvm.guidance.request import LengthControl
from lenvm.model.tokenization import encode_prompt


def rollout(
    engine: TransformersEngine,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    n: int,
    sampling: SamplingParams,
    model: str,
    controls: Sequence[LengthControl | None] = (None,),
    submit_for_s: float = math.inf,
    on_completion: Callable[[Completion], None] = lambda _: None,
) -> int:
    """Append the missing ones of n completions per prompt and control; returns how many were there.

    After `submit_for_s` seconds no new completion is begun, and those begun are finished, so that
    long answers are not left out; a later call goes on. `controls` are cycled over a prompt's
    completions (on-policy refinement samples under mixed targets). Raises InputError where
    `path` holds a run with other settings.
    """
    if pictured := next((p for p in prompts if p.images), None):
        raise InputError(
            f"prompt {pictured.prompt_hash} has images, and the engine in this process reads text "
            "alone; serve the model with vLLM or SGLang and name it: --endpoint"
        )
    config = {
        "model": model,
        "n": n,
        "sampling": sampling.to_json(),
        "prompts": [p.prompt_hash for p in prompts],
        "controls": [c and c.model_dump(exclude_defaults=True) for c in controls],
    }
    claim(path, "trajectories", config)
    started = path.exists() and path.stat().st_size > 0
    done = {t.id for t in read_trajectories(path)} if started else set()
    wanted: dict[str, tuple[Prompt, Request]] = {}
    for prompt in prompts:
        ids = tuple(encode_prompt(engine.tokenizer, prompt.conversation))
        for index in range(n):
            name = f"{prompt.prompt_hash}-{index}"
            control = controls[index % len(controls)]
            stream = index if sampling.seed is None else _stream_index(prompt, index)
            request = Request(name, ids, sampling, control, index=stream)
            if name not in done:
                wanted[name] = (prompt, request)
    with JsonlWriter(path) as writer:
        deadline = time.monotonic() + submit_for_s
        requests = (r for _, r in wanted.values())
        for completion in engine.generate(
            itertools.takewhile(lambda _: time.monotonic() < deadline, requests)
        ):
            prompt, request = wanted[completion.request.id]
            writer.write(_to_trajectory(prompt, completion, model).to_json())
            on_completion(completion)
    return len(done)


def count_rows(path: Path) -> int:
    """Completions that a trajectory file holds; 0 where there is none."""
    return sum(1 for _ in read_jsonl(path)) if path.exists() else 0


def _stream_index(prompt: Prompt, index: int) -> int:
    """Another random stream for every prompt and completion of one seed."""
    return int(prompt.prompt_hash[:12], 16) * 1000 + index


def _to_trajectory(prompt: Prompt, completion: Completion, model: str) -> Trajectory:
    request = completion.request
    fields: dict[str, Any] = {
        "id": request.id,
        "prompt_hash": prompt.prompt_hash,
        "sample_index": int(request.id.rsplit("-", 1)[1]),
        "domain": prompt.domain,
        "split": prompt.split,
        "messages": prompt.messages,
        "prompt_text": prompt.prompt_text,
        "prompt_token_ids": list(request.prompt_token_ids),
        "completion_token_ids": completion.token_ids,
        "completion_text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
        },
        "sampling": request.sampling.model_dump(exclude_defaults=True),
        "length_control": request.control and request.control.model_dump(exclude_defaults=True),
        "model": model,
        "metadata": prompt.metadata,
    }
    return Trajectory.model_validate(fields)


def in_order(completions: Iterator[Completion], requests: Sequence[Request]) -> list[Completion]:
    """Completions in the order of their requests."""
    done = {c.request.id: c for c in completions}
    return [done[r.id] for r in requests]
