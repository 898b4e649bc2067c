"""Truth before timing: the scorer on this device against plain forwards of the same model.

`check_families`: tiny random models of every family through random histories (the state machine of
tests/model). `check_model`: real weights with prefixes up to 8k tokens, errors in the logit z,
against the plain forward in the same type and in fp32.
"""

import copy
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
            runner.choose = lambda *_: choices
        run_random_history(history, 1, num_calls, VOCAB)
        record |= {"ok": True, "compared": history.num_compared, "worst": history.worst}
    except Exception as error:  # a case that fails must not hide the others
        where = traceback.format_exc().splitlines()[-6:]
        record |= {"ok": False, "error": repr(error), "where": where}
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


@torch.inference_mode()
def check_model(
    scorer: Any,
    prefixes: list[int],
    num_candidates: int,
    num_compared: int,
    *,
    read_text: bool = False,
) -> dict[str, Any]:
    """Errors |z - z'| of candidates' logits z of u, over whole sequences, three ways: the scorer
    against a plain forward in its own type, and both against that forward in fp32 (weights of the
    same type, converted). The last two are what rounding costs each.

    Two steps, the second on committed candidates; of each, `num_compared` candidates spread over
    the rows, the longest prefixes included. Prefixes and candidates are random tokens, or with
    `read_text` from the demo's prompts: what a trained model has seen. Also the spread of z,
    which says what the errors are to be compared with, and how far two plain forwards (batched or
    not) are apart.
    """
    model, decoder = scorer.model, scorer.decoder
    exact = torch.nn.Module.float(copy.deepcopy(model.backbone))  # transformers refuses GGUF ones
    generator = torch.Generator().manual_seed(0)
    ids = [f"check{i}" for i in range(len(prefixes))]
    prompts = {
        r: torch.randint(decoder.vocab_size, (n,), generator=generator).tolist()
        for r, n in zip(ids, prefixes, strict=True)
    }
    if read_text:
        text = read_demo(model.tokenizer, max(prefixes))
        starts = torch.randint(len(text), (len(ids),), generator=generator).tolist()
        for r, start, n in zip(ids, starts, prefixes, strict=True):
            prompts[r] = (text[start:] + text)[:n]
        words = torch.tensor(sorted(set(text)))
        rows = [words[torch.randperm(len(words), generator=generator)] for _ in ids]
        candidates = torch.stack(rows)[:, :num_candidates].to(decoder.device)
    candidates = torch.randint(
        decoder.vocab_size, (len(ids), num_candidates), generator=generator
    ).to(decoder.device)
    decoder.add(prompts)
    found: list[list[float]] = []
    apart = []
    for step in range(2):
        raw = decoder.peek(ids, candidates, num_candidates=candidates.numel())
        got = to_z(model, raw)
        picked = torch.randperm(candidates.numel(), generator=generator)[:num_compared].tolist()
        longest = prefixes.index(max(prefixes)) * num_candidates
        for index in {*picked, longest}:
            row, column = divmod(index, num_candidates)
            prompt, token = prompts[ids[row]], candidates[row, column : column + 1]
            plain = plain_z(model, model.backbone, prompt, token)
            found.append([float(got[row, column]), plain, plain_z(model, exact, prompt, token)])
            if len(prompt) < 1000 and len(apart) < 8:
                apart.append(abs(plain_z(model, model.backbone, prompt, token, copies=4) - plain))
        decoder.commit(ids, candidates[:, step].clone(), peeked=True)
        for row, request_id in enumerate(ids):
            prompts[request_id].append(int(candidates[row, step]))
    runner = decoder._runner
    fused = runner.choose(runner._last.num_tokens, False) if hasattr(runner, "choose") else None
    decoder.remove(ids)
    ours, plain_z_N, exact_z = torch.tensor(found, dtype=torch.float64).T
    return {
        "requests": len(prefixes),
        "longest_prefix": max(prefixes),
        "compared": len(found),
        "fused": list(fused.tiles) if fused is not None else [],
        "max_error_z": float((ours - plain_z_N).abs().max()),
        "max_error_z_of_scorer_to_fp32": float((ours - exact_z).abs().max()),
        "max_error_z_of_plain_to_fp32": float((plain_z_N - exact_z).abs().max()),
        "rms_error_z": float((ours - plain_z_N).square().mean().sqrt()),
        "rms_error_z_of_scorer_to_fp32": float((ours - exact_z).square().mean().sqrt()),
        "rms_error_z_of_plain_to_fp32": float((plain_z_N - exact_z).square().mean().sqrt()),
        "max_apart_z_of_plain_forwards": max(apart, default=None),
        "std_z": float(exact_z.std()),
    }


def read_demo(tokenizer: Any, num_tokens: int) -> list[int]:
    """Token ids of the demo's prompts, as often as makes so many."""
    from lenvm.data.prompts import load_bundled_prompts

    text = "\n".join(prompt.text for prompt in load_bundled_prompts())
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids * (1 + num_tokens // len(ids))


def plain_z(model: Any, backbone: Any, prompt: list[int], token: Tensor, copies: int = 1) -> float:
    """z after prompt + token [1] by a backbone's own forward, as one of `copies` equal rows."""
    sequence = torch.cat([torch.tensor(prompt, device=token.device), token]).unsqueeze(0)
    inputs = sequence.expand(copies, -1)
    hidden = backbone(input_ids=inputs, use_cache=False).last_hidden_state[-1, -1]
    return float(to_z(model, model.head(hidden)))


def to_z(model: Any, raw: Tensor) -> Tensor:
    """Raw outputs [..., D] -> z [...], the logit of u = -V at the model's gamma, in fp64."""
    if model.config.head == "scalar":
        return raw[..., 0].double()
    return torch.logit(-model.belief(raw).value().double())
