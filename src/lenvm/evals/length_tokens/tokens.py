"""The text of single tokens as a person should see it: white space visible, no bytes lost."""

from collections.abc import Sequence
from typing import Any

MAX_PIECES = 8
"""Tokens that one character can have: it has four bytes at most, emoji sequences more."""
VISIBLE = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "␣"}


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Text of each token with its leading space, as it stands in the answer.

    A token that is part of a character (bytes of UTF-8) is shown by its name in the vocabulary.
    """
    names = tokenizer.convert_ids_to_tokens(list(token_ids))
    texts = []
    for token_id, name in zip(token_ids, names, strict=True):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in text:
            text = name
        elif name.startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece drops the space of the first token it decodes
        texts.append(text)
    return texts


def split_text(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Text of each token such that together they are the answer's text. [L]

    A character that several tokens make up stands at the last of them, the others are empty.
    """
    texts: list[str] = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[start:end]), skip_special_tokens=False)
        if text.endswith("\ufffd") and end < len(token_ids) and end - start < MAX_PIECES:
            texts.append("")
            continue
        (piece,) = token_texts(tokenizer, token_ids[start:end]) if end == start + 1 else (text,)
        texts.append(piece)
        start = end
    return texts


def merge_key(text: str) -> str:
    """One key for "Wait", "wait" and " wait"; a token of white space alone stays itself."""
    stripped = text.strip()
    return stripped.casefold() if stripped else text


def make_visible(text: str) -> str:
    """White space that would not be seen, made visible; single spaces inside are left alone."""
    inner = text.strip(" ")
    lead, tail = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    if not inner:
        return VISIBLE[" "] * len(text)
    shown = "".join(VISIBLE.get(c, c) if c != " " else c for c in inner)
    return VISIBLE[" "] * lead + shown + VISIBLE[" "] * tail
