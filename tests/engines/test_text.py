import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.engines.text import TextStream


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text())
def test_pieces_add_up_to_the_whole(text: str):
    stream = TextStream(decode_bytes)
    for token in text.encode():
        stream.push(token)
        assert text.startswith(stream.settled)
    stream.finish()
    assert stream.text == text


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_stop_and_nothing_of_a_stop_is_settled(text, stops):
    stream = TextStream(decode_bytes, stops)
    for token in text.encode():
        before = stream.settled
        stream.push(token)
        assert stream.settled.startswith(before)
        if stream.stopped:
            break
    stream.finish()
    ends = [text.find(s) for s in stops if s in text]
    assert stream.stopped == bool(ends)
    if not ends:
        assert stream.text == text
    else:
        # the stop that is complete first ends the text, where it begins
        first = min(text.find(s) + len(s) for s in stops if s in text)
        assert stream.text == text[: min(text[:first].find(s) for s in stops if s in text[:first])]


@pytest.mark.parametrize("stop", ["", "end"])
def test_bytes_that_are_no_text_are_shown_as_such(stop: str):
    stream = TextStream(decode_bytes, [stop] if stop else [])
    for token in [65, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 66]:
        stream.push(token)
    stream.finish()
    assert stream.text.startswith("A\ufffd")
    assert stream.text.endswith("B")
