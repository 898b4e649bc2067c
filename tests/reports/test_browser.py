"""The pages in a real browser: offline, light and dark, wide and narrow, by mouse and keyboard.

Skipped only where there is no browser. LENVM_SCREENSHOTS=FOLDER keeps the pictures.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lenvm.reports.report import build_report
from reports.made_up import make_trace, write_demo, write_jsonl

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE, NARROW = (1280, 860), (390, 844)
PAPER = {"light": (247, 247, 245), "dark": (18, 20, 23)}
CONTRAST = """() => {
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const channel = (c) => linear(c / 255);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest(".skip")) continue;
    const behind = [];
    for (let n = node; n; n = n.parentElement) behind.unshift(getComputedStyle(n).backgroundColor);
    const back = over(behind);
    const front = over([...behind, getComputedStyle(node).color]);
    const [a, b] = [light(back), light(front)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${node.className || node.tagName}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
}"""


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(everything, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    (root / "demo").mkdir()
    found = {
        "everything": build_report([everything], root / "everything.html"),
        "demo": build_report([write_demo(root / "demo")]),
    }
    nasty = ["</script>", "<b>", "\n", "\t", " مرحبا", "\u202eevil", "🙂", "\\", "`", "", "end"]
    write_jsonl(root / "nasty.jsonl", [make_nasty(nasty)])
    return found | {"nasty": build_report([root / "nasty.jsonl"])}


def make_nasty(tokens: list[str]) -> dict:
    count = len(tokens)
    rest = [float(count - t) for t in range(count + 1)]
    return {
        **make_trace("math"),
        "tokens": tokens,
        "token_ids": list(range(count)),
        "values": [0.99**n - 1 for n in rest],
        "remaining_predicted": rest,
        "remaining_low": None,
        "remaining_high": None,
        "remaining_true": list(range(count, -1, -1)),
    }


@pytest.fixture
def open_page(browser, pages) -> Iterator:
    """(name, size, theme) -> a page without a network; complaints of the browser fail the test."""
    contexts, complaints = [], []

    def open_(name: str, size: tuple[int, int] = WIDE, theme: str = "light"):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=theme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def take(page, name: str, **options) -> bytes:
    picture = page.screenshot(**options)
    if folder := os.environ.get("LENVM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(picture)
    return picture


def pixels(picture: bytes):
    import io

    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        return image.convert("RGB").copy()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["everything", "demo", "nasty"])
def test_pages_look_right_in_light_and_dark(open_page, name, theme):
    page = open_page(name, WIDE, theme)
    image = pixels(take(page, f"{name}-{theme}"))
    assert image.getpixel((3, 3)) == PAPER[theme]
    assert len(image.getcolors(1 << 24)) > 100  # charts and type, not a blank page
    assert page.evaluate("document.documentElement.scrollWidth") == WIDE[0]
    take(page, f"{name}-{theme}-whole", full_page=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_contrast(open_page, theme):
    for name in ("everything", "demo"):
        page = open_page(name, WIDE, theme)
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("name", ["everything", "demo", "nasty"])
def test_pages_fit_a_telephone(open_page, name):
    page = open_page(name, NARROW)
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW[0]
    take(page, f"{name}-narrow", full_page=True)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW[0]
    box = page.locator(".headline strong").first
    if box.count():
        assert box.bounding_box()["width"] <= NARROW[0]


def test_the_three_answers_stand_on_the_first_screen(open_page):
    page = open_page("everything")
    for number in page.locator(".headline strong").all():
        box = number.bounding_box()
        assert box["y"] + box["height"] < WIDE[1]
    assert page.locator(".panel .headline strong").count() == 3


def test_pointing_at_a_token_shows_its_numbers_and_marks_the_curve(open_page):
    page = open_page("demo")
    token = page.locator('.tokens span[data-step="5"]').first
    token.hover()
    readout = page.locator(".readout").first
    assert "5 of 129" in readout.inner_text()
    trace = make_trace("math")
    assert str(round(trace["remaining_predicted"][5])) in readout.inner_text()
    assert re.search(r"true\n+124", readout.inner_text())
    assert page.locator(".pin.main").first.is_visible()
    assert "on" in token.get_attribute("class")


def test_the_keyboard_moves_through_the_tokens(open_page):
    page = open_page("demo")
    page.locator(".tokens span").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "11 of 129" in page.locator(".readout").first.inner_text()
    page.keyboard.press("End")
    assert "129 of 129" in page.locator(".readout").first.inner_text()


def test_longer_and_shorter_have_their_own_colours_and_legend(open_page):
    page = open_page("demo")
    page.get_by_role("button", name="Longer or shorter").click()
    tones = page.locator(".tokens").first.locator("span[data-tone]")
    assert {t.get_attribute("data-tone") for t in tones.all()} == {"longer", "shorter"}
    assert page.get_by_text("makes it longer").is_visible()
    assert not page.get_by_text("tokens predicted to come").is_visible()
    take(page, "demo-gain")


def test_two_models_of_one_answer_move_together(open_page):
    page = open_page("everything")
    assert page.locator("article.trace:visible").count() == 2
    page.locator('article.trace:visible .tokens span[data-step="7"]').first.hover()
    texts = page.locator("article.trace:visible .readout").all_inner_texts()
    assert all("7 of 129" in text for text in texts)
    assert texts[0] != texts[1]
    page.get_by_role("button", name="Side by side").click()
    assert page.locator("article.trace:visible").count() == 1


def test_every_token_is_shown_as_text(open_page):
    page = open_page("nasty")
    shown = page.locator(".tokens span").all_text_contents()[1:]
    assert shown == [
        *("</script>", "<b>", "⏎\n", "⇥\t", " مرحبا", "⟨202E⟩evil", "🙂", "\\", "`", "⋯", "end")
    ]
    assert page.locator(".tokens b").count() == 0
    boxes = [span.bounding_box() for span in page.locator(".tokens span").all()]
    assert boxes[2]["x"] > boxes[1]["x"]  # a line of Latin letters runs from left to right
    assert boxes[5]["x"] < boxes[4]["x"]  # one that begins in Arabic from right to left


def test_the_theme_button_turns_the_page_about(open_page):
    page = open_page("demo")
    page.get_by_role("button", name="Dark").click()
    assert pixels(page.screenshot()).getpixel((3, 3)) == PAPER["dark"]
    assert page.get_by_role("button", name="Light").is_visible()


def test_dots_say_what_they_are(open_page):
    page = open_page("everything")
    dot = page.locator("[data-tip*='LenVM hard']").first
    dot.scroll_into_view_if_needed()
    dot.dispatch_event("pointerover", {"bubbles": True})
    assert "LenVM hard" in page.locator("#tip").inner_text()


def test_without_scripts_the_answers_and_the_text_can_be_read(browser, pages):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(pages["demo"].as_uri())
    assert "31% error" in page.locator(".headline").first.inner_text()
    assert "Janet sells" in page.locator(".tokens").first.inner_text()
    context.close()
