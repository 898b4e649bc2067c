"""How good the model is on the validation split: sums on each process, one collective, metrics.

Every metric is a quotient of sums, so it does not depend on packing, on the processes' shares or on
stand-in batches. Truncated completions count in the loss (as their censoring says) and nowhere
else: nobody knows their length.

Shape legend: M states, C completions, D domains, G prompts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenvm import returns
from lenvm.data.dataset import Sequences
from lenvm.data.packing import PackedBatch
from lenvm.model.head import LengthBelief
from lenvm.training.metrics import POSITIONS, true_length
from lenvm.training.objective import States

ERRORS = ("count", "absolute", "square", "relative", "value_absolute", "value_square")
CALIBRATION_BINS = 256
LONGEST = 2.0**20


class Evaluation:
    """Adds batches up; `metrics` reduces and divides."""

    def __init__(self, sequences: Sequences, gamma: float, device: torch.device) -> None:
        self.sequences, self.gamma = sequences, gamma
        names, which = np.unique(sequences.groups, return_inverse=True)
        self.prompt = torch.from_numpy(which).to(device)
        self.sizes = {
            "loss": (2,),
            "errors": (len(sequences.domains), len(ERRORS)),
            "positions": (len(POSITIONS), 2),
            "calibration": (CALIBRATION_BINS, 3),
            "prompts": (len(names), 2),
        }
        total = sum(int(np.prod(size)) for size in self.sizes.values())
        self.flat = torch.zeros(total, dtype=torch.float64, device=device)

    def _part(self, name: str) -> Tensor:
        start = 0
        for other, size in self.sizes.items():
            count = int(np.prod(size))
            if other == name:
                return self.flat[start : start + count].view(size)
            start += count
        raise KeyError(name)

    def add(
        self, batch: PackedBatch, states: States, belief: LengthBelief, loss: Tensor, weight: int
    ) -> None:
        """A batch's beliefs over its M states, its summed loss, and what that is divided by."""
        if not batch.counts:
            return
        self._part("loss").add_(torch.stack([loss.double(), loss.new_tensor(weight).double()]))
        predicted, value = belief.length().double(), belief.value().double()
        remaining = states.remaining.double()
        truth = returns.length_to_value(remaining, self.gamma).double()
        on = (states.is_known & (states.remaining > 0)).double()
        error, value_error = predicted - remaining, value - truth
        relative = error.abs() / remaining.clamp(min=1)
        columns = (torch.ones_like(on), error.abs(), error.square(), relative)
        rows = torch.stack([*columns, value_error.abs(), value_error.square()], -1)
        domain = batch.domain[states.completion]
        self._part("errors").index_add_(0, domain, rows * on.unsqueeze(-1))
        bins = predicted.clamp(1, LONGEST).log2() * (CALIBRATION_BINS / 20)
        triples = torch.stack([predicted, remaining, torch.ones_like(on)], -1) * on.unsqueeze(-1)
        at = bins.long().clamp(max=CALIBRATION_BINS - 1)
        self._part("calibration").index_add_(0, at, triples)
        known = batch.complete.double()
        for i, share in enumerate(POSITIONS):
            place = batch.state_offsets[:-1] + (share * batch.lengths.double()).long()
            sums = torch.stack([(relative[place] * known).sum(), known.sum()])
            self._part("positions")[i].add_(sums)
        first = value[batch.state_offsets[:-1]]
        pairs = torch.stack([first, torch.ones_like(first)], -1)
        self._part("prompts").index_add_(0, self.prompt[batch.sequences], pairs)

    def metrics(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """`reduce`: sum over processes, called once. Names without a prefix; lower is better."""
        self.flat = reduce(self.flat).cpu()
        loss, weight = self._part("loss").tolist()
        found: dict[str, Any] = {"loss": loss / weight}
        errors = self._part("errors")
        found |= _means(errors.sum(0), "")
        if len(self.sequences.domains) > 1:
            for name, row in zip(self.sequences.domains, errors, strict=True):
                found |= _means(row, f"/{name}")
        for share, (total, count) in zip(POSITIONS, self._part("positions").tolist(), strict=True):
            if count:
                found[f"relative_error_at_{round(100 * share)}"] = total / count
        return found | self._calibration() | self._prompts()

    def _calibration(self) -> dict[str, Any]:
        """Mean predicted and realised remaining length by decile of the prediction."""
        rows = self._part("calibration")
        count = rows[:, 2]
        if not count.sum():
            return {}
        before = (count.cumsum(0) - count / 2) / count.sum()
        decile = (before * 10).long().clamp(0, 9)
        deciles = torch.zeros(10, 3, dtype=torch.float64).index_add_(0, decile, rows)
        deciles = deciles[deciles[:, 2] > 0]
        predicted, realised, weight = (deciles / deciles[:, 2:]).T[0], *deciles.T[1:]
        realised = realised / weight
        gap = ((predicted - realised).abs() / realised * weight).sum() / weight.sum()
        return {
            "calibration": [
                [round(p, 2), round(r, 2)]
                for p, r in zip(predicted.tolist(), realised.tolist(), strict=True)
            ],
            "calibration_error": gap.item(),
        }

    def _prompts(self) -> dict[str, float]:
        """Eq. 13-15 over the prompts that have several completions, all complete."""
        lengths: dict[int, list[int]] = {}
        cut: set[int] = set()
        for prompt, length, complete in zip(
            self.prompt.tolist(),
            self.sequences.lengths.tolist(),
            self.sequences.complete.tolist(),
            strict=True,
        ):
            lengths.setdefault(prompt, []).append(length)
            if not complete:
                cut.add(prompt)
        kept = [p for p, group in lengths.items() if len(group) > 1 and p not in cut]
        if not kept:
            return {}
        sums = self._part("prompts")[torch.tensor(kept)]
        values = (sums[:, 0] / sums[:, 1]).float()
        predicted = returns.value_to_length(values, self.gamma).double()
        truth = torch.tensor([true_length(lengths[p], self.gamma) for p in kept]).double()
        errors = (predicted - truth).abs() / truth
        return {
            "prompt_mre": errors.mean().item(),
            "prompt_median": errors.median().item(),
            "num_prompts": float(len(kept)),
        }


def name_metrics(sequences: Sequences) -> list[str]:
    """The metrics of these sequences that a best model may be chosen by, before any is computed."""
    known = sequences.complete & (sequences.lengths > 0)
    names = ["loss"]
    if known.any():
        errors = list(_means(torch.ones(len(ERRORS)), ""))
        found = [d for i, d in enumerate(sequences.domains) if known[sequences.domain == i].any()]
        domains = found if len(sequences.domains) > 1 else []
        names += errors + [f"{name}/{domain}" for domain in domains for name in errors]
        names += [f"relative_error_at_{round(100 * share)}" for share in POSITIONS]
        names.append("calibration_error")
    _, which, counts = np.unique(sequences.groups, return_inverse=True, return_counts=True)
    cut = np.bincount(which, ~sequences.complete, minlength=len(counts)) > 0
    if ((counts > 1) & ~cut).any():
        names += ["prompt_mre", "prompt_median"]
    return names


def _means(row: Tensor, suffix: str) -> dict[str, float]:
    sums = dict(zip(ERRORS, row.tolist(), strict=True))
    count = sums["count"]
    if not count:
        return {}
    return {
        f"mae{suffix}": sums["absolute"] / count,
        f"rmse{suffix}": (sums["square"] / count) ** 0.5,
        f"relative_error{suffix}": sums["relative"] / count,
        f"value_mae{suffix}": sums["value_absolute"] / count,
        f"value_rmse{suffix}": (sums["value_square"] / count) ** 0.5,
    }
