"""Softmax or hazards for the distribution head: the same bins, the same frozen hidden states.

    python benchmarks/heads.py --backbone MODEL --data train.jsonl --out results/heads_h200.json

Both say any distribution over the bins; they differ in how it is learned, and in what a candidate's
interval costs. hazards: log P(bin k) = log h_k + sum_{j<k} log(1 - h_j), h = sigmoid(logits). Each
is trained from the same marginal with the same seeds on the states of the data's training split,
and measured on its validation split: mean negative log-likelihood (the loss, a proper score), the
relative error of the median, and the time of log P(interval) for a step's candidates.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from lenvm.data.dataset import Sequences, TokenStore  # noqa: E402
from lenvm.model.head import DistributionBelief, DistributionHead, LengthBins  # noqa: E402
from lenvm.model.value_model import LengthValueModel, LenVMConfig  # noqa: E402
from scorer import describe, synchronize  # noqa: E402

CANDIDATES = (64, 8)


def hazards_to_logits(raw: Tensor) -> Tensor:
    """[..., K] hazard logits -> [..., K] log P(bin); the last bin takes what is left."""
    stay = F.logsigmoid(-raw).cumsum(-1)
    before = F.pad(stay[..., :-1], (1, 0))
    ends = torch.cat([F.logsigmoid(raw[..., :-1]), torch.zeros_like(raw[..., :1])], -1)
    return before + ends


FORMS = {"softmax": lambda raw: raw, "hazards": hazards_to_logits}


@torch.no_grad()
def read_states(model: LengthValueModel, data: Sequences, limit: int) -> tuple[Tensor, Tensor]:
    """(hidden states [M, H] bf16, tokens left [M]) of complete answers, about `limit` of them."""
    device = next(model.parameters()).device
    hidden, left, count = [], [], 0
    for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist():
        ids = torch.from_numpy(data.tokens(i).astype("int64")).to(device)
        prompt, length = int(data.prompt_lengths[i]), int(data.lengths[i])
        states = model.backbone(input_ids=ids[None]).last_hidden_state[0]
        hidden.append(states[prompt - 1 : prompt - 1 + length].to(torch.bfloat16))
        left.append(torch.arange(length, 0, -1, device=device))
        count += length
        if count >= limit:
            break
    return torch.cat(hidden), torch.cat(left)


def prepare(form: str, head: DistributionHead, index: Tensor) -> None:
    """Start from the marginal of the training states, in either form."""
    counts = torch.bincount(index.cpu(), minlength=len(head.bins)).double() + 0.05
    bias = counts.log()
    if form == "hazards":
        tail = counts.flip(0).cumsum(0).flip(0)
        bias = torch.logit((counts / tail).clamp(max=1 - 1e-6))
    with torch.no_grad():
        head.summary.bias.copy_(bias)


def train_head(
    form: str, seed: int, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], steps: int
) -> dict[str, float]:
    torch.manual_seed(seed)
    hidden, left = train
    head = DistributionHead(hidden.shape[-1]).to(hidden.device)
    bins = head.bins.on(hidden.device)
    index = bins.index(left)
    prepare(form, head, index)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=hidden.is_cuda)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(hidden), (8192,), device=hidden.device)
        loss = F.cross_entropy(FORMS[form](head(hidden[rows])), index[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    total, errors = 0.0, []
    with torch.no_grad():
        for part, n in zip(held_out[0].split(8192), held_out[1].split(8192), strict=True):
            logits = FORMS[form](head(part))
            total += float(F.cross_entropy(logits, bins.index(n), reduction="sum"))
            median = DistributionBelief(logits, 0.997, head.bins).length()
            errors.append(((median - n) / n).abs())
    loss_per_state = total / len(held_out[1])
    return {"nll": loss_per_state, "median_relative_error": float(torch.cat(errors).median())}


def time_interval(form: str, device: torch.device) -> float:
    """ms of log P(interval) of a step's candidates, from raw outputs."""
    bins = LengthBins()
    raw = torch.randn(*CANDIDATES, len(bins), device=device)
    low, high = (torch.full((CANDIDATES[0], 1), float(n), device=device) for n in (90, 110))
    times = []
    for _ in range(30):
        synchronize(device.type)
        start = time.perf_counter()
        for _ in range(10):
            DistributionBelief(FORMS[form](raw), 0.997, bins).log_interval(low, high)
        synchronize(device.type)
        times.append((time.perf_counter() - start) * 1e2)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="trajectory files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--states", type=int, default=400_000, help="training states")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    dtype = torch.bfloat16 if o.device == "cuda" else torch.float32
    config = LenVMConfig(gamma=0.997, head="distribution")
    model = LengthValueModel.build(o.backbone, config, dtype=dtype, device=o.device).eval()
    stores = [TokenStore.load(path) for path in o.data]
    splits = [
        read_states(model, Sequences.select(stores, split, max_tokens=2048), limit)
        for split, limit in (("train", o.states), ("validation", o.states // 5))
    ]
    runs: list[dict[str, Any]] = []
    for seed in range(o.seeds):
        for form in FORMS:
            found = train_head(form, seed, splits[0], splits[1], o.steps)
            runs.append({"form": form, "seed": seed, **found})
            print(runs[-1], flush=True)

    def mean(form: str, name: str) -> float:
        return statistics.mean(run[name] for run in runs if run["form"] == form)

    headline = {
        form: {
            "nll": mean(form, "nll"),
            "median_relative_error": mean(form, "median_relative_error"),
            "interval_ms": time_interval(form, torch.device(o.device)),
        }
        for form in FORMS
    }
    result = {
        "schema": "lenvm.benchmark.heads/1",
        **describe(o),
        "backbone": Path(o.backbone).name,
        "num_states": {"train": len(splits[0][1]), "validation": len(splits[1][1])},
        "steps": o.steps,
        "runs": runs,
        "headline": headline,
    }
    o.out.parent.mkdir(parents=True, exist_ok=True)
    part = o.out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(o.out)
    print(json.dumps(headline))


if __name__ == "__main__":
    main()
