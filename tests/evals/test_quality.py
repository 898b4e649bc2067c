"""Quality measures on texts counted by hand."""

import pytest

from lenvm.evals.quality import (
    distinct,
    ends_at_sentence,
    measure_record,
    measure_text,
    repetition,
    split_words,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world!", ["Hello,", "world!"]),
        ("- one\n- two", ["one", "two"]),
        ("你好 world", ["你", "好", "world"]),
        ("苹果iPhone手机", ["苹", "果", "iPhone", "手", "机"]),
        ("it's 3.5 %", ["it's", "3.5"]),
        (" — … ", []),
        ("_ __", []),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def test_repetition_counts_four_grams_seen_before():
    # a b c d e f g h: 5 different 4-grams; repeated once: 13 4-grams, 8 different
    assert repetition(["a", "b", "c", "d", "e", "f", "g", "h"]) == 0
    assert repetition(("a b c d " * 3).split()) == pytest.approx(1 - 4 / 9)
    assert repetition(["a", "b", "c"]) == 0


def test_distinct():
    assert distinct(["a", "b", "a", "b"], 1) == 0.5
    assert distinct(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert measure_text("A a", "stop")["distinct_1"] == 0.5
    assert distinct([], 1) == 0


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Done.", True),
        ("Done.\n\n", True),
        ('He said "done."', True),
        ("**Done!**", True),
        ("(see above.)", True),
        ("结束了。”", True),
        ("Done", False),
        ("and then,", False),
        ("the steps:", False),
        ("```python\nx = 1\n```", True),
        ("x = 1\n```", False),
        ("", False),
    ],
)
def test_sentence_ends(text, ends):
    assert ends_at_sentence(text) is ends


def test_a_natural_end_needs_eos_and_a_sentence():
    assert measure_text("Done.", "stop")["natural_end"]
    assert not measure_text("Done.", "length")["natural_end"]
    assert not measure_text("Done", "stop")["natural_end"]


@pytest.mark.parametrize(
    ("finish_reason", "last", "likely"),
    [
        ("stop", -0.5, True),
        ("stop", -13.0, False),  # forced: the generator would not have ended here
        ("length", -0.5, False),
        ("stop", None, None),
    ],
)
def test_an_ending_is_likely_where_the_generator_gave_it_a_hundredth(finish_reason, last, likely):
    record = {
        "finish_reason": finish_reason,
        "mean_log_prob": -1.0,
        "last_log_prob": last,
        "error": None,
        "num_tokens": 4,
        "latency_s": 0.1,
    }
    assert measure_record(record, "Done.", answered=True)["likely_end"] is likely
    assert measure_record(record, "Done.", answered=False)["likely_end"] is None
