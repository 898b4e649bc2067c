"""Trajectory files as memory-mapped token arrays, and the sequences of a split chosen from them.

A JSON-lines file is parsed once; its tokens and an index of the sequences stand beside it in a
hidden folder and are mapped afterwards, so that a data set may be larger than memory and starting
costs nothing. What goes into which batch is `data/packing.py`.

Shape legend: S sequences (one completion each, its prompt in front), G prompts.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import random
import shutil
import tempfile
import unicodedata
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lenvm.data.images import resolve_images
from lenvm.data.trajectory import (
    IdCheck,
    Trajectory,
    describe_repeated,
    hash_text,
    read_trajectories,
)
from lenvm.errors import DataError, DataWarning, InputError
from lenvm.files import explaining, read_json, write_json

STORE_VERSION = 4
NUM_TEXTS = 256
"""Texts of a file that are compared with their tokens: of a tenth of wrong ones, 26."""
SAMPLE_OF_TEXT = 200
"""Characters of each that are kept."""
WINDOW = 20
"""Characters, blanks aside, that the tokens must spell."""
MANY_MISSPELT = 0.05
"""Share of texts from which on a file is refused."""
Censoring = Literal["drop", "one_sided", "bootstrap"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Array = np.ndarray[Any, np.dtype[Any]]
INDEX = np.dtype(
    [
        ("start", "<i8"),
        ("prompt_length", "<i4"),
        ("length", "<i4"),  # of the completion
        ("complete", "?"),
        ("split", "i1"),
        ("domain", "<i2"),
        ("group", "<i8"),  # hash of the prompt
        ("images", "<i4"),  # entry of `images`, -1 for none
        ("reward", "<f4"),  # NaN for none
    ]
)


@dataclass(frozen=True)
class ControlPrefix:
    """How a length control is written in front of a prompt. `name` keeps the stores apart."""

    name: str
    encode: Callable[[Mapping[str, Any]], list[int]]


@dataclass(frozen=True)
class TokenStore:
    """One trajectory file: `tokens` int32, mapped; `index` [S] of INDEX records."""

    path: Path
    tokens: Array
    index: Array
    domains: tuple[str, ...]
    images: tuple[tuple[str, ...], ...]
    """Image files of prompts, absolute."""
    sha256: str
    """Of the trajectory file."""
    texts: tuple[tuple[int, str], ...] = ()
    """(row, beginning of its text) of completions with a text, drawn from all over the file."""
    repeated: tuple[int, str] = (0, "")
    """Completions whose id an earlier one has, and the first such id."""

    @classmethod
    def load(cls, path: Path, prefix: "ControlPrefix | None" = None) -> "TokenStore":
        """Map a trajectory file, parsing it first where its store is missing or out of date.

        prefix: what stands in front of the prompts of guided completions.

        Several processes may call this at once: one builds, the others wait. Raises DataError for a
        file that is missing, empty or malformed, or a folder that cannot be written to.
        """
        if not path.is_file():
            raise DataError(f"no trajectory file {path}")
        folder = path.with_name(f".{path.name}{'.' + prefix.name if prefix else ''}.tokens")
        with _locked(folder.with_suffix(".lock")):
            if not _is_current(path, folder):
                _build(path, folder, prefix)
        meta = read_json(folder / "meta.json")
        tokens: Array = np.memmap(folder / "tokens.i32", dtype="<i4", mode="r")
        index = np.load(folder / "index.npy", mmap_mode="r")
        images = tuple(tuple(files) for files in meta["images"])
        texts = tuple((row, text) for row, text in meta["texts"])
        domains, repeated = tuple(meta["domains"]), tuple(meta["repeated"])
        return cls(path, tokens, index, domains, images, meta["sha256"], texts, repeated)

    def check_tokenizer(self, tokenizer: Any, name: str) -> None:
        """Whether the completions' tokens spell their texts with the tokenizer of `name`.

        Token ids of another tokenizer may well lie inside the vocabulary, and a file may be mixed
        of two generators'. DataError where all texts are misspelt, or more than one and
        `MANY_MISSPELT` of them; a DataWarning where fewer are.
        """
        wrong = []
        for row, text in self.texts:
            entry = self.index[row]
            start = int(entry["start"]) + int(entry["prompt_length"])
            ids = self.tokens[start : start + int(entry["length"])].tolist()
            if not spells(tokenizer, ids, text):
                wrong.append((row, text, tokenizer.decode(ids)))
        if not wrong:
            return
        row, text, read = wrong[0]
        found = (
            f"the tokens of {text[:40]!r} (completion {row + 1} of the file) spell {read[:40]!r}"
        )
        if len(wrong) == len(self.texts):
            raise DataError(
                f"{self.path} was sampled with another tokenizer than that of {name}: {found}. "
                "Train on the backbone that sampled it, or sample again."
            )
        share = f"{len(wrong)} of {len(self.texts)} completions looked at"
        if len(wrong) > 1 and len(wrong) >= MANY_MISSPELT * len(self.texts):
            raise DataError(
                f"{self.path}: {share} do not spell their text with the tokenizer of {name}: "
                f"{found}. Were files of two generators mixed? Keep the rows of the backbone that "
                "is trained; a text that was changed on purpose may be left empty."
            )
        warnings.warn(
            f"{self.path}: {share} does not spell its text with the tokenizer of {name}: {found}",
            DataWarning,
            stacklevel=2,
        )

    def warn_of_repeated(self) -> None:
        """DataWarning where ids stand in the file more than once."""
        if message := describe_repeated(self.path, *self.repeated):
            warnings.warn(message, DataWarning, stacklevel=2)


def spells(tokenizer: Any, ids: list[int], text: str) -> bool:
    """Whether tokens spell a text, as far as a server would have it from them.

    Servers trim texts, leave out special tokens or a chain of thought, and end in the middle of a
    character: so the text's first or last characters are looked for in what the tokens say, with
    and without special tokens; blanks, case, forms of a character and broken ones set aside.
    """
    said = _plain(text)
    windows = {said[:WINDOW], said[-WINDOW:]}
    for part in (ids[: 4 * SAMPLE_OF_TEXT], ids):  # mostly the beginning tells
        for skip in (True, False):
            read = _plain(tokenizer.decode(part, skip_special_tokens=skip))
            if any(window in read for window in windows):
                return True
    return False


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.replace("\ufffd", "")).casefold()
    return "".join(text.split())


def _is_current(path: Path, folder: Path) -> bool:
    meta_path = folder / "meta.json"
    if not meta_path.exists():
        return False
    meta, stat = read_json(meta_path), path.stat()
    if meta["version"] != STORE_VERSION or meta["size"] != stat.st_size:
        return False
    if meta["mtime_ns"] == stat.st_mtime_ns:
        return True
    if meta["sha256"] != hash_file(path):  # touched or copied: what it holds decides
        return False
    write_json(meta_path, {**meta, "mtime_ns": stat.st_mtime_ns})
    return True


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(path: Path, folder: Path, prefix: ControlPrefix | None) -> None:
    stat, sha256 = path.stat(), hash_file(path)
    with explaining(folder):
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            _write_store(path, part, stat, sha256, prefix)
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write_store(
    path: Path, part: Path, stat: os.stat_result, sha256: str, prefix: ControlPrefix | None
) -> None:
    ids = IdCheck(path)
    rows, domains, images, texts = _write_tokens(path, part / "tokens.i32", prefix, ids)
    index = io.BytesIO()  # to a file, np.save passes over a full disk
    np.save(index, np.array(rows, dtype=INDEX))
    (part / "index.npy").write_bytes(index.getvalue())
    meta = {
        "version": STORE_VERSION,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": sha256,
        "domains": domains,
        "images": images,
        "texts": texts,
        "repeated": [ids.num_repeated, ids.first],
    }
    write_json(part / "meta.json", meta)


def _write_tokens(
    path: Path, out: Path, prefix: ControlPrefix | None, ids: IdCheck
) -> tuple[list[Any], list[str], list[list[str]], list[tuple[int, str]]]:
    rows: list[Any] = []
    texts: list[tuple[int, str]] = []
    num_texts, chance = 0, random.Random(0)
    domains: dict[str, int] = {}
    images: dict[tuple[str, ...], int] = {}
    start = 0
    with out.open("wb") as file:
        for t in ids.watch(read_trajectories(path)):
            files = tuple(resolve_images(t.images, path.parent))
            if t.completion_text.strip():  # each text of the file is as likely to stay
                place = num_texts if num_texts < NUM_TEXTS else chance.randrange(num_texts + 1)
                if place < NUM_TEXTS:
                    kept = (len(rows), t.completion_text[:SAMPLE_OF_TEXT])
                    texts[place : place + 1] = [kept]
                num_texts += 1
            prompt = t.prompt_token_ids
            if prefix is not None and t.length_control is not None:
                prompt = [*prefix.encode(t.length_control), *prompt]
            array("i", prompt).tofile(file)
            array("i", t.completion_token_ids).tofile(file)
            rows.append(
                (
                    start,
                    len(prompt),
                    t.length,
                    t.is_complete,
                    SPLITS.index(t.split),
                    domains.setdefault(t.domain, len(domains)),
                    hash_text(t.prompt_hash),
                    images.setdefault(files, len(images)) if files else -1,
                    math.nan if t.reward is None else t.reward,
                )
            )
            start += len(prompt) + t.length
    return rows, list(domains), [list(files) for files in images], sorted(texts)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; the parsed form of a trajectory file stands "
            "beside it, so copy the file to a folder that can be written to"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Sequences:
    """The sequences of one split over all files: arrays [S] in file order."""

    stores: tuple[TokenStore, ...]
    source: Array
    """Which store."""
    start: Array
    prompt_lengths: Array
    lengths: Array
    """Of the completions, tokens, the ending token counted."""
    complete: Array
    """False: cut off, the length is a lower bound."""
    groups: Array
    """Hash of the prompt: completions of one prompt share it."""
    domain: Array
    """Entry of `domains`."""
    image_sets: Array
    """Entry of the store's `images`, -1 for none."""
    is_endless: Array
    """bool: counts as an answer that never ends, as it repeats itself so much or is no good; not
    `complete`."""
    domains: tuple[str, ...]
    dropped: Counter[str] = field(default_factory=Counter)
    """What was left out, by reason."""

    @classmethod
    def select(
        cls,
        stores: Sequence[TokenStore],
        split: Split | None,
        *,
        max_tokens: int = 8192,
        censoring: Censoring = "drop",
        max_prompts: int | None = None,
        max_per_prompt: int | None = None,
        loops_above: float | None = None,
        rewards_below: float | None = None,
        seed: int = 0,
    ) -> "Sequences":
        """The sequences of `split` (None: of all) that can be used.

        Sequences over `max_tokens` are dropped and counted, never cut; truncated completions too
        where `censoring` is "drop". Down-sampling keeps `max_prompts` prompts and `max_per_prompt`
        completions of each, chosen by hash and seed, so that a smaller choice is part of a larger.
        Completions whose `repetition` is over `loops_above`, or whose reward is under
        `rewards_below`, count as answers that never end, and are kept whatever the censoring.
        """
        index = np.concatenate([np.asarray(store.index) for store in stores])
        source = np.repeat(np.arange(len(stores)), [len(store.index) for store in stores])
        domains = sorted({name for store in stores for name in store.domains})
        tables = [np.array([domains.index(n) for n in s.domains], np.int64) for s in stores]
        domain = np.concatenate([t[s.index["domain"]] for t, s in zip(tables, stores, strict=True)])
        keep = np.ones(len(index), bool)
        if split is not None:
            keep &= index["split"] == SPLITS.index(split)
        is_endless = np.zeros(len(index), bool)
        if loops_above is not None:
            for i in np.flatnonzero(keep):
                first = int(index["start"][i]) + int(index["prompt_length"][i])
                ids = stores[source[i]].tokens[first : first + int(index["length"][i])]
                is_endless[i] = repetition(ids) > loops_above
        if rewards_below is not None:
            if np.isnan(index["reward"]).all():
                raise DataError(
                    f"rewards_below is {rewards_below}, and no completion has a reward; put one in "
                    "each line of the file, or grade answers with `lenvm grade`"
                )
            is_endless |= index["reward"] < rewards_below  # not where there is none: NaN
        dropped: Counter[str] = Counter()

        def drop(reason: str, bad: Array) -> None:
            nonlocal keep
            dropped[reason] += int((keep & bad).sum())
            keep = keep & ~bad

        if censoring == "drop":
            drop("truncated", ~index["complete"] & ~is_endless)
        total = index["prompt_length"].astype(np.int64) + index["length"]
        drop("too_long", total > max_tokens)
        drop("not_sampled", ~_downsample(index["group"], keep, max_prompts, max_per_prompt, seed))
        rows = np.flatnonzero(keep)
        index = index[rows]
        return cls(
            stores=tuple(stores),
            source=source[rows],
            start=index["start"].astype(np.int64),
            prompt_lengths=index["prompt_length"].astype(np.int64),
            lengths=index["length"].astype(np.int64),
            complete=index["complete"] & ~is_endless[rows],
            groups=index["group"],
            domain=domain[rows],
            image_sets=index["images"],
            is_endless=is_endless[rows],
            domains=tuple(domains),
            dropped=+dropped,
        )

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory], **options: Any) -> "Sequences":
        """The same from trajectories in memory (`options` as of `select`), all splits."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "t.jsonl"
            path.write_text("".join(json.dumps(t.to_json()) + "\n" for t in trajectories))
            store = TokenStore.load(path)
            store = TokenStore(
                path, store.tokens.copy(), store.index.copy(), store.domains, store.images, ""
            )
        return cls.select([store], None, **options)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def totals(self) -> Array:
        """[S] tokens of each sequence, prompt and completion."""
        return self.prompt_lengths + self.lengths

    def tokens(self, i: int) -> Array:
        """Token ids of sequence i, int32."""
        start = self.start[i]
        store = self.stores[self.source[i]]
        ids: Array = store.tokens[start : start + self.prompt_lengths[i] + self.lengths[i]]
        return ids

    def images(self, i: int) -> tuple[str, ...]:
        """Image files of sequence i's prompt."""
        entry = self.image_sets[i]
        return () if entry < 0 else self.stores[self.source[i]].images[entry]

    def check_vocabulary(self, size: int) -> None:
        """DataError where a token id lies outside a vocabulary of `size` tokens."""
        for i in range(len(self)):
            ids = self.tokens(i)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= size:
                raise DataError(
                    f"{self.stores[self.source[i]].path} holds token {high if low >= 0 else low}, "
                    f"but the backbone's vocabulary has {size}: it was sampled with another "
                    "tokenizer. Train on the backbone that sampled it, or sample again."
                )


def repetition(ids: Array) -> float:
    """Share of the 4-grams of tokens that stood before in the same completion (rep-4)."""
    count = len(ids) - 3
    if count < 1:
        return 0.0
    different = len(np.unique(np.lib.stride_tricks.sliding_window_view(ids, 4), axis=0))
    return 1.0 - different / count


def mixing_weights(weights: Mapping[str, float], stores: Sequence[TokenStore]) -> Array:
    """[stores] how often an epoch sees each file: 0.5 a fresh half of it, 2 all of it twice.

    `weights` by file name or path; a file without one counts once. Raises InputError for a weight
    that is not positive or names no file.
    """
    found = np.ones(len(stores))
    for name, weight in weights.items():
        matches = [i for i, s in enumerate(stores) if name in (str(s.path), s.path.name)]
        if not matches or not 0 < weight < float("inf"):
            files = ", ".join(s.path.name for s in stores)
            raise InputError(
                f"weight of {name!r} is {weight}; allowed: a positive number for one of {files}"
            )
        found[matches] = weight
    return found


def _downsample(
    groups: Array, keep: Array, prompts: int | None, per_prompt: int | None, seed: int
) -> Array:
    """Mask [S]: the sequences of `keep` that stay; chosen by rank of a seeded hash."""
    chosen = keep.copy()
    if prompts is not None:
        names = np.unique(groups[keep])
        names = names[np.argsort(scramble(names, seed), kind="stable")][:prompts]
        chosen &= np.isin(groups, names)
    if per_prompt is not None:
        rows = np.flatnonzero(chosen)
        rank = scramble(groups[rows] + np.arange(len(groups))[rows], seed + 1)
        order = rows[np.lexsort((rank, groups[rows]))]
        first = np.r_[True, groups[order][1:] != groups[order][:-1]] if len(order) else []
        starts = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
        chosen[:] = False
        chosen[order[np.arange(len(order)) - starts < per_prompt]] = True
    return chosen | ~keep


def scramble(x: Array, seed: int) -> Array:
    """A 64-bit mix of integers (splitmix64's finaliser): the same everywhere, for ever."""
    with np.errstate(over="ignore"):
        z = x.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
