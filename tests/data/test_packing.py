"""Which sequence goes where, as properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm.data.dataset import Sequences
from lenvm.data.packing import BatchPlan, balance, pack, pad
from training.test_trainer import trajectory


def sequences(lengths: list[int], per_prompt: int = 1) -> Sequences:
    return Sequences.from_trajectories(
        [
            trajectory(
                i // per_prompt,
                n,
                "train",
                id=f"{i:016x}-0",
                prompt_token_ids=[4, 5, 6 + i // per_prompt],
            )
            for i, n in enumerate(lengths)
        ]
    )


POOL = sequences([1 + (7 * i) % 60 for i in range(60)], per_prompt=3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 5), st.integers(50, 400)
)
def test_balance_places_every_item_once_within_the_budget(
    costs: list[int], world: int, budget: int
):
    ranks = balance(np.array(costs), world, budget)
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for b in rank for i in b) == list(range(len(costs)))
    assert all(sum(costs[i] for i in b) <= budget or len(b) == 1 for rank in ranks for b in rank)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([None, 7]),
    st.integers(80, 300),
)
def test_an_epoch_sees_every_sequence_once_whatever_the_number_of_processes(
    world: int, seed: int, grouped: bool, step_sequences: int | None, budget: int
):
    plan = BatchPlan(
        POOL, budget, step_sequences=step_sequences, seed=seed, grouped=grouped, world_size=world
    )
    alone = BatchPlan(POOL, budget, step_sequences=step_sequences, seed=seed, grouped=grouped)
    steps = [plan.step(1, n) for n in range(plan.num_steps(1))]
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(POOL)))
    for n, rows in enumerate(steps):
        assert rows.tolist() == alone.step(1, n).tolist()
        shared_out = [r for rank in plan.micro_batches(rows) for b in rank for r in b]
        assert sorted(shared_out) == sorted(rows.tolist())
    if step_sequences is None:
        assert all(POOL.totals[rows].sum() <= budget for rows in steps)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.booleans(), st.integers(60, 300), st.sampled_from([2, 4]))
def test_a_step_fits_its_micro_batches_which_are_the_same_for_several_processes(
    seed: int, share_prompts: bool, budget: int, count: int
):
    """Filled to the last token, four micro batches would be five, and six on two processes."""
    plans = [
        BatchPlan(
            POOL, budget, step_tokens=budget * count, seed=seed, world_size=n,
            grouped=share_prompts, share_prompts=share_prompts,
        )
        for n in (1, 2, count)
    ]  # fmt: skip
    sizes = []
    for number in range(plans[0].num_steps()):
        rows = plans[0].step(0, number)
        shared_out = [plan.micro_batches(rows) for plan in plans]
        if len(rows) < 2 * count:
            continue
        assert sum(map(len, shared_out[0])) <= count
        if len(shared_out[0][0]) == count:
            sets = [sorted(sorted(b.tolist()) for rank in s for b in rank) for s in shared_out]
            assert sets[0] == sets[1] == sets[2]
            sizes.append(POOL.totals[rows].sum() / (budget * count))
    assert share_prompts or not sizes or np.median(sizes[:-1] or sizes) > 0.7


def test_epochs_and_seeds_shuffle_differently():
    plan = BatchPlan(POOL, 100)
    orders = {
        tuple(plan.order(0)),
        tuple(plan.order(1)),
        tuple(BatchPlan(POOL, 100, seed=1).order(0)),
    }
    assert len(orders) == 3
    assert BatchPlan(POOL, 100, shuffle=False).order(4).tolist() == list(range(len(POOL)))


def test_grouped_keeps_a_prompts_completions_together():
    groups = POOL.groups[BatchPlan(POOL, 100, grouped=True).order(0)]
    assert (np.diff(groups) != 0).sum() == 19
    groups = POOL.groups[BatchPlan(POOL, 100).order(0)]
    assert (np.diff(groups) != 0).sum() > 40


def test_weights_repeat_and_thin_out():
    source = np.arange(len(POOL)) % 2
    mixed = Sequences(**{**POOL.__dict__, "source": source})
    counts = np.bincount(BatchPlan(mixed, 100, weights=np.array([2.5, 0.5])).order(0))
    assert set(counts[::2]) == {2, 3}
    assert counts[::2].sum() == 75
    assert counts[1::2].sum() == 15


def test_a_batch_lays_out_states_s_0_to_s_l():
    found = sequences([2, 3])
    batch = pack(found, [1, 0])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert batch.state_index.tolist() == [2, 3, 4, 5, 8, 9, 10]
    assert batch.state_offsets.tolist() == [0, 4, 7]
    assert batch.packing is not None
    assert batch.packing.cu_queries.tolist() == [0, 6, 11]
    assert (batch.num_tokens, batch.longest, batch.any_cut) == (11, 3, False)
    padded = pad(found, [1, 0])
    ids = [b.input_ids.flatten()[b.state_index].tolist() for b in (batch, padded)]
    assert ids[0] == ids[1]


def test_a_shared_prompt_stands_once():
    batch = pack(POOL, [0, 1, 2, 3], share_prompts=True)
    assert batch.input_ids.numel() == 6 + POOL.lengths[:4].sum()
    assert batch.num_tokens == POOL.totals[:4].sum()
    assert batch.packing is not None
    assert batch.packing.key_index is not None
    assert batch.packing.cu_queries.diff().tolist() == [3, *POOL.lengths[:3], 3, POOL.lengths[3]]
    plan = BatchPlan(POOL, 90, grouped=True, share_prompts=True)
    for rows in plan.micro_batches(plan.order(0))[0]:
        assert pack(POOL, rows, share_prompts=True).input_ids.numel() <= 90


def test_a_stand_in_does_not_count():
    batch = pack(POOL, [])
    assert not batch.counts
    assert batch.num_tokens == 0
    assert batch.input_ids.numel() > 0


def test_moving_a_batch_moves_every_tensor():
    batch = pack(POOL, [0, 1, 2], share_prompts=True).to("meta")
    assert batch.packing is not None
    tensors = [batch.input_ids, batch.state_index, batch.packing.cu_keys, batch.packing.key_index]
    assert all(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in tensors)
    assert batch.packing.max_keys == pytest.approx(int(POOL.totals[:3].max()))
