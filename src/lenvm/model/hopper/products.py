"""Matrix products of a Llama-shaped layer on Hopper, with their small work in the epilogues.

A tile's weights are on their way before the kernel before has ended (programmatic dependent
launch). No norm kernel is left: `project_out` leaves residual * norm weight, undivided, with parts of the
rows' sums of squares, and the next product divides its result by the rows' rms.

Shape legend: N packed tokens, H hidden size, I MLP size, Hq query heads, Hkv key heads, D head
size, T column tiles of a `project_out`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lenvm.model.hopper.runtime import SHARED_BYTES, Kernel, build_map, get_kernel
from lenvm.model.kernel_choices import Tile
from lenvm.model.products import Rows

_QKV, _OUT, _GATE_UP = range(3)


class _Around(ctypes.Structure):
    _fields_ = (
        ("before", ctypes.c_uint64),
        ("num_before", ctypes.c_uint32),
        ("done", ctypes.c_uint64),
        ("next", ctypes.c_uint64 * 2),
        ("next_bytes", ctypes.c_uint32 * 2),
    )


@dataclass
class Around:
    """How a kernel knows its neighbours."""

    before: Tensor | None = None
    """[1] int32: counter of the kernel before. None: wait until that is over."""
    num_before: int = 0
    """What it counts to."""
    done: Tensor | None = None
    """[1] int32: its own, 0 before; every block adds one when its results are written."""
    next: Sequence[Tensor] = field(default_factory=tuple)
    """Weights that the next kernels read: up to two, which it brings to the L2 cache."""

    def pack(self) -> _Around:
        places = [x.data_ptr() for x in self.next]
        sizes = [x.numel() * x.element_size() for x in self.next]
        rest = [0] * (2 - len(places))
        return _Around(
            0 if self.before is None else self.before.data_ptr(),
            self.num_before,
            0 if self.done is None else self.done.data_ptr(),
            (ctypes.c_uint64 * 2)(*places, *rest),
            (ctypes.c_uint32 * 2)(*sizes, *rest),
        )


ALONE = Around()


def project_qkv(
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    tile: Tile,
    around: Around = ALONE,
    pdl: bool = True,
) -> int:
    """q [N, Hq, D], and k, v [*, Hkv, D] at `index` [N] int64, rotated, from rows [N, H]. How many
    blocks.

    weight [(Hq + 2 Hkv) D, H]; cos, sin [N, D], whose halves are equal. BN of the tile is D.
    """
    num_heads = q.shape[1]
    num_kv = k.shape[-2]
    heads = {"HQ": num_heads, "HKV": num_kv, "HAS_BIAS": int(bias is not None)}
    own = weight if bias is None else bias, cos, sin, q, k, v, index
    return _launch(_QKV, rows, weight, eps, own, tile, heads, around, pdl)


def gate_and_up(
    rows: Rows,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    tile: Tile,
    around: Around = ALONE,
    pdl: bool = True,
) -> int:
    """out [N, I] = SiLU(gate) * up of rows [N, H]; weight [2 I, H]: gate's rows, then up's. A tile
    has BN columns of each. How many blocks."""
    return _launch(_GATE_UP, rows, weight, eps, (out,), tile, {}, around, pdl)


def project_out(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm: Tensor,
    out: Rows,
    *,
    tile: Tile,
    around: Around = ALONE,
    pdl: bool = True,
) -> int:
    """residual [N, H] fp32 += x [N, K] @ weight [H, K]^T; out.x = residual * norm [H], not yet
    divided by the rms of the rows, whose sums of squares go to out.squares [H / BN, N]. How many
    blocks."""
    own = residual, norm, out.x, out.squares
    return _launch(_OUT, Rows(x), weight, 0.0, own, tile, {"SPLITS": tile.splits}, around, pdl)


def can_multiply(name: str, tile: Tile, num_inputs: int, num_outputs: int) -> bool:
    """Whether the kernels know that tile; name: qkv, out, gate_up or down."""
    kind = {"qkv": _QKV, "gate_up": _GATE_UP}.get(name, _OUT)
    threads = 2 * tile.BM
    rows = tile.BM // tile.splits
    return (
        tile.BM in (64, 128)
        and tile.splits in (1, 2, 4, 8)
        and tile.BN % 32 == 0
        and tile.BN <= 256
        and num_inputs % 64 == 0
        and num_inputs // 64 >= tile.splits
        and num_outputs % (8 if kind == _GATE_UP else tile.BN) == 0
        and (kind != _OUT or (rows >= 16 and tile.BN // 4 % (threads // rows) == 0))
        and _shared_bytes(kind, tile) + 512 <= SHARED_BYTES
    )


def _launch(
    kind: int,
    rows: Rows,
    weight: Tensor,
    eps: float,
    own: tuple[Tensor | None, ...],
    tile: Tile,
    own_definitions: dict[str, int],
    around: Around,
    pdl: bool,
) -> int:
    num_tokens, num_inputs = rows.x.shape
    num_outputs = weight.shape[0] // (2 if kind == _GATE_UP else 1)
    is_small = kind == _QKV and tile.BN <= 64
    splits = tile.splits if kind == _OUT else 1
    kernel: Kernel = get_kernel(
        "products.cu",
        {
            "EPILOGUE": kind,
            "K": num_inputs,
            "OUTPUTS": num_outputs,
            "BM": tile.BM,
            "BN": tile.BN,
            "STAGES": tile.stages,
            "SPLITS": 1,
            "BLOCKS": 2 if is_small else 1,
            "NEXT_EARLY": 1,
            "PARTS": 0 if rows.squares is None else rows.squares.shape[0],
            **own_definitions,
        },
        [(tile.BN, False)],
        shared_bytes=_shared_bytes(kind, tile),
        num_threads=128 + 2 * tile.BM,
        cluster=(1, 1, splits),
    )
    grid = -(-num_tokens // tile.BM), -(-num_outputs // tile.BN), splits
    kernel.launch(
        grid,
        build_map(rows.x, tile.BM),
        build_map(weight, tile.BN),
        around.pack(),
        num_tokens,
        rows.squares,
        eps,
        *own,
        pdl=pdl,
    )
    return grid[0] * grid[1] * grid[2]


def _shared_bytes(kind: int, tile: Tile) -> int:
    columns = 2 * tile.BN if kind == _GATE_UP else tile.BN
    exchange = tile.BM * (tile.BN + 8) * 4 if kind == _OUT else 0
    return tile.stages * (tile.BM + columns) * 128 + exchange + 1024
