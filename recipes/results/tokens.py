"""Sampled completions as token ids on disk: small enough to travel, safe to kill, made to grow.

A folder of three files that are only ever appended to, and perhaps one that is replaced:

    prompts.jsonl       one line per prompt: hash, domain, split, messages, token ids
    completions.jsonl   one line per completion: p (prompt's line), k (sample), n (tokens), stop,
                        lp (mean log-probability), control
    tokens.u32          the completions' token ids, little-endian
    rewards.json        of each completion, in their order: 1 right, 0 wrong

Texts are left out: the tokenizer gives them back.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import SCHEMA
from lenvm.engines.transformers import Completion
from lenvm.errors import DataError
from lenvm.files import JsonlWriter, read_json, read_jsonl, write_json

ITEM = np.dtype("<u4")


class TokenFolder:
    """Reads and appends; one writer at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        return (self.folder / "completions.jsonl").exists()

    def prompts(self) -> list[dict[str, Any]]:
        return _read(self.folder / "prompts.jsonl")

    def completions(self) -> list[dict[str, Any]]:
        """Those whose tokens are all there: a killed writer may leave an index line without."""
        path = self.folder / "tokens.u32"
        room = path.stat().st_size // ITEM.itemsize if path.exists() else 0
        found, used = [], 0
        for row in _read(self.folder / "completions.jsonl"):
            used += row["n"]
            if used > room:
                break
            found.append(row)
        return found

    @property
    def _rewards_file(self) -> Path:
        return self.folder / "rewards.json"

    def rewards(self) -> list[float | None]:
        """Of each completion that a step `grade` found when it ran."""
        if not self._rewards_file.exists():
            return []
        found: list[float | None] = read_json(self._rewards_file)
        return found

    def write_rewards(self, rewards: Sequence[float | None]) -> None:
        write_json(self._rewards_file, list(rewards))

    def summary(self) -> dict[str, Any]:
        """Counts: prompts, completions, their tokens (`num_read`: with the prompt of each), those
        cut off, completions by domain."""
        prompts, rows = self.prompts(), self.completions()
        domains: dict[str, int] = {}
        for row in rows:
            domain = prompts[row["p"]]["domain"]
            domains[domain] = domains.get(domain, 0) + 1
        return {
            "num_prompts": len({r["p"] for r in rows}),
            "num_completions": len(rows),
            "num_tokens": sum(r["n"] for r in rows),
            "num_read": sum(r["n"] + len(prompts[r["p"]]["ids"]) for r in rows),
            "num_truncated": sum(not r["stop"] for r in rows),
            "completions_by_domain": domains,
        }

    def write(self) -> "TokenWriter":
        return TokenWriter(self)

    def trajectories(
        self, model: str = "", sampling: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Trajectory records, without their texts."""
        prompts, rows = self.prompts(), self.completions()
        if not rows:
            raise DataError(f"{self.folder} holds no completions")
        tokens = np.fromfile(self.folder / "tokens.u32", dtype=ITEM)
        start = 0
        rewards = self.rewards()
        for row, reward in itertools.zip_longest(rows, rewards[: len(rows)]):
            prompt = prompts[row["p"]]
            ids = tokens[start : start + row["n"]].tolist()
            start += row["n"]
            yield {
                "schema": SCHEMA,
                "id": f"{prompt['hash']}-{row['k']}",
                "prompt_hash": prompt["hash"],
                "sample_index": row["k"],
                "domain": prompt["domain"],
                "split": prompt["split"],
                "messages": prompt["messages"],
                "prompt_token_ids": prompt["ids"],
                "completion_token_ids": ids,
                "completion_text": "",
                "finish_reason": "stop" if row["stop"] else "length",
                "sampling": dict(sampling or {}),
                **({"length_control": row["control"]} if row.get("control") else {}),
                **({} if reward is None else {"reward": reward}),
                "model": model,
            }

    def export(self, path: Path) -> None:
        """Write the trajectory file, unless it is there and newer than what it is made of."""
        if not self.exists:
            raise DataError(f"no sampled completions in {self.folder}")
        sources = (self.folder / "completions.jsonl", self._rewards_file)
        newest = max(file.stat().st_mtime_ns for file in sources if file.exists())
        if path.exists() and path.stat().st_mtime_ns > newest:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several may export it at once
        with part.open("w", encoding="utf-8") as file:
            for row in self.trajectories():
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
        part.replace(path)


class TokenWriter:
    """Appends completions; `done` holds the (prompt hash, sample) pairs that are there."""

    def __init__(self, folder: TokenFolder) -> None:
        place = folder.folder
        place.mkdir(parents=True, exist_ok=True)
        rows = folder.completions() if folder.exists else []
        if folder.exists:
            _cut(place, rows)
        prompts = folder.prompts() if folder.exists else []
        self._number = {p["hash"]: i for i, p in enumerate(prompts)}
        self.done = {(prompts[r["p"]]["hash"], r["k"]) for r in rows}
        self._prompts = JsonlWriter(place / "prompts.jsonl")
        self._completions = JsonlWriter(place / "completions.jsonl")
        self._tokens = (place / "tokens.u32").open("ab")

    def add(self, prompt: Prompt, sample: int, completion: Completion) -> None:
        number = self._number.get(prompt.prompt_hash)
        if number is None:
            number = self._number[prompt.prompt_hash] = len(self._number)
            self._prompts.write(
                {
                    "hash": prompt.prompt_hash,
                    "domain": prompt.domain,
                    "split": prompt.split,
                    "messages": prompt.messages,
                    "ids": list(completion.request.prompt_token_ids),
                }
            )
        control = completion.request.control
        self._tokens.write(np.array(completion.token_ids, dtype=ITEM).tobytes())
        self._tokens.flush()
        row: dict[str, Any] = {
            "p": number,
            "k": sample,
            "n": len(completion.token_ids),
            "stop": completion.ended_by_itself,
            "lp": round(sum(completion.log_probs) / len(completion.log_probs), 4),
        }
        if control is not None:
            row["control"] = control.model_dump(exclude_defaults=True)
        self._completions.write(row)
        self.done.add((prompt.prompt_hash, sample))

    def close(self) -> None:
        for file in (self._prompts, self._completions, self._tokens):
            file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def _cut(place: Path, rows: list[dict[str, Any]]) -> None:
    """Cut both files back to the completions that are whole."""
    tokens = place / "tokens.u32"
    size = sum(r["n"] for r in rows) * ITEM.itemsize
    if tokens.exists() and tokens.stat().st_size != size:
        with tokens.open("rb+") as file:
            file.truncate(size)
    index = place / "completions.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    if len(lines) != len(rows):
        index.write_bytes(b"".join(lines[: len(rows)]))
