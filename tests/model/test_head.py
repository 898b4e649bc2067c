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
    Peak,
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
    geometric = (dense @ n.log()).exp()
    torch.testing.assert_close(belief.geometric_mean().double(), geometric, rtol=1e-5, atol=0)


def test_what_never_ends_lies_in_no_interval_and_in_no_mean():
    bins = LengthBins(loops=True)
    logits = torch.full((1, len(bins)), -20.0)
    logits[0, 9], logits[0, -1] = 0.0, 0.0  # ten tokens, or for ever
    belief = DistributionBelief(logits, GAMMA, bins)
    one, far = torch.tensor(1.0), torch.tensor(torch.inf)
    assert belief.log_interval(one, far).exp().item() == pytest.approx(0.5, abs=1e-4)
    assert belief.mean().item() == pytest.approx(10, abs=0.1)
    assert [belief.quantile(q).item() for q in (0.1, 0.5, 0.9)] == [10, 10, 10]
    assert belief.value().item() == pytest.approx((GAMMA**10 - 1) / 2 - 0.5, abs=1e-3)
    plain = DistributionBelief(logits, GAMMA, LengthBins())
    assert plain.log_interval(one, far).exp().item() == pytest.approx(1, abs=1e-4)


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


@given(
    seed=st.integers(0, 50),
    low=st.integers(-3, 3000),
    span=st.integers(0, 5000),
    centre=st.integers(-50, 6000),
    below=st.sampled_from([0.0, 1e-6, 0.01, 0.7]),
    above=st.sampled_from([0.0, 1e-4, 0.02, 3.0]),
)
def test_a_peaks_weights_are_summed_exactly(
    seed: int, low: int, span: int, centre: int, below: float, above: float
):
    belief, high = random_belief(seed), low + span
    n = torch.arange(1, MAX_REMAINING + 1).double()
    log_weight = -below * (centre - n).clamp(min=0) - above * (n - centre).clamp(min=0)
    log_weight[(n < low) | (n > high)] = -math.inf
    expected = (dense_probabilities(belief).log() + log_weight).logsumexp(-1)
    low_, high_, centre_ = (torch.tensor([float(x)]) for x in (low, high, centre))
    peak = Peak(centre_, torch.tensor([below]), torch.tensor([above]))
    found = belief.log_interval(low_, high_, peak)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    ended = belief.with_terminal(torch.tensor([True] * 3)).log_interval(low_, high_, peak)
    now = -below * max(centre, 0) - above * max(-centre, 0) if low <= 0 <= high else -math.inf
    assert ended.tolist() == pytest.approx([now] * 3, rel=1e-5)


def test_open_bounds_are_infinite():
    belief, infinity = random_belief(3), torch.tensor([math.inf])
    assert belief.log_interval(-infinity, infinity).tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    half = belief.log_interval(torch.tensor([51.0]), infinity)
    other = belief.log_interval(-infinity, torch.tensor([50.0]))
    assert torch.logaddexp(half, other).tolist() == pytest.approx([0.0] * 3, abs=1e-5)


@given(seed=st.integers(0, 50))
def test_the_probability_of_more_than_n_never_rises_with_n(seed: int):
    belief = random_belief(seed)
    n = torch.cat([torch.arange(1, 300), torch.tensor([999, 9_999, MAX_REMAINING])])
    tail = belief.log_interval(n.float()[:, None], torch.tensor([[math.inf]]))
    assert (tail[1:] <= tail[:-1] + 1e-5).all()
    assert tail[0].tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert tail[-1].isfinite().all()


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
