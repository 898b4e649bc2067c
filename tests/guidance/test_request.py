import json
import math

import pytest

from lenvm.errors import ControlError
from lenvm.guidance import request
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
        ({"value_at_least": 0.9, "value_at_most": 0.5}, "(whole)"),
        ({"equal_to": 5, "expected_scale": 1.0}, "(whole)"),
        ({"tilt": 1.0, "tilt_logit": 1.0}, "(whole)"),
        ({"tilt": 1.0, "rule": "hard"}, "(whole)"),
        ({"tilt": 1.0, "remaining": True}, "(whole)"),
        ({"equal_to": -1}, "equal_to"),
        ({"equal_to": math.nan}, "equal_to"),
        ({"equal_to": "128"}, "equal_to"),
        ({"equal_to": True}, "equal_to"),
        ({"equal_to": [128]}, "equal_to"),
        ({"at_most": 0}, "at_most"),
        ({"at_least": 131_073}, "at_least"),
        ({"tilt": "strong"}, "tilt"),
        ({"tilt": 1e9}, "tilt"),
        ({"expected_scale": -0.1}, "expected_scale"),
        ({"expected_scale": 0.5, "expected_mode": "add"}, "expected_mode"),
        ({"value_equal_to": 1.0}, "value_equal_to"),
        ({"equal_to": 5, "strength": -1}, "strength"),
        ({"equal_to": 5, "evidence": 101}, "evidence"),
        ({"equal_to": 5, "horizon": 0}, "horizon"),
        ({"shortest": 1.0}, "shortest"),
        ({"shortest": 0.3, "at_most": 50}, "(whole)"),
        ({"shortest": 0.3, "rule": "soft"}, "(whole)"),
        ({"price": 0}, "price"),
        ({"price": 1.5}, "price"),
        ({"price": 0.1, "tilt": 1.0}, "(whole)"),
        ({"price": 0.1, "equal_to": 5}, "(whole)"),
        ({"price": 0.1, "at_most": 5, "rule": "soft"}, "(whole)"),
        ({"price": 0.1, "rule": "hard"}, "(whole)"),
        ({"equal_to": 5, "focus": -1}, "focus"),
        ({"at_most": 5, "focus": 10}, "(whole)"),
        ({"equal_to": 5, "focus": 10, "rule": "soft"}, "(whole)"),
        ({"equal_to": 5, "gamma": 1.0}, "gamma"),
        ({"equal_to": 5, "strict": 1}, "strict"),
        ({"equal_to": 5, "top_k": 257}, "top_k"),
        ({"equal_to": 5, "min_p": 1}, "min_p"),
        ({"equal_to": 5, "min_entropy": -1}, "min_entropy"),
        ({"equal_to": 5, "min_value": 1}, "min_value"),
        ({"equal_to": 5, "token_temperature": {"the": 2.0}}, "token_temperature"),
        ({"equal_to": 5, "token_temperature": {"-3": 2.0}}, "token_temperature"),
        ({"equal_to": 5, "token_temperature": {"3": 0}}, "token_temperature.3"),
        ({"equal_to": 5, "token_temperature": {str(i): 1 for i in range(65)}}, "token_temperature"),
        ("[" * 100_000, "(whole)"),
        ('{"equal_to": NaN}', "equal_to"),
        (None, "(whole)"),
        ("not json", "(whole)"),
        ("[1]", "(whole)"),
        (5, "(whole)"),
    ],
)
def test_bad_controls_name_field_value_and_what_is_allowed(value: object, field: str):
    with pytest.raises(ControlError, match="allowed") as caught:
        LengthControl.parse(value)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            {"at_least": 50, "at_most": 20},
            "length control is {'at_least': 50, 'at_most': 20}; allowed: at_least up to at_most "
            "(50 > 20)",
        ),
        ({"equal_to": 0}, "length control: equal_to is 0; allowed: greater than or equal to 1"),
        ("[", "length control is '['; allowed: a JSON object such as {\"equal_to\": 128}"),
        (
            {"tilt": 1, "rule": "soft"},
            "length control is {'tilt': 1, 'rule': 'soft'}; allowed: rule with a length or a value "
            "to meet, not with a tilt or scale",
        ),
    ],
)
def test_what_is_called_allowed_is_what_is_allowed(value: object, says: str):
    with pytest.raises(ControlError) as caught:
        LengthControl.parse(value)  # type: ignore[arg-type]
    assert str(caught.value) == says


def test_json_dict_and_control_are_the_same():
    control = LengthControl.parse('{"equal_to": 100, "tolerance": 0.05}')
    assert control == LengthControl.parse({"equal_to": 100, "tolerance": 0.05})
    assert control == LengthControl.parse(control)
    assert control.interval() == (95, 105)


@pytest.mark.parametrize(
    ("target", "tolerance", "interval"),
    [
        (100, 0.29, (71, 129)),
        (100, 0.57, (43, 157)),
        (100, 0.299, (71, 129)),
        (7, 0.1, (7, 7)),
        (100, 1e-5, (100, 100)),
        (100, 0, (100, 100)),
    ],
)
def test_a_tolerance_is_the_share_that_is_written(target, tolerance, interval):
    assert LengthControl(equal_to=target, tolerance=tolerance).interval() == interval


def test_every_tolerance_in_percent_is_exact():
    for target in (50, 100, 128, 1000):
        for percent in range(100):
            low, high = LengthControl(equal_to=target, tolerance=percent / 100).interval()
            slack = percent * target // 100
            assert (low, high) == (max(1, target - slack), target + slack)


def test_intervals():
    assert LengthControl.parse({"at_most": 7}).interval() == (1, 7)
    assert LengthControl.parse({"at_least": 7}).interval() == (7, MAX_LENGTH)
    assert LengthControl.parse({"at_least": 3, "at_most": 7}).interval() == (3, 7)


def test_an_unknown_rule_is_refused_with_what_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(request, "installed_rules", lambda: {"mine": None})
    assert LengthControl.parse({"equal_to": 5, "rule": "mine"}).rule == "mine"
    with pytest.raises(ControlError, match=r"soft.*installed rules: mine"):
        LengthControl.parse({"equal_to": 5, "rule": "os:system"})


def test_token_ids_survive_json():
    control = LengthControl.parse('{"tilt": 0, "token_temperature": {"17": 2}}')
    assert control.token_temperature == {17: 2.0}
    dumped = json.dumps(control.model_dump(exclude_defaults=True))
    assert LengthControl.parse(dumped) == control


def test_goals_that_count_no_tokens_have_the_whole_interval():
    for goal in ({"tilt": 1}, {"value_equal_to": 0.5}, {"expected_scale": 2}):
        assert LengthControl.parse(goal).interval() == (1, MAX_LENGTH)
