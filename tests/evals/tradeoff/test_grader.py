"""The grader against a table of answers graded by hand, and the faults of the published one."""

import pytest

from lenvm.errors import InputError
from lenvm.evals.tradeoff.grader import (
    gold_letter,
    grade_answer,
    guess_kind,
    last_boxed,
    parse_number,
)

MATH = [
    # LaTeX gold answers, written another way (fault 11: these were marked wrong)
    (r"\left( 3, \frac{\pi}{2} \right)", r"So \boxed{(3, \pi/2)}.", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"So \boxed{(3, \pi)}.", False),
    (r"\frac{14}{3}", r"\boxed{\dfrac{14}{3}}", True),
    (r"\frac43", r"\boxed{\frac{4}{3}}", True),
    (r"\frac43", r"\boxed{1.333}", False),
    (r"\frac{1}{4}", r"\boxed{0.25}", True),
    (r"\frac{3\sqrt{3}}{4}", r"\boxed{\frac{3}{4}\sqrt 3}", True),
    (r"3\sqrt{13}", r"\boxed{\sqrt{117}}", True),
    (r"3\sqrt{13}", r"\boxed{3\sqrt{31}}", False),
    (r"11\sqrt2", r"$\boxed{11 \sqrt{2}}$", True),
    (r"90^\circ", r"\boxed{90}", True),
    (r"90^\circ", r"\boxed{90^\circ}", True),
    (r"\frac{270}7\text{ degrees}", r"\boxed{\frac{270}{7}}", True),
    ("6 - 5i", r"\boxed{-5i + 6}", True),
    ("p - q", r"\boxed{p-q}", True),
    ("p - q", r"\boxed{q-p}", False),
    ("x=5", r"\boxed{5}", True),
    ("5", r"\boxed{x = 5}", True),
    ("1,-2", r"\boxed{-2, 1}", True),
    ("3, 5, 7", r"\boxed{3,5,7}", True),
    ("3, 5, 7", r"\boxed{7}", False),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}", True),
    ("52_8", r"\boxed{52_8}", True),
    ("4210_{5}", r"\boxed{4210_5}", True),
    ("52_8", r"\boxed{52_9}", False),
    (r"10,\!080", r"\boxed{10080}", True),
    (r"\$32,\!348", r"\boxed{\$32,348}", True),
    (r"11,\! 111,\! 111,\! 100", r"\boxed{11111111100}", True),
    (".0000672", r"\boxed{6.72 \times 10^{-5}}", True),
    ("(3,4]", r"\boxed{(3,4]}", True),
    ("(3,4]", r"\boxed{[3,4)}", False),
    (r"(2,\infty)", r"\boxed{x > 2}", True),
    ("2k+2", r"\boxed{2(k+1)}", True),
    ("(a+5)(b+2)", r"\boxed{ab + 2a + 5b + 10}", True),
    (r"\cot x", r"\boxed{\frac{\cos x}{\sin x}}", True),
    ("5x - 7y + 11z + 4 = 0", r"\boxed{5x-7y+11z+4=0}", True),
    (
        r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}",
        r"\boxed{\begin{bmatrix} -2 \\ -14 \\ -7 \end{bmatrix}}",
        True,
    ),
    (
        r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}",
        r"\boxed{\begin{pmatrix} -2 \\ -14 \\ 7 \end{pmatrix}}",
        False,
    ),
    (r"\pi", r"\boxed{3.14159}", False),
    # plain numbers, as GSM8K's
    ("18", "She makes $18 a day.\n#### 18", True),
    ("18", "The answer is 18 dollars.", True),
    ("18", r"\boxed{18.00}", True),
    ("18", r"\boxed{\$18}", True),
    ("18", r"\boxed{18 \text{ eggs}}", True),
    ("18", r"\boxed{81}", False),
    ("1234", r"\boxed{1,234}", True),
    ("1000000", r"\boxed{10^6}", True),
    ("50", r"\boxed{50\%}", True),
    ("540", "In total: **540** meters.", True),
    # which of several is the final one
    ("7", r"First \boxed{6}, but in fact \boxed{7}.", True),
    ("6", r"First \boxed{6}, but in fact \boxed{7}.", False),
    ("7", r"<think>\boxed{6}</think> \boxed{7}", True),
    ("6", r"<think>It is \boxed{6}.</think> I do not know.", False),
    ("18", r"\boxed{18", False),
    ("18", "", False),
]
CUT_OFF = [
    ("8", "so 5 + 3 = 8", False),
    ("8", "The answer is 8, and to be sure we", True),
    ("8", r"It is \boxed{8}. To check, note", True),
    ("8", r"\boxed{", False),
]
CHOICE = [
    ("D", (), r"\boxed{D}", True),
    ("D", (), r"\boxed{\text{(D)}}", True),
    ("D", (), r"\boxed{\textbf{D}}", True),
    (r"\text{(C)}", (), "The answer is (C).", True),
    (r"\text{(C)}", (), "The answer is (D).", False),
    ("C", (), "Answer: C", True),
    ("C", (), "The correct option is **C**", True),
    ("B", (), "I would say A or B. So it must be (B)", True),
    ("B", ("12", "15", "18"), r"\boxed{15}", True),
    ("B", ("12", "15", "18"), r"\boxed{18}", False),
    ("A", ("red", "blue"), r"\boxed{\text{Red}}", True),
    ("15", ("12", "15", "18"), r"\boxed{B}", True),
    ("C", ("red", "blue", "green"), r"\boxed{C. green}", True),
    ("A", ("red", "blue"), "", False),
]
WORDS = [
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
    (r"\text{east}", r"\boxed{\text{seat}}", False),  # the same letters: no product of symbols
    (r"\text{even}", "The answer is even.", True),
    (r"\text{even}", "The answer is: odd", False),
    ("Tuesday", "Tuesday.", True),
]


@pytest.mark.parametrize(("gold", "text", "correct"), MATH)
def test_mathematics(gold, text, correct):
    assert guess_kind(gold) == "math"
    assert grade_answer(text, gold, "math")[0] is correct


@pytest.mark.parametrize(("gold", "text", "correct"), CUT_OFF)
def test_an_answer_that_was_cut_off_must_have_named_its_result(gold, text, correct):
    assert grade_answer(text, gold, "math", complete=False)[0] is correct


@pytest.mark.parametrize(("gold", "options", "text", "correct"), CHOICE)
def test_choices(gold, options, text, correct):
    assert guess_kind(gold, options) == "choice"
    assert grade_answer(text, gold, "choice", options=options)[0] is correct


@pytest.mark.parametrize(("gold", "text", "correct"), WORDS)
def test_words(gold, text, correct):
    assert guess_kind(gold) == "text"
    assert grade_answer(text, gold, "text")[0] is correct


def test_every_gold_answer_grades_itself_as_right():
    for gold, _, _ in [*MATH, *WORDS]:
        assert grade_answer(f"\\boxed{{{gold}}}", gold, guess_kind(gold))[0], gold


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"a \boxed{\frac{1}{2}} b", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", None),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        ("none", None),
    ],
)
def test_the_last_closed_box(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.5", 1234.5),
        (r"\$32,\!348", 32348),
        (".5", 0.5),
        ("-3", -3),
        ("3x", None),
        ("-", None),
    ],
)
def test_plain_numbers(text, number):
    assert parse_number(text) == number


def test_a_gold_answer_that_is_no_option_is_refused():
    with pytest.raises(InputError, match="none of the options"):
        gold_letter("purple", ["red", "blue"])
