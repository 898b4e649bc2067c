"""Tokenizers: loading, prompts to token ids, and telling two vocabularies apart."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lenvm.errors import InputError
from lenvm.model.reading import reading

Messages = Sequence[dict[str, Any]]


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or hub id. CheckpointError where it cannot be read."""
    from transformers import AutoTokenizer

    with reading("a tokenizer", path):
        return AutoTokenizer.from_pretrained(path)


def hash_tokenizer(tokenizer: Any) -> str:
    """16 hex digits over the vocabulary (token and id, specials included), without the `[PAD7]`,
    `[PAD8]` ... with which a GGUF file fills it up to the embeddings: the same model from a hub has
    none."""
    tokens = [(t, i) for t, i in tokenizer.get_vocab().items() if t != f"[PAD{i}]"]
    vocabulary = sorted(tokens, key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def describe_difference(expected: Any, found: Any, *, limit: int = 3) -> str:
    """First tokens with different ids in two tokenizers, in words."""
    if expected is None:
        return f"its vocabulary has {len(found.get_vocab())} tokens with other ids"
    left, right = expected.get_vocab(), found.get_vocab()
    rows = [
        f"{token!r} is {left.get(token, 'absent')} there and {right.get(token, 'absent')} here"
        for token in sorted({*left, *right}, key=lambda t: left.get(t, right.get(t, 0)))
        if left.get(token) != right.get(token)
    ]
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"{len(left)} against {len(right)} tokens; " + "; ".join(rows[:limit]) + more


def find_eos_token_ids(path: str, tokenizer: Any) -> list[int]:
    """Ids that end a completion, by generation config, config and tokenizer together.

    Raises CheckpointError where one of the files is damaged.
    """
    from transformers import AutoConfig, GenerationConfig

    found: set[int] = set()
    with reading("a configuration", path):
        sources = [
            tokenizer.eos_token_id,
            AutoConfig.from_pretrained(path).get_text_config().eos_token_id,
        ]
        try:
            sources.append(GenerationConfig.from_pretrained(path).eos_token_id)
        except OSError:  # without generation_config.json the two other sources decide
            if (Path(path) / "generation_config.json").exists():
                raise
    for ids in sources:
        found.update(ids if isinstance(ids, Iterable) else [ids] if ids is not None else [])
    return sorted(found)


MAX_CONTROL_TOKENS = 48
CONTROL_FIELDS = [
    *("equal_to", "at_most", "at_least", "shortest", "price", "tilt"),
    *("remaining", "tolerance"),
]


def encode_control(tokenizer: Any, control: Mapping[str, Any]) -> list[int]:
    """What a length control asks for, as text of one form whatever else it sets:
    `[length: equal_to 128 tolerance 0.05]`. At most MAX_CONTROL_TOKENS."""
    said = [f"{k} {float(control[k]):g}" for k in CONTROL_FIELDS if control.get(k) is not None]
    text = f"[length: {' '.join(said)} ]\n"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:MAX_CONTROL_TOKENS]


def encode_prompt(tokenizer: Any, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt as the generator sees it.

    Chat messages go through the chat template with the assistant's turn opened; a string is encoded
    as it is. Raises InputError for an empty prompt or messages that the template does not take.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt).input_ids)
    else:
        try:
            ids = list(
                tokenizer.apply_chat_template(
                    list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            )
        except Exception as error:  # templates raise whatever their author chose (jinja2 errors)
            raise InputError(f"the chat template does not take these messages: {error}") from error
    if not ids:
        raise InputError("the prompt is empty: it needs at least one token")
    return ids
