import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm import returns
from lenvm.errors import InputError

gammas = st.sampled_from([0.9, 0.99, 0.997, 0.9998, 0.99999])


@given(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=20), gammas)
def test_logit_and_length_are_inverse_in_fp32_for_any_length(lengths: list[int], gamma: float):
    n = torch.tensor(lengths, dtype=torch.float32)
    back = returns.logit_to_length(returns.length_to_logit(n, gamma), gamma)
    torch.testing.assert_close(back, n, rtol=2e-6, atol=0)


@given(st.integers(1, 1_000_000), gammas)
def test_value_agrees_with_float64(length: int, gamma: float):
    expected = math.expm1(length * math.log(gamma))
    value = returns.length_to_value(torch.tensor(length), gamma).item()
    assert value == pytest.approx(expected, rel=2e-6)
    logit = returns.length_to_logit(torch.tensor(length), gamma)
    assert returns.logit_to_value(logit).item() == pytest.approx(expected, rel=2e-6)
    if length * -math.log(gamma) < 5:  # beyond, fp32 has no digits left next to -1
        again = returns.value_to_length(returns.length_to_value(torch.tensor(length), gamma), gamma)
        assert again.item() == pytest.approx(length, rel=1e-4)


@given(st.integers(1, 400), gammas)
def test_returns_obey_the_bellman_recursion_and_end_at_zero(length: int, gamma: float):
    g = torch.cat([returns.compute_returns(length, gamma).double(), torch.zeros(1)])
    torch.testing.assert_close(g[:-1], -(1 - gamma) + gamma * g[1:], rtol=1e-5, atol=1e-7)
    assert returns.length_to_value(torch.tensor(0), gamma) == 0.0
    assert (g.diff() >= 0).all()


@given(st.integers(1, 200), gammas)
def test_td_residuals_of_true_values_vanish(length: int, gamma: float):
    residuals = returns.compute_td_residuals(returns.compute_returns(length, gamma), gamma)
    assert residuals.abs().max() < 1e-6


def test_a_lengthening_token_has_a_negative_residual():
    gamma = 0.99
    values = returns.length_to_value(torch.tensor([10.0, 50.0, 49.0]), gamma)
    assert returns.compute_td_residuals(values, gamma)[0] < 0


@settings(max_examples=50)
@given(st.integers(1, 60), st.sampled_from([0.0, 0.5, 0.95, 1.0]), gammas, st.integers(0, 99))
def test_lambda_returns_match_the_recursion(length: int, lambda_: float, gamma: float, seed: int):
    values = -torch.rand(length, generator=torch.Generator().manual_seed(seed))
    expected, following, value_after = [], 0.0, 0.0
    for t in reversed(range(length)):
        following = -(1 - gamma) + gamma * ((1 - lambda_) * value_after + lambda_ * following)
        value_after = values[t].item()
        expected.append(following)
    found = returns.compute_lambda_returns(values, gamma, lambda_)
    torch.testing.assert_close(found, torch.tensor(expected[::-1]), rtol=1e-4, atol=1e-6)


def test_gamma_puts_the_99th_percentile_at_99_percent():
    lengths = list(range(1, 1001))
    gamma = returns.compute_gamma(lengths)
    assert 1 - gamma**991 == pytest.approx(0.99, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.5, math.nan, "0.9"])
def test_gamma_outside_0_1_is_refused(gamma: float):
    with pytest.raises(InputError, match="between 0 and 1"):
        returns.log_discount(gamma)


@pytest.mark.parametrize("lengths", [[], [0, 5]])
def test_gamma_needs_lengths(lengths: list[int]):
    with pytest.raises(InputError, match="at least 1 token"):
        returns.compute_gamma(lengths)


def test_a_value_of_minus_1_is_a_long_but_finite_length():
    values = torch.tensor([-1.0, -1.0 + 2.0**-24, -1.5])
    found = returns.value_to_length(values, 0.99)
    assert found[0] == found[1] > 1000
    assert found[2].isnan()  # no value at all


def test_lambda_outside_0_1_is_refused():
    with pytest.raises(InputError, match="lambda"):
        returns.compute_lambda_returns(torch.zeros(3), 0.9, 1.1)
