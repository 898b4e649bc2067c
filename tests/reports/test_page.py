"""The skeleton of a page: escaping, JSON in scripts, no reference to anything outside."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from lenvm.reports.page import Html, build_page, embed_json, escape, join, panel, section
from lenvm.reports.tables import table

NASTY = ["</script><script>alert(1)</script>", "<!--", "\u2028", "&amp;", "مرحبا", "🙂", "\ud800"]


def test_no_token_can_end_the_script_or_become_markup():
    element = embed_json({"tokens": NASTY[:-1]})
    assert element.count("</script>") == 1
    body = element.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in body
    assert json.loads(body) == {"tokens": NASTY[:-1]}


@given(st.text())
def test_no_text_becomes_markup(text):
    assert not re.search(r"[<>\"']", escape(text))
    escape(text).encode()  # no lone surrogates
    embed_json(text).encode()


def test_what_is_html_already_is_not_escaped_twice_and_what_is_added_is():
    assert Html("<b>") + "<i>" == "<b>&lt;i&gt;"
    assert escape(Html("<b>")) == "<b>"
    assert isinstance(join(Html("a"), Html("b")), Html)


def test_control_characters_are_pictures():
    assert escape("\x1b[0m\x00") == "␛[0m␀"


def test_the_page_is_one_file_without_outside_references():
    page = build_page("A <title>", "lead & more", table(["a", "b"], [["<x>", 1.5], ["y", None]]))
    assert "A &lt;title&gt;" in page
    assert "&lt;x&gt;" in page
    assert not re.search(r"(src|href)=(?!\"#)|https?://(?!www\.w3\.org)|@import|url\(", page)


def test_panels_and_sections_escape_their_titles():
    assert "<h2><span" in panel("Why <b>?", Html("x"), number=1)
    assert "&lt;b&gt;" in panel("Why <b>?", Html("x"), number=1)
    assert '<section id="&quot;">' in section("t", Html("x"), anchor='"')
