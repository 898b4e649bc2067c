"""One page of many results: the three answers first, then everything about each result."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lenvm.errors import DataError
from lenvm.files import write_text
from lenvm.reports import demo, length_tokens, lifebench, prediction, scaling, tradeoff
from lenvm.reports.page import Html, build_page, escape, join, note, panel, section
from lenvm.reports.results import Result, find_results
from lenvm.reports.token_view import token_view
from lenvm.reports.traces import read_traces

TITLES = {
    "length-prediction": "Length prediction",
    "lifebench": "Length control",
    "tradeoff": "Accuracy against length",
    "length-tokens": "Length tokens",
    "demo": "Demo",
}
BODIES: dict[str, Callable[[Result], Html]] = {
    "length-prediction": prediction.section_body,
    "lifebench": lifebench.section_body,
    "tradeoff": tradeoff.section_body,
    "length-tokens": length_tokens.section_body,
    "scaling": scaling.section_body,
    "demo": lambda result: demo.build_body(result.path),
}
ORDER = (*BODIES, "traces")
"""Of the sections: that of the three questions; results of one kind stay as they were given."""
TITLE = "How long will the answer be?"
QUESTIONS = {
    "How well is length predicted?": "lenvm eval length-prediction",
    "How well is it controlled, at what cost?": "lenvm eval lifebench",
    "What does the model see?": "lenvm eval length-tokens or lenvm values --jsonl",
}


def build_report(paths: Sequence[Path], output: Path | None = None, *, title: str = "") -> Path:
    """Write one page of all results under `paths`; returns where it is.

    output: default `report.html` in the folder (or beside the trace file) where there is one path,
    else in the current folder. Raises DataError for a file that is missing or of another form.
    """
    results = sorted(find_results(paths), key=lambda r: ORDER.index(r.kind))
    target = output or _default_output(paths)
    if [r.kind for r in results] == ["demo"]:
        page = demo.build_demo_page(results[0].path)
    else:
        page = _build(results, title or TITLE)
    write_text(target, page)
    return target


def _default_output(paths: Sequence[Path]) -> Path:
    if len(paths) > 1:
        return Path("report.html")
    return paths[0] / "report.html" if paths[0].is_dir() else paths[0].with_suffix(".html")


def _build(results: Sequence[Result], title: str) -> str:
    traces = [r for r in results if r.kind == "traces"]
    answers = _answers(results)
    view = _view(traces) if traces else Html("")
    sections = [
        (f"part-{i}", name, _section(r, name, f"part-{i}"))
        for i, (r, name) in enumerate(_name_all([r for r in results if r.kind != "traces"]))
    ]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    contents = Html(f'<nav class="contents" aria-label="Results">{links}</nav>')
    body = join(answers, contents if len(sections) > 1 else Html(""), view)
    return build_page(title, _lead(results), join(body, *(text for _, _, text in sections)))


def _lead(results: Sequence[Result]) -> str:
    if all(r.kind == "traces" for r in results):
        return "What a value model expects at every token, against what came."
    counts = [f"{n:,} answers" for n in [_num_answers(results)] if n]
    failed = sum(r.summary.get("num_failed", 0) for r in results)
    if failed:
        counts.append(f"{failed:,} failed requests, counted as failures")
    skipped = sum(bool(a["skipped"]) for r in results for a in r.summary.get("arms", ()))
    if skipped:
        counts.append(f"{skipped} arms that could not run (reasons below)")
    about = f" From {', '.join(counts)}." if counts else ""
    return (
        "Every number stands in a result file; intervals hold 95%, over prompts."
        f"{about} Point at a dot to see what it is."
    )


def _num_answers(results: Sequence[Result]) -> int:
    kinds = ("lifebench", "tradeoff")
    return sum(r.summary.get("num_records", 0) for r in results if r.kind in kinds)


def _answers(results: Sequence[Result]) -> Html:
    """The first screen: one panel per question that a result answers; what is missing, in words."""

    def of(kind: str) -> list[Result]:
        return [r for r in results if r.kind == kind]

    found: list[Html | None] = [
        _guard(of("length-prediction"), prediction.answer),
        _controlled(of("lifebench"), of("tradeoff")),
        _guard(of("length-tokens"), length_tokens.answer),
    ]
    questions = list(QUESTIONS)
    answered = [(q, html) for q, html in zip(questions, found, strict=True) if html is not None]
    if not answered:
        return Html("")
    panels = join(*(panel(q, html, number=i + 1) for i, (q, html) in enumerate(answered)))
    kind = {1: "one", 2: "two", 3: "three"}[len(answered)]
    seen = any(r.kind in ("traces", "demo") for r in results)
    missing = [
        f"{q} ({QUESTIONS[q]})"
        for q, html in zip(questions, found, strict=True)
        if html is None and not (seen and q == questions[2])
    ]
    words = note(f"Not measured here: {' '.join(missing)}") if missing else Html("")
    return Html(f'<div class="answers {kind}">{panels}</div>') + words


def _controlled(control: list[Result], costs: list[Result]) -> Html | None:
    if control:
        first = _guard(control, lifebench.answer)
        more = _guard(costs, lambda rows: tradeoff.answer(rows, is_first=False))
        return join(*(part for part in (first, more) if part is not None))
    return _guard(costs, tradeoff.answer)


def _guard(results: list[Result], write: Callable[[list[Result]], Html]) -> Html | None:
    """What `write` makes of the results, None without any. DataError for a summary with gaps."""
    if not results:
        return None
    try:
        return write(results)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        names = ", ".join(str(r.path / "summary.json") for r in results)
        raise DataError(
            f"{names}: not what `lenvm eval` writes ({type(error).__name__}: {error}); grade it "
            "again with --regrade"
        ) from error


def _view(results: Sequence[Result]) -> Html:
    """All traces in one view, so that models stand side by side."""
    traces = [
        t.model_copy(update={"images": [str(r.path.parent / name) for name in t.images]})
        for r in results
        for t in read_traces(r.path)
    ]
    words = note(
        "Answers token by token. Point at a token or at the curve, or use the arrow keys. Longer "
        "or shorter: the TD residual with its sign turned, so positive (orange) makes the expected "
        "answer longer."
    )
    view = words + token_view(traces)
    return Html(f'<div class="answers one">{panel("Token by token", view, wide=True)}</div>')


def _name_all(results: Sequence[Result]) -> list[tuple[Result, str]]:
    """A title for each result: what it is and of which model; the folder where these are alike."""
    short = [_name(r) for r in results]
    return [
        (r, name if short.count(name) == 1 else f"{name} · {r.path.name}")
        for r, name in zip(results, short, strict=True)
    ]


def _name(result: Result) -> str:
    if result.kind == "scaling":
        return "Ablations" if result.summary.get("design") == "ablation" else "Scaling"
    return f"{TITLES[result.kind]} · {result.model}"


def _section(result: Result, name: str, anchor: str) -> Html:
    body = _guard([result], lambda rows: BODIES[result.kind](rows[0]))
    notes = result.summary.get("notes") or []
    said = "".join(f"<li>{escape(n)}</li>" for n in notes)
    listed = Html(f'<ul class="notes">{said}</ul>') if said else Html("")
    return section(name, join(body or Html(""), listed), anchor=anchor)
