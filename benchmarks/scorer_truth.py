"""Truth before timing: the scorer on this device against plain forwards of the same model.

`check_families`: tiny random models of every family through random histories (the state machine of
tests/model). `check_model`: a big model with prefixes up to 8k tokens, errors in the logit z.
"""

import dataclasses
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from model.families import FAMILIES, FUSED, VOCAB, build
from model.ragged_machine import History, run_random_history

CASES = [(family, torch.float32, True) for family in FAMILIES] + [
    ("qwen2", torch.bfloat16, True),
    ("qwen2", torch.bfloat16, False),
    ("qwen3", torch.float16, True),
    ("gemma3", torch.bfloat16, True),
    ("mistral", torch.bfloat16, True),
]
"""Family, dtype, CUDA graphs."""
FUSED_CASES = [(family, pdl) for family in ("qwen2", "llama", "mistral") for pdl in (False, True)]
"""Family in bf16 with every product fused, programmatic dependent launch."""


class DeviceHistory(History):
    """Candidates are handed over on the device, as an engine does."""

    def to_input(self, rows: list[list[int]]) -> Any:
        return torch.tensor(rows, device=self.decoder.device)


def check_families(device: str, num_calls: int = 60) -> list[dict[str, Any]]:
    """One record per case: ok, or what went wrong."""
    records = [
        _check({"family": f, "dtype": str(dtype), "graphs": graphs}, device, dtype, num_calls)
        for f, dtype, graphs in CASES
    ]
    if device == "cuda" and torch.cuda.get_device_capability() >= (9, 0):
        records += check_fused(device, num_calls)
    return records


def check_fused(
    device: str, num_calls: int = 60, cases: Sequence[tuple[str, bool]] = FUSED_CASES
) -> list[dict[str, Any]]:
    """The same with all products fused, whatever was measured to be faster."""
    dtype = torch.bfloat16
    return [
        _check(
            {"family": family, "dtype": str(dtype), "graphs": True, "products": True, "pdl": pdl},
            device,
            dtype,
            num_calls,
            dataclasses.replace(FUSED, pdl=pdl),
        )
        for family, pdl in cases
    ]


def _check(
    record: dict[str, Any],
    device: str,
    dtype: torch.dtype,
    num_calls: int,
    choices: Any = None,
) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        history = DeviceHistory(
            build(record["family"], dtype=dtype, hidden_size=128).to(device),
            max_tokens=1500,
            max_requests=8,
            max_candidates=9,
            cuda_graphs=record["graphs"],
        )
        runner: Any = history.decoder._runner
        record["fused"] = getattr(runner, "is_fused", False)
        if choices is not None:
            assert runner._forward.can_run(choices, 64)
            runner.choose = lambda num_tokens: choices
        run_random_history(history, 1, num_calls, VOCAB)
        record |= {"ok": True, "compared": history.num_compared, "worst": history.worst}
    except Exception as error:  # a case that fails must not hide the others
        where = traceback.format_exc().splitlines()[-6:]
        record |= {"ok": False, "error": repr(error), "where": where}
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


@torch.inference_mode()
def check_model(
    scorer: Any, prefixes: list[int], num_candidates: int, num_compared: int
) -> dict[str, Any]:
    """max |z - z'| of candidates against a plain forward over the whole sequence of each.

    Two steps, the second on committed candidates; of each, `num_compared` candidates spread over
    the rows, the longest prefixes included. Also the spread of z, which says what the error is to
    be compared with, and how far two plain forwards (batched or not) are apart.
    """
    model, decoder = scorer.model, scorer.decoder
    generator = torch.Generator().manual_seed(0)
    ids = [f"check{i}" for i in range(len(prefixes))]
    prompts = {
        r: torch.randint(decoder.vocab_size, (n,), generator=generator).tolist()
        for r, n in zip(ids, prefixes, strict=True)
    }
    candidates = torch.randint(
        decoder.vocab_size, (len(ids), num_candidates), generator=generator
    ).to(decoder.device)
    decoder.add(prompts)
    errors, spread, apart = [], [], []
    for step in range(2):
        got = decoder.peek(ids, candidates, num_candidates=candidates.numel())[..., 0].float()
        picked = torch.randperm(candidates.numel(), generator=generator)[:num_compared].tolist()
        longest = prefixes.index(max(prefixes)) * num_candidates
        for index in {*picked, longest}:
            row, column = divmod(index, num_candidates)
            prompt, token = prompts[ids[row]], candidates[row, column : column + 1]
            expected = plain_z(model, prompt, token)
            errors.append((got[row, column] - expected).abs().max())
            spread.append(expected)
            if len(prompt) < 1000 and len(apart) < 8:
                apart.append((plain_z(model, prompt, token, copies=4) - expected).abs().max())
        decoder.commit(ids, candidates[:, step].clone(), peeked=True)
        for row, request_id in enumerate(ids):
            prompts[request_id].append(int(candidates[row, step]))
    runner = decoder._runner
    fused = runner.choose(runner._last[1].num_tokens) if hasattr(runner, "choose") else None
    decoder.remove(ids)
    return {
        "requests": len(prefixes),
        "longest_prefix": max(prefixes),
        "compared": len(errors),
        "fused": list(fused.tiles) if fused is not None else [],
        "max_error_z": float(torch.stack(errors).max()),
        "max_apart_z_of_plain_forwards": float(torch.stack(apart).max()) if apart else None,
        "std_z": float(torch.cat(spread).std()),
    }


def plain_z(model: Any, prompt: list[int], token: Tensor, copies: int = 1) -> Tensor:
    """z after prompt + token [1], as one of so many equal rows of a batch: [1]."""
    sequence = torch.cat([torch.tensor(prompt, device=token.device), token]).unsqueeze(0)
    inputs = sequence.expand(copies, -1)
    hidden = model.backbone(input_ids=inputs, use_cache=False).last_hidden_state[-1, -1]
    z: Tensor = model.head(hidden).float()
    return z[:1]
