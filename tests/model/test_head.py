import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lenvm import returns
from lenvm.errors import InputError
from lenvm.model.head import (
    MAX_REMAINING,
    DistributionBelief,
    DistributionHead,
    LengthBins,
    ScalarBelief,
    ValueHead,
    build_head,
)

GAMMA = 0.997


def dense_probabilities(belief: DistributionBelief) -> torch.Tensor:
    """P(remaining = n) for n = 1 .. MAX, in float64, spread evenly inside each bin."""
    per_token = belief.log_probs.double().exp() / belief.bins.width
    return per_token.repeat_interleave(belief.bins.width, -1)


def random_belief(seed: int, peak: int | None = None) -> DistributionBelief:
    bins = LengthBins()
    logits = torch.randn(3, len(bins), generator=torch.Generator().manual_seed(seed))
    if peak is not None:
        logits[:, bins.index(torch.tensor(peak))] += 20.0
    return DistributionBelief(logits, GAMMA, bins)


def test_bins_cover_every_length_once():
    bins = LengthBins()
    assert bins.lower[0] == 1
    assert bins.upper[-1] == MAX_REMAINING
    assert (bins.lower[1:] == bins.upper[:-1] + 1).all()
    lengths = torch.tensor([1, 2, 32, 33, 34, 35, 36, 1000, MAX_REMAINING, MAX_REMAINING + 5])
    index = bins.index(lengths)
    inside = lengths.clamp(max=MAX_REMAINING)
    assert ((bins.lower[index] <= inside) & (inside <= bins.upper[index])).all()


@pytest.mark.parametrize("gamma", [0.9, 0.997, 0.9998])
def test_value_and_mean_are_exact_given_the_bins(gamma: float):
    belief = random_belief(0)
    dense = dense_probabilities(belief)
    n = torch.arange(1, MAX_REMAINING + 1).double()
    expected = dense @ torch.expm1(n * math.log(gamma))
    torch.testing.assert_close(belief.value(gamma).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(belief.mean().double(), dense @ n, rtol=1e-5, atol=0)


@given(st.integers(0, 50), st.floats(0.01, 0.99))
def test_quantile_is_the_least_length_that_reaches_q(seed: int, q: float):
    belief = random_belief(seed)
    cdf = dense_probabilities(belief).cumsum(-1)
    n = belief.quantile(q).long()
    at = cdf.gather(-1, n[:, None] - 1).squeeze(-1)
    below = torch.where(n > 1, cdf.gather(-1, (n[:, None] - 2).clamp(min=0)).squeeze(-1), 0.0)
    assert (at >= q - 1e-5).all()
    assert (below <= q + 1e-5).all()


@given(st.integers(0, 50), st.integers(-3, 5000), st.integers(-3, 5000))
def test_interval_probability_is_exact_and_minus_infinity_where_impossible(
    seed: int, low: int, high: int
):
    belief = random_belief(seed)
    dense = dense_probabilities(belief)
    expected = dense[:, max(0, low - 1) : max(0, high)].sum(-1)
    found = belief.log_interval(torch.tensor([low]), torch.tensor([high])).double().exp()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_terminal_states_have_exactly_nothing_left():
    terminal = torch.tensor([True, False, False])
    for belief in (random_belief(1), ScalarBelief(torch.randn(3), GAMMA)):
        ended = belief.with_terminal(terminal)
        assert ended.value()[0] == 0.0
        assert ended.length()[0] == 0.0
        assert (ended.value()[1:] < 0).all()
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert random_belief(1).with_terminal(terminal).log_interval(zero, one)[0] == 0.0
    assert random_belief(1).with_terminal(terminal).log_interval(one, one)[0] == -math.inf


def test_scalar_belief_reads_the_published_value():
    logit = returns.length_to_logit(torch.tensor([1.0, 100.0, 100_000.0]), GAMMA)
    belief = ValueHead(8).belief(logit.unsqueeze(-1), GAMMA)
    torch.testing.assert_close(belief.length(), torch.tensor([1.0, 100.0, 100_000.0]))
    with pytest.raises(InputError, match="gamma"):
        belief.value(0.9)
    with pytest.raises(InputError, match="distribution"):
        belief.log_interval(torch.tensor(1), torch.tensor(2))


def test_heads_run_in_fp32_under_autocast():
    for head in (ValueHead(16), DistributionHead(16)):
        with torch.autocast("cpu", torch.bfloat16):
            assert head(torch.randn(2, 3, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_unknown_head_is_named():
    with pytest.raises(InputError, match="'vector'"):
        build_head("vector", 8)  # type: ignore[arg-type]
