import math

import pytest

from lenvm.errors import ControlError
from lenvm.guidance.request import MAX_LENGTH, LengthControl


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"equal_to": 0}, "equal_to"),
        ({"equal_to": -5}, "equal_to"),
        ({"equal_to": 10**9}, "equal_to"),
        ({"equal_to": "many"}, "equal_to"),
        ({"equal_to": 1.5}, "equal_to"),
        ({"tilt": math.nan}, "tilt"),
        ({"tilt": math.inf}, "tilt"),
        ({"equal_to": 5, "rule": "magic"}, "rule"),
        ({"equal_to": 5, "top_k": 0}, "top_k"),
        ({"equal_to": 5, "top_p": 0}, "top_p"),
        ({"equal_to": 5, "tolerance": 1.0}, "tolerance"),
        ({"equal_to": 5, "lenght": 5}, "lenght"),
        ({}, "(whole)"),
        ({"equal_to": 5, "tilt": 1.0}, "(whole)"),
        ({"equal_to": 5, "at_most": 9}, "(whole)"),
        ({"at_least": 9, "at_most": 5}, "(whole)"),
        ("not json", "(whole)"),
        ("[1]", "(whole)"),
        (5, "(whole)"),
    ],
)
def test_bad_controls_name_field_value_and_what_is_allowed(value: object, field: str):
    with pytest.raises(ControlError, match="allowed") as caught:
        LengthControl.parse(value)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_json_dict_and_control_are_the_same():
    control = LengthControl.parse('{"equal_to": 100, "tolerance": 0.05}')
    assert control == LengthControl.parse({"equal_to": 100, "tolerance": 0.05})
    assert control == LengthControl.parse(control)
    assert control.interval() == (95, 105)


def test_intervals():
    assert LengthControl.parse({"at_most": 7}).interval() == (1, 7)
    assert LengthControl.parse({"at_least": 7}).interval() == (7, MAX_LENGTH)
    assert LengthControl.parse({"at_least": 3, "at_most": 7}).interval() == (3, 7)
