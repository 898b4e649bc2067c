import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lenvm.guidance.candidates import (
    BLOCK,
    Candidates,
    Truncation,
    largest,
    search,
    truncate,
    write_back,
)

V = 12


def truncation(rows: list[dict[str, float]], endings: list[list[int]] | None = None) -> Truncation:
    endings = endings or [[0]] * len(rows)
    width = max(1, *(len(e) for e in endings))
    return Truncation(
        temperature=torch.tensor([r.get("temperature", 1.0) for r in rows]),
        top_k=torch.tensor([int(r.get("top_k", V)) for r in rows]),
        top_p=torch.tensor([r.get("top_p", 1.0) for r in rows]),
        min_p=torch.tensor([r.get("min_p", 0.0) for r in rows]),
        ending_ids=torch.tensor([[*e, *[-1] * (width - len(e))] for e in endings]),
        max_candidates=max(int(r.get("top_k", V)) for r in rows),
    )


def build(logits: Tensor, *args, may: bool = True, must: bool = False, **kwargs) -> Candidates:
    rows = torch.ones(len(logits), dtype=torch.bool)
    settings = truncation(*args, **kwargs)
    return truncate(
        *search(logits, settings, may_end_R=rows & may, must_end_R=rows & must), settings
    )


def probs(candidates: Candidates, row: int = 0) -> dict[int, float]:
    found = zip(candidates.ids[row].tolist(), candidates.log_probs[row].exp().tolist(), strict=True)
    return {token: p for token, p in found if token >= 0}


def expected_set(logits: Tensor, row: dict[str, float]) -> set[int]:
    """Tokens that pass each test on softmax(logits / T), by sorting in float64."""
    p = (logits.double() / (row.get("temperature", 1.0) or 1.0)).softmax(-1)
    order = p.argsort(descending=True, stable=True).tolist()
    kept, mass = set(), 0.0
    for rank, token in enumerate(order):
        in_k = rank < row.get("top_k", V)
        in_p = mass < row.get("top_p", 1.0) or row.get("top_p", 1.0) == 1.0
        in_min = p[token] >= row.get("min_p", 0.0) * p[order[0]]
        if rank == 0 or (in_k and in_p and in_min):
            kept.add(token)
        mass += p[token].item()
    return kept


params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.integers(1, V),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3]),
    }
)


@given(seed=st.integers(0, 10_000), rows=st.lists(params, min_size=1, max_size=4))
@settings(deadline=None)
def test_candidates_are_what_passes_every_test_and_do_not_depend_on_batch_mates(
    seed: int, rows: list[dict[str, float]]
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), V, generator=generator) * 3
    batch = build(logits, rows)
    for i, row in enumerate(rows):
        found = probs(batch, i)
        assert set(found) == expected_set(logits[i], row)
        p = (logits[i].double() / (row["temperature"] or 1.0)).softmax(-1)
        total = sum(p[t].item() for t in found)
        assert found == pytest.approx({t: p[t].item() / total for t in found}, rel=1e-4)
        assert probs(build(logits[i : i + 1], [row])) == pytest.approx(found, rel=1e-5)
        assert batch.is_ending[i].tolist() == [t == 0 for t in batch.ids[i].tolist()]


def test_the_likeliest_comes_first_and_pads_come_last():
    found = build(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), [{"top_k": 2}], may=True)
    assert found.ids.tolist() == [[1, 2]]
    found = build(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), [{"top_k": 4, "min_p": 0.3}])
    assert found.ids.tolist() == [[1, 2, -1, -1]]
    assert found.mask.tolist() == [[True, True, False, False]]


def test_equal_logits_fill_top_k_and_no_more():
    found = build(torch.zeros(1, V), [{"top_k": 5}])
    assert len(probs(found)) == 5
    assert list(probs(found).values()) == pytest.approx([0.2] * 5)


def test_one_possible_token_is_the_only_candidate():
    logits = torch.full((2, V), -math.inf)
    logits[0, 7] = -3.0
    logits[1, 0] = 2.0  # and it is the ending token
    for may, must in ((True, False), (False, False), (True, True)):
        found = build(logits, [{}, {}], may=may, must=must)
        assert [probs(found, 0), probs(found, 1)] == [{7: 1.0}, {0: 1.0}]


def test_a_row_of_nothing_has_no_nan():
    found = build(torch.full((1, V), -math.inf), [{}])
    assert not found.log_probs.isnan().any()
    assert len(probs(found)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0, 100.0])
def test_a_banned_ending_is_no_candidate_at_any_temperature(temperature: float):
    logits = torch.zeros(1, V)
    found = build(logits, [{"temperature": temperature}], may=False)
    assert set(probs(found)) == set(range(1, V))
    assert not found.is_ending.any()


def test_no_ending_where_it_may_not_end_and_the_rest_is_truncated_by_itself():
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = 20.0  # top_p would leave the ending token alone
    assert set(probs(build(logits, [{"top_p": 0.9}]))) == {0}
    found = probs(build(logits, [{"top_p": 0.9}], may=False))
    rest = logits.clone()
    rest[0, 0] = -math.inf
    assert set(found) == expected_set(rest[0], {"top_p": 0.9})
    assert 0 not in found
    assert len(found) > 1


def test_where_it_must_end_only_ending_tokens_are_left_with_their_true_odds():
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 5] = -40.0, -41.0
    found = probs(build(logits, [{"top_k": 4}], [[3, 5]], must=True))
    assert found == pytest.approx({3: 1 / (1 + math.exp(-1)), 5: 1 / (1 + math.e)}, rel=1e-4)


def test_endings_are_per_row_and_rows_without_one_are_left_alone():
    logits = torch.arange(V).float().expand(3, -1).clone()
    banned = build(logits, [{}] * 3, [[11, 0], [0], []], may=False)
    assert set(probs(banned, 0)) == set(range(1, 11))
    assert set(probs(banned, 1)) == set(range(1, 12))
    assert set(probs(banned, 2)) == set(range(V))
    forced = build(logits, [{}] * 3, [[11, 0], [0], []], must=True)
    assert [set(probs(forced, i)) for i in range(3)] == [{0, 11}, {0}, set(range(V))]
    assert forced.is_ending[0, :2].all()
    assert not forced.is_ending[2].any()


def test_top_p_one_keeps_the_last_of_many_tiny_tokens():
    logits = torch.zeros(1, 4096)
    settings = truncation([{"top_k": 4096}])
    yes = torch.tensor([True])
    found = truncate(*search(logits, settings, may_end_R=yes, must_end_R=~yes), settings)
    assert int(found.mask.sum()) == 4096


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_finite(temperature: float):
    logits = torch.tensor([[1.0, 60000.0, -60000.0, 3.0]])
    found = build(logits, [{"temperature": temperature, "top_k": 4}])
    assert not found.log_probs.isnan().any()
    assert max(probs(found), key=lambda t: probs(found)[t]) == 1


def test_temperature_factors_reweigh_single_tokens():
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(3))
    settings = truncation([{}, {}])
    settings.factor_ids = torch.tensor([[4, 7], [-1, -1]])
    settings.factors = torch.tensor([[2.0, 0.5], [-1.0, -1.0]])
    rows = torch.ones(2, dtype=torch.bool)
    found = truncate(*search(logits, settings, may_end_R=rows, must_end_R=~rows), settings)
    p = logits.double().softmax(-1)
    weights = p[0].clone()
    weights[4], weights[7] = p[0, 4] ** 0.5, p[0, 7] ** 2
    weights /= weights.sum()
    assert probs(found, 0) == pytest.approx(dict(enumerate(weights.tolist())), rel=1e-4)
    assert probs(found, 1) == pytest.approx(dict(enumerate(p[1].tolist())), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_back_gives_the_engine_the_guided_distribution_and_leaves_others(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, V, generator=generator).to(dtype)
    before = logits.clone()
    temperature = torch.tensor([0.5, 0.0])
    found = build(before[[3, 1]], [{"temperature": 0.5, "top_k": 3}, {"temperature": 0.0}])
    found.log_probs = (found.log_probs * 1.7).log_softmax(-1)  # stands for a rule
    write_back(found, logits, rows_R=torch.tensor([3, 1]), temperature_R=temperature)
    assert torch.equal(logits[[0, 2, 4]], before[[0, 2, 4]])
    for row, (place, t) in enumerate(((3, 0.5), (1, 1.0))):
        drawn_from = (logits[place].float() / t).softmax(-1)
        assert {i for i, p in enumerate(drawn_from.tolist()) if p > 0} == set(probs(found, row))
        for token, p in probs(found, row).items():
            assert drawn_from[token].item() == pytest.approx(
                p, rel=0.05 if t and dtype != torch.float32 else 1e-4
            )


@pytest.mark.parametrize("width", [700, 1024, 64 * BLOCK])
@pytest.mark.parametrize("k", [1, 7, 15])
def test_the_largest_by_blocks_are_the_largest(width: int, k: int):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width + k))
    x[1, : width // 2] = -torch.inf
    x[2, 3:9] = 9.0 + torch.arange(6) / 8  # several in one block
    values, columns = largest(x, k)
    want = x.topk(k)
    assert torch.equal(values, want.values)
    assert torch.equal(columns, want.indices)


def test_a_tiny_temperature_factor_of_a_certain_token_is_a_number():
    settings = truncation([{"temperature": 1e-6, "top_k": 2}])
    settings.factor_ids, settings.factors = torch.tensor([[1]]), torch.tensor([[1e-300]])
    yes = torch.tensor([True])
    logits = torch.tensor([[1.0, 90.0, 3.0]])
    found = truncate(*search(logits, settings, may_end_R=yes, must_end_R=~yes), settings)
    assert found.log_probs[0].exp().tolist() == pytest.approx([1.0, 0.0])
