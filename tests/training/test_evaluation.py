"""Metrics of the validation split against plain arithmetic over single sequences."""

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lenvm import returns
from lenvm.data.dataset import Sequences
from lenvm.data.packing import BatchPlan, PackedBatch, pack, pad
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.training.evaluation import Evaluation, name_metrics
from lenvm.training.metrics import position_errors, prompt_errors, summarise, token_errors
from lenvm.training.model import PackedModel
from lenvm.training.objective import Objective, States
from lenvm.training.steps import count
from tiny import tiny_backbone
from training.test_trainer import trajectory

GAMMA = 0.95


def make_sequences() -> Sequences:
    """Seven prompts of two domains, three completions each; the last prompt has a cut-off one."""
    random = np.random.default_rng(1)
    rows = []
    for i, sample in itertools.product(range(7), range(3)):
        length = int(random.integers(1, 40))
        rows.append(
            trajectory(
                i,
                length,
                "validation",
                id=f"{i:016x}-{sample}",
                sample_index=sample,
                domain=("math", "code")[i % 2],
                prompt_token_ids=np.random.default_rng(i).integers(3, 60, 2 + i).tolist(),
                completion_token_ids=random.integers(3, 60, length).tolist(),
                finish_reason="length" if i == 6 and sample == 2 else "stop",
            )
        )
    return Sequences.from_trajectories(rows, censoring="one_sided")


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return make_sequences()


@pytest.fixture(scope="module")
def model() -> PackedModel:
    torch.manual_seed(0)
    return PackedModel(LengthValueModel.build(tiny_backbone(), LenVMConfig(gamma=GAMMA)))


def evaluate(
    model: PackedModel,
    sequences: Sequences,
    shares: list[list[list[int]]],
    build: Callable[[Sequences, list[int]], PackedBatch] = pack,
) -> tuple[dict[str, object], int]:
    """(metrics, collectives) of processes that read `shares` [rank][micro batch][sequence]."""
    objective, parts = Objective(censoring="one_sided"), []
    for batches in shares:
        scores = Evaluation(sequences, GAMMA, torch.device("cpu"))
        for rows in batches:
            batch = build(sequences, rows)
            states = States.of(batch)
            with torch.no_grad():
                raw = model(batch)
            head = model.value_model.head
            loss = objective.sum(head, raw, states, GAMMA)
            weight = count(objective, sequences, np.array(rows, dtype=np.int64))
            scores.add(batch, states, model.value_model.belief(raw), loss, weight)
        parts.append(scores)
    calls = 0

    def reduce(flat: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert flat is parts[0].flat
        return torch.stack([p.flat for p in parts]).sum(0)

    return parts[0].metrics(reduce), calls


def read_one_by_one(model: PackedModel, sequences: Sequences) -> list[Tensor]:
    """Predicted remaining length in every state s_0 .. s_L of each sequence."""
    value_model, found = model.value_model, []
    for i in range(len(sequences)):
        with torch.no_grad():
            raw = value_model(torch.from_numpy(sequences.tokens(i).astype(np.int64))[None])[0]
        first = int(sequences.prompt_lengths[i]) - 1
        found.append(value_model.belief(raw[first:]).length())
    return found


def test_the_metrics_of_a_best_model_are_known_before_one_is_trained(
    model: PackedModel, sequences: Sequences
):
    found, _ = evaluate(model, sequences, [[list(range(len(sequences)))]])
    numbers = {name for name, value in found.items() if isinstance(value, float)}
    assert set(name_metrics(sequences)) == numbers - {"num_prompts"}
    row = trajectory(0, 9, "validation", finish_reason="length")
    cut = Sequences.from_trajectories([row], censoring="one_sided")
    found, _ = evaluate(model, cut, [[[0]]])
    assert name_metrics(cut) == list(found) == ["loss"]


def test_metrics_are_those_of_single_sequences(model: PackedModel, sequences: Sequences):
    found, _ = evaluate(model, sequences, [[list(range(len(sequences)))]])
    lengths = read_one_by_one(model, sequences)
    whole = [i for i in range(len(sequences)) if sequences.complete[i]]
    assert len(whole) == len(sequences) - 1

    def flat(rows: list[int]) -> tuple[Tensor, Tensor]:
        predicted = [lengths[i][:-1] for i in rows]
        remaining = [torch.arange(int(sequences.lengths[i]), 0, -1) for i in rows]
        return torch.cat(predicted), torch.cat(remaining)

    for suffix, rows in [
        ("", whole),
        *(
            (f"/{name}", [i for i in whole if sequences.domain[i] == d])
            for d, name in enumerate(sequences.domains)
        ),
    ]:
        predicted, remaining = flat(rows)
        for name, value in token_errors(predicted, remaining).items():
            assert found[name + suffix] == pytest.approx(value, rel=1e-5)
        error = returns.length_to_value(predicted, GAMMA) - returns.length_to_value(
            remaining, GAMMA
        )
        assert found[f"value_mae{suffix}"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
        rmse = error.square().mean().sqrt().item()
        assert found[f"value_rmse{suffix}"] == pytest.approx(rmse, rel=1e-4)

    answers = [int(sequences.lengths[i]) for i in whole]
    for name, value in position_errors([lengths[i][:-1] for i in whole], answers).items():
        assert found[name] == pytest.approx(value, rel=1e-5)


def test_the_prompt_boundary_is_that_of_equations_13_to_15(
    model: PackedModel, sequences: Sequences
):
    found, _ = evaluate(model, sequences, [[list(range(len(sequences)))]])
    lengths = read_one_by_one(model, sequences)
    members = defaultdict(list)
    for i, group in enumerate(sequences.groups.tolist()):
        members[str(group)].append(i)
    whole = {g: rows for g, rows in members.items() if sequences.complete[rows].all()}
    assert len(whole) == 6
    errors = prompt_errors(
        {g: float(lengths[rows[0]][0]) for g, rows in whole.items()},
        {g: sequences.lengths[rows].tolist() for g, rows in whole.items()},
        GAMMA,
    )
    by_hand = summarise(errors, dict.fromkeys(whole, "all"))
    assert found["prompt_mre"] == pytest.approx(by_hand["mre"], rel=1e-4)
    assert found["prompt_median"] == pytest.approx(by_hand["median"], rel=1e-4)
    assert found["num_prompts"] == 6


def test_neither_padding_nor_shares_nor_stand_ins_change_a_metric(
    model: PackedModel, sequences: Sequences
):
    rows = list(range(len(sequences)))
    whole, calls = evaluate(model, sequences, [[rows]])
    assert calls == 1
    plan = BatchPlan(sequences, 100, world_size=3, shuffle=False)
    shares = [[list(b) for b in rank] for rank in plan.micro_batches(plan.order(0))]
    shares[2].append([])  # a stand-in
    for other, build in (([[rows[::2], rows[1::2]]], pad), (shares, pack)):
        found, calls = evaluate(model, sequences, other, build)  # type: ignore[arg-type]
        assert calls == 1
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            if name == "calibration":
                torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value))
            else:
                assert found[name] == pytest.approx(value, rel=1e-5), name


def test_calibration_compares_each_decile_with_what_came(model: PackedModel):
    """Ten completions of 12 tokens; in every state of the k-th one 1.5 * 2^k tokens are said."""
    rows = [trajectory(i, 12, "validation") for i in range(10)]
    sequences = Sequences.from_trajectories(rows)
    batch = pack(sequences, list(range(10)))
    said = [1.5 * 2**k for k in range(10)]
    logits = returns.length_to_logit(torch.tensor(said).repeat_interleave(13), GAMMA)
    belief = model.value_model.belief(logits.unsqueeze(-1))
    scores = Evaluation(sequences, GAMMA, torch.device("cpu"))
    scores.add(batch, States.of(batch), belief, torch.tensor(1.0), 120)
    found = scores.metrics(lambda flat: flat)
    for (predicted, realised), length in zip(found["calibration"], said, strict=True):
        assert (predicted, realised) == pytest.approx((length, 6.5), rel=2e-3)
    gap = sum(abs(length - 6.5) / 6.5 for length in said) / 10
    assert found["calibration_error"] == pytest.approx(gap, rel=2e-3)
