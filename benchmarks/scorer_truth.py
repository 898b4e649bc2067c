"""Truth before timing: the scorer on this device against plain forwards of the same model.

`check_families`: tiny random models of every family through random histories (the state machine of
tests/model). `check_model`: a big model with prefixes up to 8k tokens, errors in the logit z.
"""

import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from model.families import FAMILIES, VOCAB, build
from model.ragged_machine import History, run_random_history

CASES = [(family, torch.float32, True) for family in FAMILIES] + [
    ("qwen2", torch.bfloat16, True),
    ("qwen2", torch.bfloat16, False),
    ("qwen3", torch.float16, True),
    ("gemma3", torch.bfloat16, True),
    ("mistral", torch.bfloat16, True),
]
"""Family, dtype, CUDA graphs."""


class DeviceHistory(History):
    """Candidates are handed over on the device, as an engine does."""

    def to_input(self, rows: list[list[int]]) -> Any:
        return torch.tensor(rows, device=self.decoder.device)


def check_families(device: str, num_calls: int = 60) -> list[dict[str, Any]]:
    """One record per case: ok, or what went wrong."""
    records = []
    for family, dtype, graphs in CASES:
        record: dict[str, Any] = {"family": family, "dtype": str(dtype), "graphs": graphs}
        start = time.perf_counter()
        try:
            history = DeviceHistory(
                build(family, dtype=dtype, hidden_size=128).to(device),
                max_tokens=1500,
                max_requests=8,
                max_candidates=9,
                cuda_graphs=graphs,
            )
            record["fused"] = getattr(history.decoder._runner, "is_fused", False)
            run_random_history(history, 1, num_calls, VOCAB)
            record |= {"ok": True, "compared": history.num_compared, "worst": history.worst}
        except Exception as error:  # a case that fails must not hide the others
            where = traceback.format_exc().splitlines()[-6:]
            record |= {"ok": False, "error": repr(error), "where": where}
        record["seconds"] = round(time.perf_counter() - start, 1)
        records.append(record)
    return records


@torch.inference_mode()
def check_model(scorer: Any, prefixes: list[int], num_candidates: int) -> dict[str, Any]:
    """max |z - z'| of every candidate against a plain forward over its whole sequence.

    Also the spread of z, which says what the error is to be compared with, and the error of the
    plain forward itself when its sequences are batched otherwise.
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
    first = decoder.add(prompts)[:, 0].float()
    errors, spread = [], []
    for step in range(2):  # the second step stands on committed candidates
        got = decoder.peek(ids, candidates)[..., 0].float()
        for row, request_id in enumerate(ids):
            expected = plain_z(model, prompts[request_id], candidates[row])
            errors.append((got[row] - expected).abs().max())
            spread.append(expected)
        decoder.commit(ids, candidates[:, step], peeked=True)
        for row, request_id in enumerate(ids):
            prompts[request_id].append(int(candidates[row, step]))
    decoder.remove(ids)
    return {
        "prefixes": prefixes,
        "max_error_z": float(torch.stack(errors).max()),
        "std_z": float(torch.cat(spread).std()),
        "first_z": [round(z, 3) for z in first.tolist()],
    }


def plain_z(model: Any, prompt: list[int], candidates_K: Tensor) -> Tensor:
    """z after each candidate, every candidate in a forward of its own: [K]."""
    prefix = torch.tensor(prompt, device=candidates_K.device)
    out = []
    for token in candidates_K:
        sequence = torch.cat([prefix, token.view(1)]).unsqueeze(0)
        hidden = model.backbone(input_ids=sequence, use_cache=False).last_hidden_state[0, -1]
        out.append(model.head(hidden)[0].float())
    return torch.stack(out)
