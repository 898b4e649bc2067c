"""The demo's page, from made-up numbers: goals reached or not, and a file that lacks a part."""

import json

import pytest

from lenvm.errors import DataError
from lenvm.reports.demo import build_demo_report, shortfalls
from reports.made_up import make_demo_summary, write_demo


def test_a_good_run_has_no_shortfalls_and_says_so_on_the_page(tmp_path):
    assert shortfalls(make_demo_summary()) == []
    text = build_demo_report(write_demo_folder(tmp_path)).read_text()
    assert "Reached." in text
    assert "Not reached." not in text
    assert "31% error" in text


def write_demo_folder(path, **changes):
    path.mkdir(exist_ok=True)
    return write_demo(path, **changes)


def test_what_was_not_reached_is_said(tmp_path):
    summary = make_demo_summary()
    bad = {
        "prediction": summary["prediction"] | {"mre": 0.5},
        "equal_to": summary["equal_to"]
        | {"guided": {"length_score": 40.0, "deviation": 0.4, "log_prob": -2.0}},
        "tilt": [{"scale": s, "mean_length": 100.0} for s in (-10.0, 0.0, 10.0)],
    }
    found = shortfalls(summary | bad)
    assert len(found) == 3
    assert "no better than a constant guess" in found[0]
    assert "gains 6 points" in found[1]
    assert (
        build_demo_report(write_demo_folder(tmp_path, **bad)).read_text().count("Not reached.") == 3
    )


def test_runs_without_log_probabilities_and_samples_still_have_a_page(tmp_path):
    equal = make_demo_summary()["equal_to"]
    for arm in ("guided", "unguided"):
        del equal[arm]["log_prob"]
    folder = write_demo_folder(tmp_path, equal_to=equal, samples=[])
    assert "Cost in text" not in build_demo_report(folder).read_text()


def test_a_summary_without_a_part_is_refused(tmp_path):
    folder = write_demo_folder(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["tilt"]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="lacks tilt"):
        build_demo_report(folder)
