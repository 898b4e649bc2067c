"""One page of every evaluation: what it answers, that it says what the files say, bad files."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lenvm.errors import DataError
from lenvm.reports.report import build_report
from lenvm.reports.tables import format_percent
from reports.made_up import make_trace, write_demo, write_jsonl
from reports.made_up_evals import (
    write_lifebench,
    write_prediction,
    write_scaling,
    write_traces,
    write_tradeoff,
)

VOID = {"meta", "img", "br", "link", "input", "hr", "polyline", "polygon", "path", "rect"}


class Reader(HTMLParser):
    """Texts of a page; every element must be closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.ids += [about["id"]] if "id" in about else []
        self.links += [about["href"]] if "href" in about else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def words(path: Path) -> str:
    return " ".join(" ".join(read(path).texts).split())


@pytest.fixture(scope="module")
def page(everything, tmp_path_factory) -> Path:
    return build_report([everything], tmp_path_factory.mktemp("page") / "page.html")


def summary(everything: Path, name: str) -> dict:
    return json.loads((everything / name / "summary.json").read_text())


def test_the_three_questions_are_answered_first_in_order(page):
    text = words(page)
    places = [
        text.index(question)
        for question in (
            "How well is length predicted?",
            "How well is it controlled, at what cost?",
            "What does the model see?",
            "Token by token",
            "Calibration: is a prediction right on average?",
            "Score by target",
            "Accuracy against length, with 95% intervals",
            "Tokens that make the answer longer",
            "Relative error at the prompt by completions per prompt",
        )
    ]
    assert places == sorted(places)
    assert "Not measured here" not in text


def test_the_answers_are_the_numbers_of_the_files(page, everything):
    text = words(page)
    every = summary(everything, "prediction")["domains"]["all"]
    assert f"{format_percent(every['mre']['value'])} error on average" in text
    arms = {a["arm"]: a["equal_to"] for a in summary(everything, "lifebench")["arms"]}
    best = max((arms[a] for a in ("hard", "soft:100", "conditional:1")), key=_controlled)
    assert f"{_controlled(best):.0f} of 100" in text
    assert f"{_controlled(arms['prompt']):.0f} by the prompt alone" in text
    loss = best["quality"]["log_prob_loss"]["value"]
    assert f"{loss:.2f} nats per token less likely" in text
    assert re.search(r"1[345]\.\d ms per token \(prompt alone: [89]\.\d ms\)", text)
    tilt = summary(everything, "gsm8k")["curves"]["tilt"]["accuracy_at"]
    at = next(row["accuracy"]["value"] for row in tilt if row["fraction"] == 0.667)
    assert f"{format_percent(at)} right, with LenVM tilt at two thirds" in text
    assert "“wait”" in text


def _controlled(constraint) -> float:
    return constraint["controlled_score"]["value"]


def test_every_arm_domain_baseline_and_cell_stands_in_a_table(page, everything):
    text = words(page)
    for name in ("lifebench", "gsm8k"):
        for arm in summary(everything, name)["arms"]:
            assert arm["label"] in text
    for needed in ("surface features", "code (30)", "Share of answers inside"):
        assert needed in text
    for measure in ("rep-4", "distinct-1", "natural end", "ms per token", "pass@k (k)", "Kendall"):
        assert measure in text
    assert "Calibration of the distribution (PIT)" in text
    assert "Relative error at the prompt by completions per prompt" in text
    assert "Gamma" in text


def test_every_arm_has_its_dot_whatever_its_number(page, everything):
    """Fault 11: a scale that is no whole number was left out of the plot."""
    tips = re.findall(r'data-tip="([^"]*)"', page.read_text())
    for name in ("lifebench", "gsm8k"):
        for arm in summary(everything, name)["arms"]:
            assert any(tip.startswith(f"{arm['label']}\n") for tip in tips), arm["label"]
    assert any("tilt 12.5" in tip for tip in tips)


def test_every_colour_of_a_legend_has_its_key(page):
    text = page.read_text()
    kinds = {k for c in re.findall(r'class="key ([^"]*)"', text) for k in c.split()}
    known = {"dot", "line", "area", "main"}  # main is the colour of a key that has no other
    assert {"ink", "base", "s1"} <= kinds
    assert [k for k in kinds - known if f".key.{k} {{ --key:" not in text] == []


def test_failures_are_counted_on_the_first_screen_and_by_arm(page, everything):
    failed = sum(summary(everything, n)["num_failed"] for n in ("lifebench", "gsm8k"))
    assert failed > 0
    ablation = summary(everything, "ablation")["num_failed"]
    assert f"{failed + ablation} failed requests, counted as failures" in words(page)
    assert "precision fp32, seed 2 failed: out of memory" in words(page)


def test_the_page_is_whole_links_inside_itself_and_refers_to_nothing_outside(page):
    reader = read(page)
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    text = page.read_text()
    assert not re.search(r"src=\"(?!data:image/png;base64,)|https?://|@import|url\(", text)
    assert text.count("</script>") == text.count("<script")
    assert "nan" not in re.findall(r"[a-z]+", "".join(re.findall(r'points="[^"]*"', text)))


def test_word_clouds_are_inside_as_png(page):
    assert page.read_text().count("data:image/png;base64,iVBORw0KGgo") == 2


def test_markup_in_tokens_and_prompts_stays_text(page):
    text = page.read_text()
    assert "<b>you</b>" not in text
    assert text.count("</script>") == text.count("<script")


def test_one_folder_has_its_page_inside_and_a_trace_file_beside(tmp_path):
    folder = write_prediction(tmp_path / "p", num=12)
    assert build_report([folder]) == folder / "report.html"
    text = words(folder / "report.html")
    assert "Not measured here: How well is it controlled, at what cost?" in text
    assert "(lenvm eval lifebench)" in text
    file = write_traces(tmp_path / "traces.jsonl")
    assert build_report([file]) == tmp_path / "traces.html"
    assert "Not measured here" not in words(tmp_path / "traces.html")


def test_several_models_stand_side_by_side(tmp_path):
    one = write_prediction(tmp_path / "a", num=12)
    two = write_prediction(tmp_path / "b", num=12, name="lenvm-7b", blur=0.1, head="scalar")
    text = words(build_report([one, two], tmp_path / "r.html"))
    assert re.search(r"less is better lenvm-1.5b \d+% lenvm-7b \d+% constant guess", text)
    assert "Length prediction · lenvm-7b" in text
    again = words(build_report([one, one], tmp_path / "r.html"))
    assert "Length prediction · lenvm-1.5b · a" in again


def test_images_are_found_beside_their_own_trace_file(tmp_path):
    files = []
    for name in ("a", "b"):
        path = tmp_path / name / "traces.jsonl"
        write_jsonl(path, [make_trace("math", model=name, images=["i.png"])])
        (tmp_path / name / "i.png").write_bytes(b"\x89PNG" + name.encode())
        files.append(path)
    text = build_report(files, tmp_path / "r.html").read_text()
    for name in ("a", "b"):
        assert base64.b64encode(b"\x89PNG" + name.encode()).decode() in text


def test_a_demo_alone_is_its_own_page_and_with_others_a_part(tmp_path):
    demo = write_demo(tmp_path / "demo")
    alone = words(build_report([demo]))
    assert "What a language model knows of its own length" in alone
    both = words(build_report([demo, write_scaling(tmp_path / "s")], tmp_path / "r.html"))
    assert "Demo · demo" in both
    assert "not strictly comparable" in both


def test_arms_that_did_not_run_say_why(tmp_path):
    folder = write_lifebench(
        tmp_path / "l", missing=("control",), arms="prompt truncate hard", constraints=("equal_to",)
    )
    text = words(build_report([folder]))
    assert "hard did not run: the server has no control" in text
    assert "1 arms that could not run (reasons below)" in text


def test_many_answers_cut_off_are_said_on_the_first_screen(tmp_path):
    folder = write_prediction(tmp_path / "p")
    file = folder / "summary.json"
    found = json.loads(file.read_text())
    assert "Careful" not in words(build_report([folder]))
    assert "Each held-out prompt" in words(build_report([folder]))
    found |= {
        "num_censored": found["num_completions"],
        "config": found["config"] | {"split": "all"},
    }
    found["domains"]["all"]["mre"] = {"value": 9.0, "low": 8.0, "high": 10.0}
    file.write_text(json.dumps(found))
    text = words(build_report([folder]))
    assert "answers were cut off and are left out" in text
    assert "times the error of the best guess" in text
    assert "held-out" not in text


def test_without_log_probabilities_scores_are_bars(tmp_path):
    folder = write_lifebench(tmp_path / "l", arms="prompt hard", num=4, constraints=("at_most",))
    text = (folder / "summary.json").read_text()
    data = json.loads(text)
    for arm in data["arms"]:
        arm["at_most"]["quality"]["log_prob"] = None
        arm["at_most"]["quality"]["log_prob_loss"] = None
    (folder / "summary.json").write_text(json.dumps(data))
    assert "Score; cut-off answers count 0" in words(build_report([folder]))


def test_a_trade_off_without_curves_still_has_points(tmp_path):
    folder = write_tradeoff(tmp_path / "t", num=4)
    data = json.loads((folder / "summary.json").read_text())
    data |= {"curves": {}, "area_between": []}
    (folder / "summary.json").write_text(json.dumps(data))
    assert "Accuracy against length, with 95% intervals" in words(build_report([folder]))


def test_a_missing_library_is_said(tmp_path, everything, monkeypatch):
    monkeypatch.setitem(sys.modules, "wordcloud", None)
    text = words(build_report([everything / "tokens"], tmp_path / "r.html"))
    assert "No word cloud: wordcloud is not installed" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "summary.json"),
        ("[]", "schema None"),
        ('{"schema": "lenvm.eval.summary/9"}', "lenvm.eval.summary/9"),
        ('{"schema": "lenvm.eval.summary/1", "evaluation": "beauty"}', "'beauty'; known: length-"),
        ('{"schema": "lenvm.eval.summary/1", "evaluation": "lifebench"}', "--regrade"),
        ('{"schema": "lenvm.demo/1"}', "lacks sampling"),
    ],
)
def test_files_of_another_form_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "summary.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        build_report([tmp_path / "x"])
    assert str(tmp_path / "x") in str(caught.value)
    assert not (tmp_path / "x" / "report.html").exists()


def test_folders_without_results_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no summary\.json and no traces"):
        build_report([tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        build_report([tmp_path / "none"])
