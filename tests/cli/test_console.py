"""Progress as it is read in a log: counts, rates and time left, of this run alone."""

from types import SimpleNamespace

import pytest

from lenvm.cli import _console


def set_clock(monkeypatch, *times):
    """The console's own clock: the process's is also read by threads of other tests."""
    clock = SimpleNamespace(monotonic=iter(times).__next__)
    monkeypatch.setattr(_console, "time", clock)


def test_rate_and_time_left_do_not_count_what_was_there(monkeypatch, capsys):
    set_clock(monkeypatch, 0.0, 10.0, 40.0)
    with _console.stages() as progress:
        progress("sample", 600, 1000)
        progress("sample", 650, 1000)  # within 15 s of the last line: not printed
        progress("sample", 800, 1000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "sample: 600/1000"
    assert second == "sample: 800/1000 5.00/s, 40 s left"


def test_a_stage_that_ends_is_always_printed(monkeypatch, capsys):
    set_clock(monkeypatch, 0.0, 1.0)
    with _console.stages() as progress:
        progress("train", 0, 4)
        progress("train", 4, 4)
    assert capsys.readouterr().err.splitlines() == ["train: 0/4", "train: 4/4 4.00/s, 0 s left"]


@pytest.mark.parametrize("done", [0, 7])
def test_a_bar_on_a_terminal_starts_where_the_run_does(monkeypatch, capsys, done):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with _console.stages() as progress:
        progress("sample", done, 10)
        progress("sample", 10, 10)
    assert "10/10" in capsys.readouterr().err
