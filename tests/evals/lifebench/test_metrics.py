"""LD and LS against values computed by hand from the benchmark's formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.errors import InputError
from lenvm.evals.lifebench.metrics import length_deviation, length_score


@pytest.mark.parametrize(
    ("length", "target", "deviation"),
    [(128, 128, 0.0), (64, 128, -0.5), (256, 128, 1.0), (0, 16, -1.0), (131, 128, 0.0234375)],
)
def test_length_deviation(length, target, deviation):
    assert length_deviation(length, target) == deviation


# exp(-0.5) = 0.60653066, exp(-2.5) = 0.0820850, exp(-0.2) = 0.81873075, exp(-2) = 0.13533528
@pytest.mark.parametrize(
    ("deviation", "equal_to", "at_most", "at_least"),
    [
        (0.0, 100, 100, 100),
        (-0.1, 60.653066, 100, 60.653066),
        (-0.5, 8.2084999, 100, 8.2084999),
        (-1.0, 0.67379470, 100, 0.67379470),
        (0.1, 81.873075, 81.873075, 100),
        (1.0, 13.533528, 13.533528, 100),
    ],
)
def test_length_score(deviation, equal_to, at_most, at_least):
    assert length_score(deviation, "equal_to") == pytest.approx(equal_to, rel=1e-6)
    assert length_score(deviation, "at_most") == pytest.approx(at_most, rel=1e-6)
    assert length_score(deviation, "at_least") == pytest.approx(at_least, rel=1e-6)


@given(st.floats(-1, 20), st.sampled_from(["equal_to", "at_most", "at_least"]))
def test_scores_lie_between_0_and_100_and_no_rule_is_below_equal_to(deviation, constraint):
    assert 0 <= length_score(deviation, "equal_to") <= length_score(deviation, constraint) <= 100


def test_a_target_below_one_is_refused():
    with pytest.raises(InputError, match="target is 0"):
        length_deviation(5, 0)
