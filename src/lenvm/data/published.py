"""The published system's JSON lines, raw and grouped, into trajectories and back.

A published row is text: `conversations` [{from, value}] of which the last is the answer,
`meta_info` {answer_token_length, lenvm_idx, split, dataset_name, model_name, temperature, top_p,
top_k, max_tokens}, `source_fields`, `images`. It has neither token ids nor a finish reason: the
ids are made anew with the generator's tokenizer and compared with `answer_token_length`, and an
answer that fills `max_tokens` counts as truncated. Grouped files hold the answers of a prompt side
by side.
"""

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenvm.data.completers import TextEncoder
from lenvm.data.prompt_sets import PROMPT_SETS
from lenvm.data.prompts import Prompt, Split, split_of
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.errors import DataError
from lenvm.files import claim, read_jsonl, replace_jsonl

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
SPEAKERS = {role: speaker for speaker, role in ROLES.items()}
DOMAINS = {s.repo: s.domain for s in PROMPT_SETS.values()}
SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")


@dataclass
class ImportReport:
    """What an import did; `str` is the message at its end."""

    path: Path
    num_written: int = 0
    num_truncated: int = 0
    num_mismatched: int = 0
    """Rows whose re-tokenised length is not `answer_token_length`."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""

    def __str__(self) -> str:
        parts = [
            f"{self.path}: {self.num_written} trajectories, {self.num_truncated} truncated, "
            f"{self.num_mismatched} of another length than the file says"
        ]
        parts += [f"{count} left out: {why}" for why, count in self.skipped.items()]
        return "; ".join(parts)


def import_published(
    sources: Sequence[Path],
    output: Path,
    encoder: TextEncoder,
    *,
    split: Split | None = None,
    validation: float = 0.1,
    test: float = 0.1,
) -> ImportReport:
    """Write trajectories of published files (raw or grouped).

    encoder: the generator's tokenizer. split: of every row (the published files are one split
    each); None splits by prompt hash. Answers with the same prompt become samples of one prompt,
    whatever their `lenvm_idx`. Raises DataError with file and line for a row of another form.
    """
    config = {
        "published": [str(p) for p in sources],
        "split": split or {"validation": validation, "test": test},
    }
    claim(output, "trajectories", config)
    report = ImportReport(output)
    samples: Counter[str] = Counter()
    prompt_ids: tuple[str, list[int]] = ("", [])
    with replace_jsonl(output) as writer:
        for where, base, row in _read_rows(sources):
            prompt, answer = _to_prompt(row, where, base)
            name = prompt.prompt_hash
            if not answer:
                report.skipped["empty answer"] += 1
                continue
            if prompt_ids[0] != name:  # grouped files encode each prompt once
                prompt_ids = (name, encoder.encode_prompt(prompt))
            trajectory, agrees = _to_trajectory(
                row["meta_info"],
                prompt,
                answer,
                samples[name],
                prompt_ids[1],
                encoder,
                split or split_of(name, validation, test),
            )
            samples[name] += 1
            writer.write_lines([trajectory.to_json_line()])
            report.num_written += 1
            report.num_truncated += not trajectory.is_complete
            report.num_mismatched += not agrees
        if not report.num_written:
            raise DataError(f"{', '.join(map(str, sources))}: no row to import")
    return report


def _read_rows(sources: Sequence[Path]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    for path in sources:
        for number, row in read_jsonl(path):
            where = f"{path}:{number}"
            if not isinstance(row.get("conversations"), list) or not isinstance(
                row.get("meta_info"), dict
            ):
                raise DataError(
                    f"{where}: a published row has conversations and meta_info; the fields are "
                    f"{', '.join(row)}"
                )
            yield where, path.parent, row


def _to_prompt(row: dict[str, Any], where: str, base: Path) -> tuple[Prompt, str]:
    """(prompt, answer) of a row."""
    messages = []
    for turn in row["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or "value" not in turn:
            raise DataError(
                f"{where}: a turn has from ({', '.join(ROLES)}) and value: {turn!r:.80}"
            )
        messages.append({"role": ROLES[turn["from"]], "content": str(turn["value"] or "")})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the conversation does not end with an answer from gpt")
    answer = messages.pop()["content"]
    images = tuple(str((base / image).absolute()) for image in row.get("images") or ())
    meta = row["meta_info"]
    return (
        Prompt(
            messages=[_split_image_marks(m) for m in messages] if images else messages,
            domain=DOMAINS.get(str(meta.get("dataset_name")), "unknown"),
            images=images,
            metadata={
                **(row.get("source_fields") or {}),
                "dataset_name": meta.get("dataset_name"),
                "lenvm_idx": meta.get("lenvm_idx"),
            },
        ),
        answer,
    )


def _split_image_marks(message: dict[str, Any]) -> dict[str, Any]:
    """`<image>` marks become image parts."""
    pieces = message["content"].split("<image>")
    if len(pieces) == 1:
        return message
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (i > 0)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return {**message, "content": parts}


def _to_trajectory(
    meta: Mapping[str, Any],
    prompt: Prompt,
    answer: str,
    index: int,
    prompt_ids: list[int],
    encoder: TextEncoder,
    split: Split,
) -> tuple[Trajectory, bool]:
    """(trajectory, whether its length is the file's)."""
    ids, said = encoder.encode_text(answer), meta.get("answer_token_length")
    most = meta.get("max_tokens")
    truncated = said is not None and most is not None and int(said) >= int(most)
    if not truncated:
        ids = [*ids, encoder.eos_token_id]
    usage = None
    if said is not None:
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": int(said)}
    return Trajectory(
        schema="lenvm.trajectory/1",
        id=f"{prompt.prompt_hash}-{index}",
        prompt_hash=prompt.prompt_hash,
        sample_index=index,
        domain=prompt.domain,
        split=split,
        messages=prompt.messages,
        prompt_token_ids=prompt_ids,
        completion_token_ids=ids,
        completion_text=answer,
        finish_reason="length" if truncated else "stop",
        usage=usage,
        sampling={k: meta[k] for k in SAMPLING if meta.get(k) is not None},
        model=str(meta.get("model_name", "unknown")),
        images=list(prompt.images),
        metadata=prompt.metadata,
    ), said is None or int(said) == len(ids)


def export_published(
    sources: Sequence[Path], output: Path, *, grouped: bool = True, seed: int | None = None
) -> int:
    """Write trajectories as published rows; returns how many.

    grouped: the completions of a prompt side by side (memory: the byte offsets of the lines); seed
    shuffles the groups. `lenvm_idx` numbers the prompts in order of their first completion. What
    the published form has no place for (token ids, finish reason, control) is left out.
    """
    numbers: dict[str, int] = {}
    for t in read_trajectories(*sources):
        numbers.setdefault(t.prompt_hash, len(numbers))
    config = {"exported": [str(p) for p in sources], "grouped": grouped, "seed": seed}
    claim(output, "published", config)
    count = 0
    with replace_jsonl(output) as writer:
        for t in _read_grouped(sources, seed) if grouped else read_trajectories(*sources):
            writer.write(to_published(t, numbers[t.prompt_hash]))
            count += 1
    return count


def _read_grouped(sources: Sequence[Path], seed: int | None) -> Iterator[Trajectory]:
    """Trajectories prompt by prompt, found again by their places in the files."""
    groups: dict[str, array[int]] = {}
    for number, path in enumerate(sources):
        with path.open("rb") as file:
            place = 0
            for line in file:
                if line.endswith(b"\n") and line.strip():
                    name = json.loads(line)["prompt_hash"]
                    groups.setdefault(name, array("q")).extend((number, place))
                place += len(line)
    order = list(groups)
    if seed is not None:
        random.Random(seed).shuffle(order)
    files = [path.open("rb") for path in sources]
    try:
        for name in order:
            places = groups[name]
            for number, place in zip(places[::2], places[1::2], strict=True):
                files[number].seek(place)
                yield Trajectory.model_validate_json(files[number].readline())
    finally:
        for file in files:
            file.close()


def to_published(trajectory: Trajectory, lenvm_idx: int) -> dict[str, Any]:
    """One published row."""
    t = trajectory
    messages = t.messages or [{"role": "user", "content": t.prompt_text or ""}]
    turns = [
        {"from": SPEAKERS.get(m["role"], "human"), "value": _to_value(m["content"])}
        for m in messages
    ]
    if t.images and not any("<image>" in turn["value"] for turn in turns):
        last = max(i for i, turn in enumerate(turns) if turn["from"] == "human")
        turns[last]["value"] = "<image>" * len(t.images) + turns[last]["value"]
    kept = {k: v for k, v in t.metadata.items() if k not in ("dataset_name", "lenvm_idx")}
    row: dict[str, Any] = {
        "conversations": [*turns, {"from": "gpt", "value": t.completion_text}],
        "meta_info": {
            "answer_token_length": t.length,
            "lenvm_idx": lenvm_idx,
            "split": t.split,
            "dataset_name": t.metadata.get("dataset_name") or t.domain,
            "model_name": t.model,
            **{k: t.sampling.get(k) for k in SAMPLING},
        },
        "source_fields": kept,
    }
    if t.images:
        row["images"] = t.images
    return row


def _to_value(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(
        "<image>" if part.get("type") in ("image", "image_url") else str(part.get("text", ""))
        for part in content
    )
