"""Real prompts of shared/data as training and held-out sets, by domain; licences kept apart.

Training and held-out prompts come from different files, and a prompt that is in both, or among the
package's own evaluation prompts, is held out. A tenth of the training prompts is for validation.

Three quarters of the held-out instructions are IFEval's, requests with conditions on form ("in
lowercase", "exactly 3 bullet points"), which no training file has. `constrained` prompts are such
requests of our own: a shippable instruction and one or two of `CONDITIONS`. `asked` prompts are
training questions of mathematics, asked in the trade-off's words.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lenvm.data.prompts import Prompt, load_bundled_prompts
from lenvm.errors import InputError
from lenvm.evals.tradeoff.items import Question, find_gold
from lenvm.files import read_jsonl

DOMAINS = ("math", "code", "instructions")
MAX_CHARACTERS = 2500
Texts = Callable[[Path], list[str]]


def read(data: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(data / name)]


def _field(name: str, key: str) -> Texts:
    return lambda data: [str(row[key]) for row in read(data, name)]


def _mbpp(low: int, high: int) -> Texts:
    return lambda data: [
        str(r["text"]) for r in read(data, "mbpp/mbpp.jsonl") if low <= r["task_id"] <= high
    ]


def _self_instruct(name: str) -> Texts:
    def texts(data: Path) -> list[str]:
        found = []
        for row in read(data, f"self_instruct/{name}.jsonl"):
            context = row["instances"][0]["input"].strip()
            found.append(f"{row['instruction']}\n\n{context}".strip())
        return found

    return texts


def _array(name: str, *keys: str) -> Texts:
    def texts(data: Path) -> list[str]:
        rows = json.loads((data / name).read_text(encoding="utf-8"))
        return ["\n\n".join(str(r[k]) for k in keys if r[k]).strip() for r in rows]

    return texts


TRAINING: tuple[tuple[str, bool, Texts], ...] = (
    ("math", True, _field("gsm8k/train.jsonl", "question")),
    ("math", True, _field("math/train.jsonl", "problem")),
    ("code", True, _mbpp(601, 974)),
    ("code", False, _array("leetcode/leetcode_train.json", "problem")),
    ("instructions", True, _self_instruct("seed_tasks")),
    ("instructions", True, _self_instruct("user_oriented_instructions")),
    ("instructions", True, _field("arena_hard/question_v2.0.jsonl", "prompt")),
    ("instructions", True, _field("wildchat/meter_train_filtered.jsonl", "prompt")),
    ("instructions", False, _array("alpaca/alpaca_en_demo.json", "instruction", "input")),
    ("instructions", False, _field("dolly/dolly.jsonl", "prompt")),
)
"""(domain, whether a model trained on it may ship, texts); licences: shared/data/README.md."""

HELD_OUT: tuple[tuple[str, Texts], ...] = (
    ("math", _field("gsm8k/test_first660.jsonl", "question")),
    ("math", _field("math/math500_first250.jsonl", "problem")),
    ("code", _mbpp(11, 600)),
    ("instructions", _field("ifeval/input_data.jsonl", "prompt")),
    ("instructions", _field("wildchat/meter_validation_filtered.jsonl", "prompt")),
    ("instructions", _field("wildchat/meter_test_filtered.jsonl", "prompt")),
)


CONDITIONS = (
    'Use the word "{word}" at least {few} times.',
    'Work the words "{word}" and "{other}" into the answer.',
    'Avoid the words "{word}" and "{other}".',
    "The letter {letter} has to appear at least {many} times.",
    "Answer in {language} only.",
    "Write at least {words} words.",
    "Keep it under {words} words.",
    "Use no more than {some} sentences.",
    "There must be at least {some} sentences.",
    "Write exactly {few} paragraphs, with *** between them.",
    "Give exactly {few} bullet points in markdown, each beginning with an asterisk.",
    "Highlight at least {few} parts of the answer in markdown, *like this*.",
    "Split the answer into {few} sections, headed SECTION 1, SECTION 2 and so on.",
    "The whole answer has to be valid JSON.",
    "Put a title on top, in double angle brackets, <<like this>>.",
    "Leave at least {few} blanks to fill in, in square brackets, such as [date].",
    "Add a postscript at the end that starts with P.S.",
    "Write in capital letters from start to end.",
    "Use English and no capital letters at all.",
    "At least {few} words should be in all capitals.",
    "Do without commas.",
    'The last words must be "{ending}" and nothing may come after them.',
    "Put the complete answer between double quotation marks.",
    "Repeat this request word for word before you answer it.",
    "Give two separate answers, with ****** in between.",
    'Reply with one of these and nothing else: "Yes.", "No.", "Hard to say."',
)
WORDS = (
    *("river", "market", "theory", "bright", "early", "window"),
    *("garden", "method", "travel", "honest", "winter", "signal"),
)
LANGUAGES = (
    *("German", "Hindi", "French", "Arabic", "Portuguese"),
    *("Russian", "Japanese", "Swahili", "Korean", "Italian"),
)
ENDINGS = ("That is all there is to it.", "Is there anything else?", "Hope this helps!")
VARIANTS = 3
"""Constrained prompts made of one instruction."""
MAX_CONSTRAINED = 600
"""Characters of such an instruction: the longer ones are texts to work on."""


def find_conditioned(data: Path) -> set[str]:
    """Hashes of the held-out instructions with conditions on form: IFEval's."""
    texts = _field("ifeval/input_data.jsonl", "prompt")(data)
    return {Prompt.from_text(t, domain="instructions", split="test").prompt_hash for t in texts}


def constrain(text: str, seed: int) -> str:
    """A request with one or two conditions on its form behind it, or in front of it."""
    draw = random.Random(seed)
    word, other = draw.sample(WORDS, 2)
    filled = [
        condition.format(
            word=word,
            other=other,
            letter=draw.choice("abcdefghilmnoprstuwy"),
            language=draw.choice(LANGUAGES),
            few=draw.randint(2, 6),
            some=draw.randint(3, 20),
            many=draw.randint(5, 30),
            words=draw.choice((30, 50, 100, 150, 200, 300, 400, 600)),
            ending=draw.choice(ENDINGS),
        )
        for condition in draw.sample(CONDITIONS, draw.choice((1, 1, 2)))
    ]
    conditions, between = " ".join(filled), " " if text.strip()[-1] in ".!?" else "\n\n"
    if draw.random() < 0.85:
        return text.strip() + between + conditions
    return f"{conditions} {text.strip()}"


def asked_questions(data: Path) -> dict[str, Question]:
    """Training questions of GSM8K and MATH by the prompt that asks them, mixed; none that is also
    held out, or has no answer."""
    held_out = {text.strip() for domain, t in HELD_OUT if domain == "math" for text in t(data)}
    files = []
    for name, key in (("gsm8k/train.jsonl", "question"), ("math/train.jsonl", "problem")):
        rows = [(str(row[key]).strip(), find_gold(row)) for row in read(data, name)]
        random.Random(0).shuffle(rows)
        files.append([(text, gold) for text, gold in rows if gold and text not in held_out])
    found = [Question(text, text, *gold) for text, gold in _interleave(files)]
    return {question.prompt(concise=False): question for question in found}


def load_prompts(data: Path, which: str, per_domain: Mapping[str, int] | int) -> list[Prompt]:
    """`which`: "shippable", "all", "not_shippable", "constrained" or "asked" (training), or
    "held_out". At most `per_domain` prompts of each domain (0: none; instructions to constrain),
    drawn evenly from its files, in an order that mixes domains.
    """
    shipping = {"shippable": (True,), "not_shippable": (False,), "all": (True, False)}
    if which not in (allowed := (*shipping, "constrained", "asked", "held_out")):
        raise InputError(f"prompts are {which!r}; allowed: {', '.join(allowed)}")
    if which == "constrained":
        return _constrained(load_prompts(data, "shippable", per_domain))
    found = held_out = _prompts(data, list(HELD_OUT), "test")
    if which != "held_out":
        texts: list[tuple[str, Texts]] = [("math", lambda data: list(asked_questions(data)))]
        if which in shipping:
            texts = [(domain, t) for domain, ships, t in TRAINING if ships in shipping[which]]
        kept_out = {p.prompt_hash for row in held_out.values() for p in row}
        kept_out |= {p.prompt_hash for p in load_bundled_prompts() if p.split != "train"}
        found = {
            domain: [p for p in row if p.prompt_hash not in kept_out]
            for domain, row in _prompts(data, texts, "train").items()
        }
    limits = per_domain if isinstance(per_domain, Mapping) else dict.fromkeys(DOMAINS, per_domain)
    parts = [row[: limits.get(domain, 0)] for domain, row in found.items()]
    prompts = _interleave(parts)
    if which == "held_out":
        return prompts
    return [
        replace(p, split="validation") if int(p.prompt_hash, 16) % 10 == 0 else p for p in prompts
    ]


def _constrained(prompts: list[Prompt]) -> list[Prompt]:
    """Each short instruction in several forms; all of them are in its split."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.domain != "instructions" or len(prompt.text) > MAX_CONSTRAINED:
            continue
        for variant in range(VARIANTS):
            text = constrain(prompt.text, int(prompt.prompt_hash, 16) + variant)
            made = Prompt.from_text(text, domain=prompt.domain, split=prompt.split)
            found.setdefault(made.prompt_hash, made)
    return list(found.values())


def _prompts(data: Path, sources: list[tuple[str, Texts]], split: str) -> dict[str, list[Prompt]]:
    """Prompts by domain, each domain's files mixed in a fixed random order, without duplicates."""
    found: dict[str, list[Prompt]] = {}
    seen: set[str] = set()
    for domain in dict.fromkeys(d for d, _ in sources):
        files = [texts(data) for d, texts in sources if d == domain]
        for file in files:
            random.Random(0).shuffle(file)
        rows = []
        for text in _interleave(files):
            if not 0 < len(text.strip()) < MAX_CHARACTERS:
                continue
            prompt = Prompt.from_text(text, domain=domain, split=split)
            if prompt.prompt_hash not in seen:
                seen.add(prompt.prompt_hash)
                rows.append(prompt)
        found[domain] = rows
    return found


def _interleave(rows: list[list[Any]]) -> list[Any]:
    """All elements, each list spread evenly over the result, so that any beginning has a mix."""
    places = [((i + 0.5) / len(row), n, i) for n, row in enumerate(rows) for i in range(len(row))]
    return [rows[n][i] for _, n, i in sorted(places)]
