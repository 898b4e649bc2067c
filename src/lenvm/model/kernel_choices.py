"""Which kernels run a step: measured on a kind of GPU, written down, looked up by shape.

`kernel_choices.json` is what `benchmarks/scorer_kernels.py --tune` found fastest, and right, on a
GPU. Shapes and devices that were not measured run cuBLAS with small kernels between (`PLAIN`).
Its "trimmed_records" are for steps whose packed candidates fill little of their bucket (`trims`).
A record without the time of a whole step (`step_us`) is a proposal, taken where LENVM_TRY_KERNELS=1
stands in the environment, which is for measuring it.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_suffix(".json")
MAX_SPLITS = 32
"""Most parts that one request's prefix is read in."""
MAX_CLUSTER = 8
"""The same where the parts' blocks are a cluster: what every GPU that has them allows."""
SMALLEST_TILE = 16
"""Rows that tiles of the fused products have at least."""


@dataclass(frozen=True)
class Tile:
    """How a fused product is cut: BM tokens x BN outputs x BK inputs a step."""

    BM: int
    BN: int
    BK: int = 64
    splits: int = 1
    """Parts along the inputs; `out` and `down` only."""
    warps: int = 4
    stages: int = 4
    hopper: bool = False
    """A kernel of `hopper/`, where BK is 64 and warps follow from BM."""
    shares: int = 1
    """Neighbouring row tiles whose weights are fetched once for all of them; `hopper/` only."""


@dataclass(frozen=True)
class AttentionChoice:
    """How `attention_kernels.candidate_attention` cuts its work."""

    block: int = 64
    """Most query rows of a program."""
    waves: int = 1
    """Prefixes are split so that the programs fill the GPU about so many times."""
    stages: int = 5
    """Pages on their way at once; at most 3 where no copy engine brings them. `hopper/` has its own
    number."""
    merges: bool = False
    """The split that ends last merges them, in place of a second kernel."""
    hopper: bool = False
    """The kernel of `hopper/`, where a block takes 128 query rows and merges splits by itself."""

    def count_splits(self, num_programs: int, num_units: int, most: int) -> int:
        """Parts of each prefix, a power of two, so that the programs fill a GPU of `num_units`
        multiprocessors about `waves` times; at most `most`. Clusters of four blocks and more, each
        of which has a multiprocessor to itself, fill half of them: with more not all begin at
        once."""
        most = min(most, MAX_CLUSTER if self.hopper else MAX_SPLITS)
        parts = self.waves * num_units // num_programs
        if self.hopper and parts >= 4:
            parts //= 2
        return 1 << max(1, min(parts, most)).bit_length() - 1


@dataclass(frozen=True)
class Choices:
    """None: cuBLAS, with small kernels before and after."""

    qkv: Tile | None = None
    out: Tile | None = None
    gate_up: Tile | None = None
    down: Tile | None = None
    attention: AttentionChoice = AttentionChoice()
    pdl: bool = False
    """A kernel is launched while the one before it still ends (Hopper and later)."""
    trims: bool = False
    """Kernels end where the packed candidates do, which they read on the device. cuBLAS would
    compute the rest of the bucket, so all four products are fused ones."""

    def __post_init__(self) -> None:
        if self.trims and len(self.tiles) < len(_PRODUCTS):
            raise ValueError(f"trims needs tiles of {_PRODUCTS}; got {tuple(self.tiles)}")

    @property
    def tiles(self) -> dict[str, Tile]:
        named = {"qkv": self.qkv, "out": self.out, "gate_up": self.gate_up, "down": self.down}
        return {name: tile for name, tile in named.items() if tile is not None}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Choices":
        tiles = {k: Tile(**v) if v else None for k, v in values.items() if k in _PRODUCTS}
        attention = AttentionChoice(**values["attention"])
        trims = values.get("trims", False)
        return cls(**tiles, attention=attention, pdl=values["pdl"], trims=trims)


_PRODUCTS = ("qkv", "out", "gate_up", "down")
PLAIN = Choices()


@dataclass(frozen=True)
class LayerShape:
    """What a measurement holds for."""

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_size: int


def device_kind(device: torch.device) -> str:
    """What measurements are shared by: compute capability and multiprocessors (H100 = H200)."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"sm_{found.major}{found.minor} x{found.multi_processor_count}"


def choose(
    device: torch.device, shape: LayerShape, num_tokens: int, trims: bool = False
) -> Choices:
    """What was fastest for a bucket of that many packed tokens, trimmed or not; up to twice as many
    or half as many count as measured too, and fewer than SMALLEST_TILE as so many as were measured:
    a tile of rows is no smaller. `PLAIN` where nothing was."""
    records = _records().get((device_kind(device), shape, trims), {})
    least = min(records, default=0)
    if least <= SMALLEST_TILE:
        num_tokens = max(num_tokens, least)
    near = [n for n in records if n <= 2 * num_tokens and num_tokens <= 2 * n]
    if not near:
        return PLAIN
    return records[min(near, key=lambda n: max(n / num_tokens, num_tokens / n))]


@cache
def _records() -> dict[tuple[str, LayerShape, bool], dict[int, Choices]]:
    found: dict[tuple[str, LayerShape, bool], dict[int, Choices]] = {}
    told = json.loads(PATH.read_text())
    proposed = os.environ.get("LENVM_TRY_KERNELS") == "1"
    for record in [*told["records"], *told["trimmed_records"]]:
        if "step_us" not in record and not proposed:
            continue
        choices = Choices.from_json(record["choices"])
        key = record["device_kind"], LayerShape(**record["shape"]), choices.trims
        found.setdefault(key, {})[record["num_tokens"]] = choices
    return found


class TrimHint:
    """Whether the next step should be trimmed: from what steps gone by were filled to.

    About speed alone; results are right either way."""

    BEGIN = 0.6
    """Trim when less than this share of the slots was real lately ..."""
    END = 0.75
    """... and until this share is, so that shares between the two change nothing."""

    def __init__(self) -> None:
        self.trims = False
        self._share = 1.0

    def note(self, share: float) -> None:
        """share: real candidates of a step / its slots, 0 to 1. A step counts for an eighth."""
        self._share += (share - self._share) / 8
        self.trims = self._share < (self.END if self.trims else self.BEGIN)
