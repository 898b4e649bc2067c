"""Is an answer right? One answer at a time, in this process; `grading_pool` guards against hangs.

The final answer is the last `\\boxed{}`, else GSM8K's `####` line, else what math-verify finds by
phrases such as "the answer is"; only where the answer ended by itself, also its last expression.
The same rule for every arm. Mathematics is compared by math-verify (LaTeX gold answers are parsed
as LaTeX), choices by letter or by the option's content, words as words.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from lenvm.errors import InputError

Kind = Literal["math", "choice", "text"]
Graded = tuple[bool, str | None]
TAIL_CHARACTERS = 3_000
NUMBER = re.compile(r"-?(\d+(,\d{3})+|\d+)?(\.\d+)?")
TEXT_GOLD = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{\s*([^{}]*)\s*\}")
LETTER = re.compile(r"\(?([A-Z])\)?[.:)]?")
CHOICE_PHRASE = re.compile(
    r"(?:answer|choice|option)\b[^A-Za-z\n]{0,6}(?:is|:|would be)?[^A-Za-z\n]{0,8}"
    r"(?:option\s+|choice\s+)?\(?\**\(?([A-Z])\b(?!['’])",  # noqa: RUF001
    re.IGNORECASE,
)
LAST_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])(?:\)|\.|\*\*|$)(?![A-Za-z])")
TEXT_PHRASE = re.compile(r"answer\s*(?:is|:)\s*:?\s*([^\n]+)", re.IGNORECASE)
BASE = re.compile(r"_\{?(\d+)\}?\s*$")


def guess_kind(gold: str, options: Sequence[str] = ()) -> Kind:
    """What kind of answer the gold is: a choice, words, or mathematics."""
    plain = strip_latex_text(gold)
    if options or re.fullmatch(r"\(?[A-Z]\)?", plain):
        return "choice"
    words = re.fullmatch(r"[^\W\d_]{2,}([ '-][^\W\d_]+)*\.?", plain)
    return "text" if words and "\\" not in plain else "math"


def gold_letter(gold: str, options: Sequence[str]) -> str:
    """The letter of a choice's gold answer, which may be given as the option's text.

    Raises InputError where it is neither.
    """
    plain = strip_latex_text(gold)
    if match := re.fullmatch(r"\(?([A-Z])\)?", plain):
        return match[1]
    for index, option in enumerate(options):
        if normalise_words(option) == normalise_words(gold):
            return chr(ord("A") + index)
    raise InputError(f"the gold answer {gold!r} is none of the options {list(options)}")


def grade_answer(
    text: str, gold: str, kind: Kind, *, options: Sequence[str] = (), complete: bool = True
) -> Graded:
    """(correct, what was taken as the final answer or None). `complete`: it ended by itself."""
    text = text.rsplit("</think>", 1)[-1]
    boxed = last_boxed(text)
    if boxed is None and (marked := re.findall(r"^\s*####\s*(.+?)\s*$", text, re.MULTILINE)):
        boxed = marked[-1]
    if kind == "choice":
        return _grade_choice(text, boxed, gold_letter(gold, options), options, complete)
    if kind == "text":
        return _grade_words(text, boxed, gold, complete)
    return _grade_math(text, boxed, gold, complete)


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` with its braces closed; None where there is none."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[start:end].strip()
    return None


def strip_latex_text(text: str) -> str:
    """Without dollars and `\\text{}` wrappers."""
    plain = TEXT_GOLD.sub(r"\1", text.strip().strip("$").strip())
    return plain.strip().strip("$").strip()


def normalise_words(text: str) -> str:
    """Words for comparison: no wrappers, case, punctuation at the ends, doubled spaces."""
    return " ".join(strip_latex_text(text).casefold().split()).strip(" .,;:!?\"'*_()")


def parse_number(text: str) -> Fraction | None:
    """A plain decimal number, currency signs and thousands separators allowed; else None."""
    for noise in ("\\$", "$", "\\!", "\\,", " "):
        text = text.replace(noise, "")
    if not text or not NUMBER.fullmatch(text) or text in ("-", "."):
        return None
    return Fraction(text.replace(",", ""))


def _grade_math(text: str, boxed: str | None, gold: str, complete: bool) -> Graded:
    if boxed is not None:
        one, two = parse_number(boxed), parse_number(gold)
        if one is not None and two is not None:
            return one == two, boxed
        if "".join(boxed.split()) == "".join(gold.split()):
            return True, boxed
        bases = BASE.search(boxed), BASE.search(gold)
        if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
            return False, boxed
    return _verify(text if boxed is None else f"\\boxed{{{boxed}}}", gold, complete)


def _verify(text: str, gold: str, complete: bool) -> Graded:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def configs(anywhere: bool) -> list[Any]:
        return [
            LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=anywhere),
            ExprExtractionConfig(try_extract_without_anchor=anywhere),
        ]

    target = parse(f"\\boxed{{{gold.strip().strip('$')}}}", configs(True))
    if not target:
        raise InputError(f"the gold answer {gold!r} is not mathematics that can be parsed")
    found = parse(text, configs(False))
    if not found and complete:
        found = parse(text[-TAIL_CHARACTERS:], configs(True))
    if not found:
        return False, None
    return bool(verify(target, found, allow_set_relation_comp=True)), str(found[-1])


def _grade_choice(
    text: str, boxed: str | None, gold: str, options: Sequence[str], complete: bool
) -> Graded:
    letters = [chr(ord("A") + i) for i in range(len(options))] or list("ABCDEFGHIJ")
    if boxed is not None:
        found = _letter_of(strip_latex_text(boxed), letters, options)
    else:
        phrases = [m.upper() for m in CHOICE_PHRASE.findall(text) if m.upper() in letters]
        tail = LAST_LETTER.findall(text[-200:]) if complete else []
        last = [m for m in tail if m in letters]
        found = phrases[-1] if phrases else last[-1] if last else None
    return found == gold, found


def _letter_of(answer: str, letters: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter that a boxed answer means: written as such, with its text, or by its content."""
    for pattern in (LETTER, re.compile(r"\(?([A-Z])[).:]\s+.*", re.DOTALL)):
        if (match := pattern.fullmatch(answer)) and match[1] in letters:
            return match[1]
    for letter, option in zip(letters, options, strict=False):
        if normalise_words(option) == normalise_words(answer):
            return letter
    for letter, option in zip(letters, options, strict=False):
        if parse_number(option) is not None and parse_number(option) == parse_number(answer):
            return letter
    return None


def _grade_words(text: str, boxed: str | None, gold: str, complete: bool) -> Graded:
    if boxed is not None:
        found = boxed
    elif phrases := TEXT_PHRASE.findall(text):
        found = phrases[-1]
    elif complete and text.strip():
        found = text.strip().splitlines()[-1]
    else:
        return False, None
    return normalise_words(found) == normalise_words(gold), found
