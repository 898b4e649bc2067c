"""Arm specifications: what parses, what is refused and how."""

import pytest

from lenvm.errors import InputError
from lenvm.evals.arms import Arm, parse_arms

KINDS = ["prompt", "soft", "hard", "tilt", "budget", "conditional"]


@pytest.mark.parametrize(
    ("text", "name", "parameter"),
    [
        ("prompt", "prompt", None),
        ("soft", "soft:100", 100.0),
        ("soft:30", "soft:30", 30.0),
        ("tilt:12.5", "tilt:12.5", 12.5),
        ("tilt:-0.25", "tilt:-0.25", -0.25),
        ("tilt:0", "tilt:0", 0.0),
        ("budget:200", "budget:200", 200.0),
        ("conditional:2 tolerance=0.05", "conditional:2 tolerance=0.05", 2.0),
        ("conditional horizon=none  strict=false", "conditional:1 horizon=none strict=false", 1.0),
        ("hard top_k=30", "hard top_k=30", None),
    ],
)
def test_arms_parse(text, name, parameter):
    arm = Arm.parse(text, KINDS)
    assert (arm.name, arm.parameter) == (name, parameter)
    assert Arm.parse(arm.name, KINDS) == arm


@pytest.mark.parametrize(
    "text",
    [
        "",
        "magic",
        "truncate",
        "hard:3",
        "tilt",
        "tilt:",
        "tilt:x",
        "tilt:inf",
        "budget:0",
        "budget:1.5",
        "prompt top_k=3",
        "hard 30",
        "hard top_k=x",
        "hard top_k=0",
        "hard top_k=3 top_k=4",
        "soft:3 equal_to=4",
        "soft:3 strength=4",
        "hard colour=1",
    ],
)
def test_other_arms_are_refused(text):
    with pytest.raises(InputError):
        Arm.parse(text, KINDS)


def test_one_arm_twice_is_refused():
    with pytest.raises(InputError, match=r"twice: soft:100"):
        parse_arms(["soft", "soft:100"], KINDS)


def test_no_arms_are_refused():
    with pytest.raises(InputError, match="no arms"):
        parse_arms([], KINDS)


def test_labels_name_the_number():
    assert Arm.parse("tilt:12.5", KINDS).label == "LenVM tilt 12.5"
    arm = Arm.parse("conditional:2 tolerance=0.05", KINDS)
    assert arm.label == "LenVM conditional, evidence 2, tolerance 0.05"
    assert arm.settings == (("tolerance", 0.05),)
    assert Arm.parse("hard", KINDS).label == "LenVM hard"


def test_settings_are_checked_with_the_goal_that_they_go_with():
    focus = "conditional:2 tolerance=0.15 focus=15"
    assert Arm.parse(focus, KINDS).name == focus
    with pytest.raises(InputError, match="focus with equal_to"):
        Arm.parse("at_most:20 focus=15", ["at_most"])


def test_a_price_takes_evidence_and_a_conditional_arm_is_its_evidence():
    arm = Arm.parse("price:0.02 evidence=5", ["price", "conditional"])
    assert (arm.parameter, arm.settings) == (0.02, (("evidence", 5),))
    with pytest.raises(InputError, match="'evidence=5' is no field=value"):
        Arm.parse("conditional:1 evidence=5", ["price", "conditional"])
