"""Charts: scales, ticks, marks where they belong, labels that do not meet."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.reports.charts import Axis, Chart


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=9))
def test_everything_has_room_on_a_fitted_axis(values):
    axis = Axis.fit(values, "x")
    assert all(axis.low <= v <= axis.high for v in values)
    assert all(0 <= axis.place(v) <= 1 for v in values)


def test_places_are_linear_or_logarithmic():
    assert Axis(0, 200, "x").place(50) == 0.25
    assert Axis(1, 100, "x", log=True).place(10) == pytest.approx(0.5)
    assert Axis(0, 10, "x").place(99) == 1  # outside: at the edge


def test_ticks_are_round_and_whole_where_asked():
    assert Axis(0, 100, "x").ticks(4) == [0, 25, 50, 75, 100]
    assert Axis(0, 2, "x").ticks(4) == [0, 0.5, 1, 1.5, 2]
    assert Axis(0, 2, "x", whole=True).ticks(4) == [0, 1, 2]
    assert Axis(80, 1200, "x", log=True).ticks() == [100, 300, 1000]
    named = Axis(-0.5, 1.5, "x", marks=(0, 1), names=("0.5B", "7B"))
    assert [named.write(t) for t in named.ticks()] == ["0.5B", "7B"]


def test_no_values_still_make_an_axis():
    assert Axis.fit([], "x").high > Axis.fit([], "x").low
    assert Axis.fit([float("nan"), 3.0], "x").high > 3


def test_charts_escape_and_place():
    chart = Chart(Axis(0, 10, "x <label>"), Axis(0, 100, "y"))
    chart.line([(0, 0), (10, 100)], "main")
    chart.dot(5, 50, "main", "<dot>")
    html = chart.html("a <chart>")
    assert "<label>" not in html
    assert "<chart>" not in html
    assert "&lt;dot&gt;" in html
    assert 'points="0.0,1000.0 1000.0,0.0"' in html
    assert "M500.0,500.0h" in html


def test_a_long_line_is_thinned_and_keeps_its_ends():
    chart = Chart(Axis(0, 9999, "x"), Axis(0, 1, "y"))
    chart.line([(i, 0.5) for i in range(10_000)], "main")
    points = re.search(r'points="([^"]+)"', chart.html("x"))[1].split()
    assert len(points) <= 1201
    assert (points[0], points[-1]) == ("0.0,500.0", "1000.0,500.0")


def test_labels_of_near_points_stand_below_each_other():
    chart = Chart(Axis(0, 1, "x"), Axis(0, 1, "y"))
    chart.name_points([(0.2, 0.5, "a"), (0.21, 0.5, "b"), (0.22, 0.49, "c"), (0.9, 0.5, "far")])
    tops = [float(t) for t in re.findall(r"top:([\d.]+)%\">(?:a|b|c)<", chart.html("x"))]
    assert min(b - a for a, b in itertools.pairwise(tops)) >= 7
    assert all(0 <= t <= 97 for t in tops)
    assert 'at  left" style="left:90.00%;top:50.00%">far' in chart.html("x")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=8))
def test_labels_stay_above_the_foot_of_the_plot_and_apart(points):
    chart = Chart(Axis(0, 1, "x"), Axis(0, 1, "y"))
    chart.name_points([(0.5, y, f"n{i}") for i, (_, y) in enumerate(points)])
    tops = sorted(float(t) for t in re.findall(r"top:([\d.]+)%\">n", chart.html("x")))
    assert all(t <= 97 for t in tops)
    assert all(b - a > 7.4 for a, b in itertools.pairwise(tops))
