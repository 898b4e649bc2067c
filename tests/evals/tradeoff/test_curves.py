"""Curves, areas and pass@k against values computed by hand."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.errors import InputError
from lenvm.evals.bootstrap import Estimate
from lenvm.evals.tradeoff.curves import (
    Point,
    accuracy_at,
    area_between,
    group_curves,
    pareto_front,
    pass_at_k,
)


def point(arm: str, length: float, accuracy: float) -> Point:
    return Point(
        arm, Estimate(length, np.array([length] * 3)), Estimate(accuracy, np.array([accuracy] * 3))
    )


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    answers = [i < c for i in range(n)]
    by_hand = np.mean([any(subset) for subset in combinations(answers, k)])
    assert pass_at_k(n, c, k) == pytest.approx(by_hand)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_of_nonsense_is_refused(n, c, k):
    with pytest.raises(InputError):
        pass_at_k(n, c, k)


def test_the_front_holds_what_nothing_beats():
    points = [
        point("full", 300, 0.75),
        point("good", 200, 0.70),
        point("bad", 220, 0.50),
        point("short", 50, 0.06),
        point("longer and worse", 400, 0.70),
        point("as long as good, worse", 200, 0.60),
    ]
    assert pareto_front(points) == ["short", "good", "full"]
    assert pareto_front([]) == []


def test_area_between_two_curves_by_hand():
    # tilt: straight from (100, .5) to (300, .75); budget: (100, .0) to (300, .75)
    full = point("prompt", 300, 0.75)
    curves = group_curves(
        {"tilt": [point("t", 100, 0.5)], "budget": [point("b", 100, 0.0)], "none": []}, full
    )
    assert list(curves) == ["tilt", "budget"]
    low, high, area = area_between(curves["tilt"], curves["budget"])
    assert (low, high) == (100, 300)
    assert area.value == pytest.approx(0.25)  # a triangle of width 200 and height 0.5, over 200
    assert area.samples == pytest.approx([0.25] * 3)


def test_areas_are_taken_where_both_curves_reach():
    full = point("prompt", 300, 0.8)
    one, two = [point("a", 200, 0.6), full], [point("b", 100, 0.2), full]
    low, high, area = area_between(one, two)
    # on [200, 300]: one goes .6 -> .8, two .5 -> .8: mean gap 0.05
    assert (low, high, area.value) == (200, 300, pytest.approx(0.05))
    assert area_between([full], [full]) is None


def test_accuracy_at_a_length_is_read_off_the_line_and_nowhere_else():
    curve = [point("a", 100, 0.5), point("b", 300, 0.7)]
    assert accuracy_at(curve, Estimate(200, np.array([200.0] * 3))).value == pytest.approx(0.6)
    assert accuracy_at(curve, Estimate(50, np.array([50.0] * 3))) is None
    assert accuracy_at([], Estimate(50, np.array([50.0] * 3))) is None


def test_a_narrow_common_range_has_no_area():
    """One arm of a family, a little shorter than the unguided one: a gap between two points."""
    full = point("full", 70, 0.5)
    near, far = point("near", 68, 0.6), point("far", 30, 0.4)
    low, high, area = area_between([near, full], [far, full])
    assert (low, high, area.to_json()) == (68, 70, None)
    low, high, area = area_between([point("wide", 66, 0.6), full], [far, full])
    assert area.to_json() is not None


def test_an_area_of_few_prompts_has_no_bounds():
    few = Estimate(0.5, np.array([0.5] * 3), 2)
    one = [Point("a", point("", 30, 0).length, few), point("full", 70, 0.5)]
    area = area_between(one, [point("b", 20, 0.3), point("full", 70, 0.5)])[2]
    assert area.to_json()["value"] > 0
    assert area.to_json()["low"] is None
