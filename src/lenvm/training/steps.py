"""The optimizer steps of a whole run, as the Trainer's data set, and one step's micro batches."""

import math
from dataclasses import dataclass

import torch

from lenvm.data.dataset import Array, Sequences
from lenvm.data.packing import AddImages, BatchPlan, Hidden, PackedBatch, pack
from lenvm.training.objective import Objective


@dataclass(frozen=True)
class Step:
    """One optimizer step as one process sees it."""

    micro_batches: list[Array]
    """This process's sequence numbers; an empty one is a stand-in."""
    denominator: int
    """What the loss summed over all processes is divided by."""
    num_tokens: int
    """Of all processes."""


class RunSteps(torch.utils.data.Dataset[Step]):
    """All steps of a run, epoch after epoch; a pure function of plan and objective.

    The Trainer takes the run for one epoch, so that a resumed one skips exactly what was done.
    """

    def __init__(self, plan: BatchPlan, objective: Objective, epochs: float, rank: int) -> None:
        self.plan, self.objective, self.rank = plan, objective, rank
        counts = [plan.num_steps(e) for e in range(math.ceil(epochs))]
        if part := epochs % 1:
            counts[-1] = max(1, round(part * counts[-1]))
        self.places = [(e, n) for e, count in enumerate(counts) for n in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Step:
        rows = self.plan.step(*self.places[index])
        sequences = self.plan.sequences
        return Step(
            self.plan.micro_batches(rows)[self.rank],
            count(self.objective, sequences, rows),
            int(sequences.totals[rows].sum()),
        )


def count(objective: Objective, sequences: Sequences, rows: Array) -> int:
    """What the summed loss of these sequences is divided by."""
    lengths, complete = sequences.lengths[rows], sequences.complete[rows]
    return objective.denominator(torch.from_numpy(lengths), torch.from_numpy(complete))


@dataclass(frozen=True)
class Packer:
    """Sequence numbers -> a batch on the device. On the GPU the copy runs beside the work before
    it: packing takes a fraction of a micro batch's time, so no loader process is needed."""

    sequences: Sequences
    device: torch.device
    share_prompts: bool = False
    hidden: Hidden | None = None
    add_images: AddImages | None = None

    def __call__(self, rows: Array) -> PackedBatch:
        batch = pack(
            self.sequences,
            rows,
            share_prompts=self.share_prompts,
            hidden=self.hidden,
            add_images=self.add_images,
        )
        return batch.pin_memory().to(self.device) if self.device.type == "cuda" else batch


def plan_evaluation(sequences: Sequences, batch_tokens: int, world_size: int) -> list[list[Array]]:
    """[rank][micro batch]: every sequence once."""
    plan = BatchPlan(sequences, batch_tokens, world_size=world_size, shuffle=False)
    return plan.micro_batches(plan.order(0))
