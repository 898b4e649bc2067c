import json
import re

from lenvm.reports.page import Chart, bars, build_page, embed_json, table


def test_no_token_can_end_the_script_or_become_markup():
    nasty = {
        "tokens": ["</script><script>alert(1)</script>", "<!--", "\u2028", "&amp;", "مرحبا", "🙂"]
    }
    element = embed_json(nasty)
    assert element.count("</script>") == 1
    body = element.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in body
    assert json.loads(body) == nasty


def test_the_page_is_one_file_without_outside_references():
    page = build_page("A <title>", "lead & more", table(["a", "b"], [["<x>", 1.5], ["y", None]]))
    assert "A &lt;title&gt;" in page
    assert "&lt;x&gt;" in page
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|@import|url\(", page)


def test_charts_escape_and_scale():
    chart = Chart(10, 100, "x <label>", "y")
    chart.line([(0, 0), (10, 100)], "main")
    chart.dot(5, 50, "<dot>")
    svg = chart.svg("a chart")
    assert "<label>" not in svg
    assert "&lt;dot&gt;" in svg
    assert f"{chart.x(10):.1f},{chart.y(100):.1f}" in svg
    assert 'width="220.0"' in bars([("half", 50.0, "main")], 100, "")
