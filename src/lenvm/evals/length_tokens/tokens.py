"""The text of single tokens as a person should see it: white space visible, no bytes lost."""

from collections.abc import Sequence
from typing import Any

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
