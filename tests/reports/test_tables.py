"""How numbers are written; tables and bars."""

import pytest

from lenvm.reports.page import Html
from lenvm.reports.tables import (
    DASH,
    MINUS,
    Bar,
    bars,
    estimate,
    format_fixed,
    format_number,
    format_pace,
    format_percent,
    format_signed,
    read_bounds,
    table,
)


@pytest.mark.parametrize(
    ("x", "text"),
    [(None, DASH), (12, "12"), (1234.4, "1,234"), (0.12345, "0.123"), (-3, MINUS + "3"), (0, "0")],
)
def test_numbers(x, text):
    assert format_number(x) == text


@pytest.mark.parametrize(
    ("x", "text"), [(0.333, "33%"), (0.0312, "3.1%"), (2.56, "256%"), (0, "0%"), (None, DASH)]
)
def test_percent(x, text):
    assert format_percent(x) == text


def test_signs_digits_and_times():
    assert format_signed(0.5) == "+0.50"
    assert format_percent(-0.051, signed=True) == MINUS + "5.1%"
    assert format_fixed(-0.936) == MINUS + "0.94"
    assert (format_pace(9.04), format_pace(123.4), format_pace(None)) == ("9.0", "123", DASH)


def test_an_estimate_shows_its_interval_and_none_is_a_dash():
    text = estimate({"value": 0.5, "low": 0.4, "high": 0.6}, format_percent)
    assert text == '50% <span class="interval">40% to 60%</span>'
    assert estimate(None) == DASH
    assert estimate({"value": 0.5, "low": None, "high": None}, format_percent) == "50%"
    assert read_bounds({"value": 0.5, "low": None, "high": None}) == (0.5, 0.5)


def test_cells_are_escaped_unless_they_are_html():
    text = table(["<a>"], [["<b>"], [Html("<i>c</i>")]])
    assert "&lt;a&gt;" in text
    assert "&lt;b&gt;" in text
    assert "<i>c</i>" in text


def test_bars_are_as_long_as_their_share():
    text = bars("t", [Bar("half", 50.0, "50", low=40.0, high=60.0), Bar("none", None, DASH)], 100)
    assert "width:50.00%" in text
    assert "left:40.00%;width:20.00%" in text
    assert text.count('class="bar ') == 1
