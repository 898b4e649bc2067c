"""Matrix products of a Llama-shaped layer on Hopper, with their small work in the epilogues.

A tile's weights are on their way before the kernel before has ended (programmatic dependent
launch); blocks of a cluster share them. Shapes are those of `products.py`; sums over a share of the
inputs come out as fp32 parts, which `kernels.add_norm` adds up.

Shape legend: N packed tokens, H hidden size, I MLP size, Hq query heads, Hkv key heads,
D head size.
"""

import torch
from torch import Tensor

from lenvm.model.hopper.runtime import SHARED_BYTES, Kernel, build_map, get_kernel
from lenvm.model.kernel_choices import Tile

_QKV, _PARTS, _GATE_UP = range(3)


def project_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    tile: Tile,
    pdl: bool = True,
) -> None:
    """q [N, Hq, D], and k, v [*, Hkv, D] at `index` [N] int64, rotated, from rows x [N, H].

    weight [(Hq + 2 Hkv) D, H]; cos, sin [N, D], whose halves are equal. BN of the tile is D.
    """
    num_heads = q.shape[1]
    num_kv = k.shape[-2]
    heads = {"HQ": num_heads, "HKV": num_kv, "HAS_BIAS": int(bias is not None)}
    kernel = _kernel(_QKV, tile, x.shape[1], weight.shape[0], heads)
    kernel.launch(
        (_row_tiles(x, tile), num_heads + 2 * num_kv, 1),
        *_maps(x, weight, tile, 1),
        x.shape[0],
        weight if bias is None else bias,
        cos,
        sin,
        q,
        k,
        v,
        index,
        pdl=pdl,
    )


def gate_and_up(
    x: Tensor, weight: Tensor, out: Tensor, *, tile: Tile, pdl: bool = True
) -> None:
    """out [N, I] = SiLU(gate) * up of rows x [N, H]; weight [2 I, H]: gate's rows, then up's. A
    tile has BN columns of each."""
    size = out.shape[1]
    kernel = _kernel(_GATE_UP, tile, x.shape[1], size, {})
    grid = _row_tiles(x, tile), -(-size // tile.BN), 1
    kernel.launch(grid, *_maps(x, weight, tile, 2), x.shape[0], out, pdl=pdl)


def multiply_in_parts(
    x: Tensor, weight: Tensor, parts: Tensor, *, tile: Tile, pdl: bool = True
) -> None:
    """parts [splits, N, O] fp32, whose sum is x [N, K] @ weight [O, K]^T."""
    size = weight.shape[0]
    kernel = _kernel(_PARTS, tile, x.shape[1], size, {"SPLITS": tile.splits})
    grid = _row_tiles(x, tile), size // tile.BN, tile.splits
    kernel.launch(grid, *_maps(x, weight, tile, 1), x.shape[0], parts, pdl=pdl)


def can_multiply(tile: Tile, num_inputs: int, num_outputs: int, *, gated: bool = False) -> bool:
    """Whether the kernels know that tile for weights of that many inputs and outputs."""
    rows = 2 * tile.BN if gated else tile.BN
    return (
        tile.BM in (64, 128)
        and num_inputs % 64 == 0
        and num_inputs // 64 >= tile.splits
        and tile.BN % 32 == 0
        and rows % (8 * tile.cluster) == 0
        and tile.BN <= 256
        and num_outputs % (8 if gated else tile.BN) == 0
        and _shared_bytes(tile, rows) <= SHARED_BYTES
    )


def _row_tiles(x: Tensor, tile: Tile) -> int:
    """Whole clusters of them."""
    rows = tile.BM * tile.cluster
    return -(-x.shape[0] // rows) * tile.cluster


def _maps(x: Tensor, weight: Tensor, tile: Tile, num_parts: int) -> tuple[object, object]:
    """num_parts: 2 where a tile has columns of gate and of up."""
    box = tile.BN * num_parts // tile.cluster
    return build_map(x, tile.BM), build_map(weight, min(box, tile.BN))


def _shared_bytes(tile: Tile, weight_rows: int) -> int:
    return tile.stages * (tile.BM + weight_rows) * 128 + 1024 + 16 * tile.stages


def _kernel(
    epilogue: int, tile: Tile, num_inputs: int, num_outputs: int, own: dict[str, int]
) -> Kernel:
    rows = 2 * tile.BN if epilogue == _GATE_UP else tile.BN
    definitions = {
        "EPILOGUE": epilogue,
        "K": num_inputs,
        "OUTPUTS": num_outputs,
        "BM": tile.BM,
        "BN": tile.BN,
        "STAGES": tile.stages,
        "CLUSTER": tile.cluster,
        "SPLITS": 1,
        "BLOCKS": 2 if epilogue == _QKV and tile.BN <= 64 else 1,
        "NEXT_EARLY": int(epilogue != _PARTS),
        **own,
    }
    return get_kernel(
        "products.cu",
        definitions,
        [(tile.BN, False)],
        shared_bytes=_shared_bytes(tile, rows) - 16 * tile.stages,
        num_threads=128 * (tile.BM // 64 + 1),
        cluster=tile.cluster,
    )


def empty_parts(x: Tensor, num_outputs: int, tile: Tile) -> Tensor:
    """Room for `multiply_in_parts`."""
    return torch.empty(
        tile.splits, x.shape[0], num_outputs, dtype=torch.float32, device=x.device
    )
