"""Matrix products of a Llama-shaped layer on Hopper, with their small work in the epilogues.

A tile's weights are on their way before the kernel before has ended (programmatic dependent
launch). No norm kernel is left: `project_out` leaves residual * norm weight, undivided, with parts
of the rows' sums of squares, and the next product divides its result by the rows' rms. `total` and
what it leaves in padding: as in `products.py`.

Shape legend: N packed tokens, H hidden size, I MLP size, Hq query heads, Hkv key heads, D head
size, T column tiles of a `project_out`.
"""

from torch import Tensor

from lenvm.model.hopper.runtime import SHARED_BYTES, Product, build_map, get_kernel
from lenvm.model.kernel_choices import MAX_CLUSTER, Tile
from lenvm.model.products import Rows

QKV, OUT, GATE_UP = range(3)
"""Epilogues of `products.cu`."""


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
    pdl: bool = True,
    total: Tensor | None = None,
) -> None:
    """q [N, Hq, D], and k, v [*, Hkv, D] at `index` [N] int64, rotated, from rows [N, H].

    weight [(Hq + 2 Hkv) D, H]; cos, sin [N, D], whose halves are equal. BN of the tile is D.
    """
    num_heads = q.shape[1]
    num_kv = k.shape[-2]
    heads = {"HQ": num_heads, "HKV": num_kv, "HAS_BIAS": int(bias is not None)}
    own = weight if bias is None else bias, cos, sin, q, k, v, index
    _launch(QKV, rows, weight, eps, own, tile, heads, pdl, total)


def gate_and_up(
    rows: Rows,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    tile: Tile,
    pdl: bool = True,
    total: Tensor | None = None,
) -> None:
    """out [N, I] = SiLU(gate) * up of rows [N, H]; weight [2 I, H]: gate's rows, then up's. A tile
    has BN columns of each."""
    _launch(GATE_UP, rows, weight, eps, (out,), tile, {}, pdl, total)


def project_out(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm: Tensor,
    out: Rows,
    *,
    tile: Tile,
    pdl: bool = True,
    total: Tensor | None = None,
) -> None:
    """residual [N, H] fp32 += x [N, K] @ weight [H, K]^T; out.x = residual * norm [H], not yet
    divided by the rms of the rows, whose sums of squares go to out.squares [H / BN, N]."""
    own = residual, norm, out.x, out.squares
    _launch(OUT, Rows(x), weight, 0.0, own, tile, {}, pdl, total)


def can_multiply(name: str, tile: Tile, num_inputs: int, num_outputs: int) -> bool:
    """Whether the kernels know that tile; name: qkv, out, gate_up or down."""
    kind = {"qkv": QKV, "gate_up": GATE_UP}.get(name, OUT)
    return (
        tile.BM in (64, 128)
        and tile.splits in (1, 2, 4, 8)
        and tile.shares in (1, 2, 4)
        and tile.BN % (8 * tile.shares) == 0
        and tile.splits * tile.shares <= MAX_CLUSTER
        and tile.BN % 32 == 0
        and tile.BN <= 256
        and num_inputs % 64 == 0
        and num_inputs // 64 >= tile.splits
        and num_outputs % (8 if kind == GATE_UP else tile.BN) == 0
        and tile.BM // tile.splits >= 16
        and _shared_bytes(kind, tile) + _static_bytes(kind, tile) <= SHARED_BYTES
    )


def _launch(
    kind: int,
    rows: Rows,
    weight: Tensor,
    eps: float,
    own: tuple[Tensor | None, ...],
    tile: Tile,
    own_definitions: dict[str, int],
    pdl: bool,
    total: Tensor | None,
) -> None:
    num_tokens, num_inputs = rows.x.shape
    num_outputs = weight.shape[0] // (2 if kind == GATE_UP else 1)
    num_parts = 0 if rows.squares is None else rows.squares.shape[0]
    splits = tile.splits if kind == OUT else 1
    kernel = get_kernel(
        "products.cu",
        definitions(kind, tile, num_inputs, num_outputs, num_parts) | own_definitions,
        [("multiply", product(kind, tile))],
        shared_bytes=_shared_bytes(kind, tile),
        num_threads=384 if tile.BM == 128 else 160,  # THREADS there
        cluster=(tile.shares, 1, splits),
    )
    row_tiles = -(-num_tokens // (tile.BM * tile.shares)) * tile.shares
    grid = row_tiles, -(-num_outputs // tile.BN), splits
    kernel.launch(
        grid,
        build_map(rows.x, tile.BM),
        build_map(weight, tile.BN // tile.shares),
        num_tokens,
        total,
        rows.squares,
        eps,
        *own,
        pdl=pdl,
    )


def product(kind: int, tile: Tile) -> Product:
    """What `products.cu` calls multiply: gate and up in one, if there is one so wide."""
    joins = kind == GATE_UP and 2 * tile.BN <= 256
    return Product(2 * tile.BN if joins else tile.BN)


def definitions(
    kind: int, tile: Tile, num_inputs: int, num_outputs: int, num_parts: int
) -> dict[str, int]:
    """What `products.cu` is compiled for, but for the heads of q/k/v."""
    return {
        "EPILOGUE": kind,
        "K": num_inputs,
        "OUTPUTS": num_outputs,
        "BM": tile.BM,
        "BN": tile.BN,
        "STAGES": tile.stages,
        "SPLITS": tile.splits if kind == OUT else 1,
        "SHARES": tile.shares,
        "EARLY": 1 if kind == GATE_UP else tile.stages,
        "BLOCKS": 2 if tile.BM == 64 and tile.BN <= 64 and kind != GATE_UP else 1,
        "PARTS": num_parts,
    }


def _static_bytes(kind: int, tile: Tile) -> int:
    """Of a block besides: barriers, and the rows' sums of squares by each 32 columns."""
    squares = tile.BM // tile.splits * (tile.BN // 32) * 4 if kind == OUT else 0
    return (2 * tile.stages + 1) * 8 + squares + 128


def _shared_bytes(kind: int, tile: Tile) -> int:
    columns = 2 * tile.BN if kind == GATE_UP else tile.BN
    sums = tile.BM * tile.BN * 4 if kind == OUT else 0
    return tile.stages * (tile.BM + columns) * 128 + sums + 1024
