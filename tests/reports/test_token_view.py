"""The token view's HTML and data: names, side by side, colours, images, what stays text."""

import json
import re

import pytest

from lenvm.errors import DataError
from lenvm.reports.token_view import name_traces, token_view
from lenvm.reports.traces import TokenTrace
from reports.made_up import PROMPTS, make_trace

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 16


def made(domain="math", **about) -> TokenTrace:
    return TokenTrace.model_validate(make_trace(domain, **about))


def data_of(html: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])


def test_names_tell_what_differs():
    assert name_traces([made(model="a"), made(model="b")]) == ["a", "b"]
    assert name_traces([made(model="a", control={"equal_to": 60}), made(model="a")]) == [
        "equal to 60",
        "Janet's ducks lay 16 eggs per day…",
    ]
    assert name_traces([made(), made()])[1].endswith("(2)")


def test_the_same_tokens_of_two_models_start_side_by_side_on_one_scale():
    one, two = made(model="a"), made(model="b", bias=2.0)
    other = made("code", model="a")
    html = token_view([one, other, two.model_copy(update={"token_ids": one.token_ids})])
    assert re.findall(r'aria-pressed="(\w+)">(?:a|b) ', html) == ["true", "false", "true"]
    tops = re.findall(r'data-y="([\d.]+)"', html)
    assert tops[0] == tops[2] != tops[1]


def test_colours_grow_with_value_and_turn_with_the_sign():
    (row,) = data_of(token_view([made()]))
    order = sorted(range(len(row["predicted"])), key=lambda t: row["predicted"][t])
    shades = [row["remainingShade"][t] for t in order]
    assert shades == sorted(shades)
    assert all((g > 0) == (s > 0) for g, s in zip(row["gain"], row["gainShade"], strict=True) if s)
    assert "makes it longer" in token_view([made()])


def test_numbers_are_those_of_the_trace():
    trace = made()
    (row,) = data_of(token_view([trace]))
    assert row["predicted"] == [round(p, 1) for p in trace.remaining_predicted]
    assert row["true"] == trace.remaining_true
    assert len(row["tokens"]) + 1 == len(row["value"])


def test_every_token_is_text_in_markup_and_in_json():
    nasty = ["</script>", "<img src=x onerror=alert(1)>", "<!--", "\u2028", "\u202e", "\n", '"']
    n = len(nasty)
    row = {
        "schema": "lenvm.trace/1",
        "prompt": "<b>",
        "tokens": nasty,
        "token_ids": list(range(n)),
        "gamma": 0.9,
        "values": [-0.5] * n + [0.0],
        "remaining_predicted": [3.0] * n + [0.0],
    }
    html = token_view([TokenTrace.model_validate(row)])
    assert html.count("<script") == html.count("</script>") == 1
    assert "<img" not in html
    assert "<b>" not in html
    assert "\u202e" not in html
    assert data_of(html)[0]["tokens"][0] == "</script>"


def test_a_long_token_is_shown_whole():
    """Fault 12: tokens were cut after some characters."""
    long = "supercalifragilistic" * 20
    trace = made()
    view = token_view([trace.model_copy(update={"tokens": [long, *trace.tokens[1:]]})])
    assert view.count(long) >= 3  # the text, its data, the Markdown table


def test_an_answer_that_was_cut_off_says_so():
    assert "the true length is not known" in token_view([made(cut=True)])


def test_the_markdown_table_is_inside():
    assert "| step | token | value | predicted | true | relative error |" in token_view([made()])


def test_images_of_the_prompt_are_inside(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    html = token_view([made(images=["a.png"])], folder=tmp_path)
    assert 'src="data:image/png;base64,' in html


@pytest.mark.parametrize(("name", "message"), [("none.png", "none.png"), ("x.txt", "no image")])
def test_images_that_cannot_be_shown_are_named(tmp_path, name, message):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(DataError, match=message):
        token_view([made(images=[name])], folder=tmp_path)


def test_prompts_are_short_in_names():
    assert max(map(len, name_traces([made(d) for d in PROMPTS]))) < 60
