"""The live page in a real browser: load, generate, stop, an error, a saved run."""

import json
import re
import shutil
import subprocess
import time

import pytest

from serving import serving, settle, tiny_engine

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def slow_client():
    engine = tiny_engine()
    step = engine.step

    def slowed():
        time.sleep(0.01)
        return step()

    engine.step = slowed
    with serving(engine) as client:
        yield client


@pytest.fixture
def page(browser, slow_client):
    """The page, loaded. Nothing may be asked of another machine, nor said on the console."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1000, "height": 800})
    found = context.new_page()
    base, foreign, said = str(slow_client.base_url), [], []
    found.on(
        "request",
        lambda r: None if r.url.startswith((base, "data:", "blob:")) else foreign.append(r.url),
    )
    found.on("console", lambda m: said.append(m.text))
    found.on("pageerror", lambda e: said.append(str(e)))
    found.goto(base)
    sync_api.expect(found.locator("#model")).to_have_text("tiny")
    yield found
    context.close()
    assert foreign == []
    assert [s for s in said if "status of 4" not in s] == []


def set_form(page, *, prompt="w7 w8 w9", number=30, goal="equal_to", most=120):
    page.fill("#prompt", prompt)
    page.check(f'input[value="{goal}"]', force=True)
    page.fill("#number", str(number))
    page.evaluate("n => document.getElementById('max_tokens').value = n", most)


def test_two_answers_run_side_by_side_to_the_length_asked_for(page, slow_client):
    set_form(page)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#share:not([hidden])")
    guided = page.locator(".answer.guided")
    assert guided.locator(".figure").inner_text() == "30 tokens"
    assert guided.locator(".verdict").inner_text() == "exactly 30"
    assert page.locator(".answer.free").count() == 1
    assert page.locator("path.line").count() == 2
    colours = guided.locator(".tokens span").evaluate_all(
        "spans => spans.map(s => s.style.getPropertyValue('--much'))"
    )
    assert len([c for c in colours if c.endswith("%")]) == 30
    assert "30 tokens, exactly 30" in page.locator("#status").inner_text()
    guided.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert guided.locator(".detail").inner_text().startswith("2 tokens, about ")
    page.wait_for_selector("line.cursor", state="attached")
    settle(slow_client)


def test_a_run_can_be_stopped(page, slow_client):
    set_form(page, goal="at_least", number=300, most=400)
    page.click("#go")
    page.wait_for_selector(".answer.guided .tokens span:nth-child(6)", state="attached")
    early = page.locator("path.line.guided").get_attribute("d")
    page.wait_for_selector(".answer.guided .tokens span:nth-child(20)", state="attached")
    assert page.locator("path.line.guided").get_attribute("d").count("L") > early.count("L")
    assert "more expected" in page.locator(".answer.guided .figure").inner_text()
    page.keyboard.press("Escape")
    page.wait_for_selector("#share:not([hidden])")
    page.wait_for_selector(".answer.guided .verdict:has-text('stopped')")
    assert page.locator("#error").is_hidden()
    settle(slow_client, 3.0)


def test_an_error_is_shown_and_the_form_works_again(page):
    set_form(page, prompt="w7 " * 600)
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert "602 tokens; allowed: up to 511" in page.locator("#error").inner_text()
    assert page.locator("#run").is_hidden()
    set_form(page, number=9, goal="at_most")
    page.click("#go")
    page.wait_for_selector("#share:not([hidden])")
    assert page.locator("#error").is_hidden()
    assert page.locator(".answer.guided .verdict").inner_text() == "within 9"


def test_a_saved_run_opens_offline(page, browser, tmp_path):
    hostile = "</script><script>document.title='broken'</script> w7"
    set_form(page, prompt=hostile, number=12)
    page.click("#go")
    page.wait_for_selector("#share:not([hidden])")
    with page.expect_download() as download:
        page.click("#share")
    file = tmp_path / "run.html"
    download.value.save_as(file)
    assert "://" not in re.sub(r"http://www\.w3\.org/2000/svg", "", file.read_text())
    context = browser.new_context(offline=True)
    saved, errors = context.new_page(), []
    saved.on("pageerror", lambda e: errors.append(str(e)))
    saved.goto(file.as_uri())
    saved.wait_for_selector(".answer.guided .verdict.met")
    assert saved.locator(".asked").inner_text() == hostile
    assert saved.title().startswith("LenVM")
    assert saved.locator("path.line").count() == 2
    assert errors == []
    context.close()


def test_the_api_is_described_with_examples(page, slow_client):
    page.goto(f"{slow_client.base_url}/docs")
    page.wait_for_selector("#operations .card:nth-child(9)")
    card = page.locator('[id="post/v1/chat/completions"]')
    assert f"curl -s {slow_client.base_url}".rstrip("/") in card.locator("pre").first.inner_text()
    assert '"equal_to": 120' in card.locator("pre").first.inner_text()
    assert "data: {" in card.locator("pre").nth(2).inner_text()
    card.locator("summary").first.click()
    assert "tilt" in card.locator("dl").nth(1).inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000


def test_goals_change_the_amount_and_no_control_hides_it(page):
    page.check('input[value="tilt"]', force=True)
    assert "shorter" in page.locator("#unit").inner_text()
    page.evaluate("() => { slider.value = 400; slider.dispatchEvent(new Event('input')); }")
    assert page.input_value("#number") == "-10"
    page.check('input[value="none"]', force=True)
    assert page.locator("#number").is_disabled()
    page.fill("#prompt", "w7")
    page.click("#go")
    page.wait_for_selector("#share:not([hidden])")
    assert page.locator(".answer").count() == 1
    assert "predicted" in page.locator(".answer.free .verdict").inner_text()


@pytest.mark.parametrize("width", [320, 390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_the_text_can_be_read(browser, slow_client, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme)
    page = context.new_page()
    page.goto(str(slow_client.base_url))
    set_form(page, prompt="w7", number=8)
    page.click("#go")
    page.wait_for_selector("#share:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = page.evaluate(CONTRAST)
    assert contrast > 4.5
    context.close()


CONTRAST = """() => {
  const light = (c) => c.match(/\\d+/g).slice(0, 3).map(Number)
    .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ink = light(getComputedStyle(document.querySelector(".verdict")).color);
  const card = light(getComputedStyle(document.querySelector(".card")).backgroundColor);
  return (Math.max(ink, card) + 0.05) / (Math.min(ink, card) + 0.05);
}"""


def test_the_pages_scripts_parse_and_judge(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    code = """
      require("vm").runInThisContext(require("fs").readFileSync(process.argv[1], "utf8")
        + ";globalThis.lenvmRun = lenvmRun");
      const { judge, goalOf } = lenvmRun;
      const at = (control, length, finish) => judge(goalOf(control), length, finish)[0];
      console.log(JSON.stringify([at({equal_to: 50}, 50, "stop"), at({equal_to: 50}, 49, "stop"),
        at({at_most: 9}, 12, "length"), at({at_least: 9}, 12, "stop"), at({tilt: 2}, 1, "stop")]));
    """
    source = "src/lenvm/server/page/run.js"
    done = subprocess.run([node, "-e", code, source], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        "exactly 50",
        "1 token short of 50 (2%)",
        "3 tokens over 9, cut off",
        "past 9",
        "ended after 1 token",
    ]
