"""Two tensor-parallel ranks as processes that broadcast over gloo: rank 0 draws, rank 1 follows."""

import random
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from guidance.oracle import Markov, OracleScorer
from lenvm.engines.adapter import Admission, FollowingBatch, GuidedBatch
from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import GuidanceSession, Guided

SIZE, VOCAB, STEPS, REQUESTS = 6, 8, 30, 5
FAILED = VOCAB - 1


class Breaks(OracleScorer):
    """Fails once, in the middle of the run."""

    calls = 0

    def score(self, *args, **more):
        self.calls += 1
        if self.calls == STEPS // 2:
            raise RuntimeError("boom")
        return super().score(*args, **more)


def play(rank: int, folder: str) -> None:
    """A rank of an engine: the logits are the same on both, the tokens come from the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def share(tokens):
        dist.broadcast(tokens, src=0)
        return tokens

    markov = Markov(size=SIZE, seed=3, end=0.0)
    batch = FollowingBatch(share)
    if rank == 0:
        session = GuidanceSession(Breaks(markov), eos_token_ids=())
        batch = GuidedBatch(session, seed=1, share=share)
    control = LengthControl.parse({"equal_to": 50, "rule": "soft", "top_k": 4})
    ids = [f"r{i}" for i in range(REQUESTS)]
    for i, name in enumerate(ids):
        guided = Guided([i % SIZE], control, temperature=1.0)
        batch.add(name, Admission(guided, failure_token_id=FAILED))
    last, source, taken = [i % SIZE for i in range(REQUESTS)], random.Random(5), []
    for _ in range(STEPS):
        rows = source.sample(range(REQUESTS + 2), REQUESTS)  # two rows are other requests'
        logits = torch.full((REQUESTS + 2, VOCAB), -40.0)
        for row, token in zip(rows, last, strict=True):
            logits[row, :SIZE] = markov.logits(token)
        before = logits.clone()
        batch.step(ids, rows, logits)
        others = [row for row in range(REQUESTS + 2) if row not in rows]
        assert torch.equal(logits[others], before[others])
        tokens = logits[rows].argmax(-1).tolist()
        assert all(torch.isfinite(logits[row]).sum() == 1 for row in rows)
        taken.append(tokens)
        batch.settle(ids)
        last = [t if t < SIZE else 0 for t in tokens]
    torch.save(taken, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_take_the_same_tokens_over_a_real_broadcast(tmp_path: Path):
    mp.spawn(play, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first == second
    assert len(first) == STEPS
    ends = [sum(step[r] == FAILED for step in first) for r in range(REQUESTS)]
    assert sorted(n > 0 for n in ends) == [False] * (REQUESTS - 1) + [True]  # one failed, alone
    assert len({tuple(step) for step in first}) > STEPS // 4
