"""Questions in the shapes in which their benchmarks are published."""

import base64
import sys
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from lenvm.evals.tradeoff.items import BENCHMARKS, load_questions

PICTURE = Image.new("RGBA", (3, 2), (200, 10, 10, 255))
ROWS: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "gsm8k": (
        {"question": "1 + 1?", "answer": "One and one.\n#### 2"},
        ("0", "2", "math"),
    ),
    "math500": (
        {
            "problem": "Half of 3?",
            "solution": "It is $\\boxed{\\frac{3}{2}}$.",
            "answer": "\\frac{3}{2}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        },
        ("test/algebra/1.json", "\\frac{3}{2}", "math"),
    ),
    "aime24": (
        {
            "id": 60,
            "problem": "Every morning ...",
            "solution": "... $\\boxed{204}$",
            "answer": "204",
            "url": "https://example.org",
            "year": "2024",
        },
        ("60", "204", "math"),
    ),
    "aime25": ({"problem": "Find it.", "answer": "70", "id": "0"}, ("0", "70", "math")),
    "amc23": (
        {"id": 0, "answer": 27.0, "question": "Cities A and B ...", "url": "https://example.org"},
        ("0", "27.0", "math"),
    ),
    "mathvista": (
        {
            "pid": "7",
            "question": "Which one?",
            "image": "images/7.jpg",
            "decoded_image": PICTURE,
            "choices": ["145\u00b0", "35\u00b0"],
            "answer": "145\u00b0",
            "question_type": "multi_choice",
        },
        ("7", "A", "choice"),
    ),
    "mathvision": (
        {
            "id": "4",
            "question": "Which number?\n<image1>",
            "options": ["A", "B", "C"],
            "image": "images/4.jpg",
            "decoded_image": {"bytes": b"\x89PNG", "path": "4.png"},
            "answer": "C",
        },
        ("4", "C", "choice"),
    ),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read_as_its_hub_has_it(name: str, monkeypatch: pytest.MonkeyPatch):
    row, (id_, gold, kind) = ROWS[name]
    asked = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((args[0], options["split"], args[1]))
        return [row]

    hub = ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (question,) = load_questions(name)
    assert asked == [BENCHMARKS[name]]
    assert (question.id, question.gold, question.kind) == (id_, gold, kind)
    (message,) = question.messages(concise=False)
    if "decoded_image" not in row:
        assert isinstance(message["content"], str)
        return
    picture, text = message["content"]
    head, data = picture["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "<image1>" not in text["text"]
