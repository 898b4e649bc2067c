"""Attention of a RaggedDecoder's candidates on Hopper GPUs: `attention.cu`, once a step `plan.cu`.

Shape legend: R rows (requests), N packed tokens, P pages, S tokens of a page, C pages of a row,
Hq query heads, Hkv key heads, G = Hq / Hkv, D head size.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lenvm.model.hopper.runtime import SHARED_BYTES, Product, build_map, get_kernel
from lenvm.model.kernel_choices import MAX_CLUSTER

LOG2_E = 1.4426950408889634
PAGE_SIZE = 64
TILE_ROWS = 128
"""Query rows (candidates x G) of one unit."""
HALF = 256
"""Threads that take pages in turn with others."""
STAGES = 6
"""Pages of a half on their way."""
MAX_RANKED, MAX_TILES = 256, 64
"""Most requests, and tiles of one, that are ranked by their number of candidates."""
SPLITS = (1, 2, 4, MAX_CLUSTER)


def can_attend(num_heads: int, k_pages: Tensor) -> bool:
    """Whether `candidate_attention` serves that many query heads over pages [P, S, Hkv, D]."""
    page_size, num_kv, head_size = k_pages.shape[1:]
    return (
        k_pages.dtype == torch.bfloat16
        and head_size in (64, 128)
        and page_size == PAGE_SIZE
        and num_heads % num_kv == 0
        and num_heads // num_kv <= 64
    )


@dataclass(frozen=True)
class Units:
    """Which blocks work on what, the same for every layer of a step."""

    plan: Tensor
    num_columns: int
    num_splits: int


def plan_units(
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    first: Tensor,
    *,
    num_tokens: int,
    num_heads: int,
    num_kv: int,
    head_size: int,
    max_candidates: int,
    num_splits: int,
) -> Units:
    """Requests shared out to blocks, on the device.

    int32: table [*, C], of which `rows` [R] names each row's; lengths [R]; first [R + 1]: row r
    owns packed tokens first[r] .. first[r + 1] - 1, at most `max_candidates`, of `num_tokens`.
    num_splits: blocks that share a prefix, one of SPLITS.
    """
    group = num_heads // num_kv
    assert num_splits in SPLITS
    assert shared_bytes(head_size) <= SHARED_BYTES
    assert all(x.dtype == torch.int32 for x in (table, rows, lengths, first))
    assert table.is_contiguous()
    num_rows, num_tiles = rows.shape[0], -(-max_candidates * group // TILE_ROWS)
    slots = count_slots(num_multiprocessors(table.device), num_splits)
    num_units = num_rows * num_tiles
    if 1 < num_rows <= MAX_RANKED and num_tiles <= MAX_TILES:  # only those with rows count
        num_units = min(num_units, num_rows + num_tokens * group // TILE_ROWS)
    num_columns = table.shape[1]
    plan = table.new_empty(num_units * num_kv, 8 + -(-num_columns // 4) * 4)
    about = plan_definitions(group, num_kv)
    kernel = get_kernel("plan.cu", about, (), shared_bytes=0, num_threads=MAX_RANKED)
    numbers = num_columns, num_rows, num_tiles, slots
    grid = (plan.shape[0], 1, 1)
    kernel.launch(grid, table, rows, lengths, first, plan, *numbers, pdl=False)
    return Units(plan, num_columns, num_splits)


def candidate_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_index: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    units: Units,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    own_is_token: bool = False,
    pdl: bool = False,
) -> None:
    """out[n] = attention of packed token n over its row's prefix and itself.

    q, out [N, Hq, D] bf16; own_k, own_v [*, Hkv, D] indexed by own_index [N] int64; k_pages,
    v_pages [P, S, Hkv, D]; units: by `plan_units`, of what is attended to. own_is_token: own_index
    is 0, 1, 2 ... pdl: start while the kernel before still ends; pages and units are read before it
    has.
    """
    num_heads, head_size = q.shape[1:]
    num_kv = k_pages.shape[2]
    num_splits = units.num_splits
    assert q.dtype == k_pages.dtype
    assert can_attend(num_heads, k_pages)
    assert own_is_token or own_index.dtype == torch.int64
    assert all(x.is_contiguous() for x in (q, own_k, own_v, k_pages, v_pages, out))
    kernel = get_kernel(
        "attention.cu",
        definitions(
            head_size,
            num_heads // num_kv,
            num_kv,
            num_splits=num_splits,
            has_window=window is not None,
            own_is_token=own_is_token,
        ),
        PRODUCTS,
        shared_bytes=shared_bytes(head_size),
        num_threads=HALF * num_halves(head_size) + 128,  # ALL_THREADS there
        cluster=(num_splits, 1, 1),
    )
    kernel.launch(
        (num_splits * units.plan.shape[0], 1, 1),
        *(build_map(x.view(-1, num_kv * head_size), PAGE_SIZE) for x in (k_pages, v_pages)),
        q,
        own_k,
        own_v,
        own_index,
        units.plan,
        out,
        float(scale * LOG2_E),
        window or 0,
        units.num_columns,
        pdl=pdl,
    )


def plan_definitions(group: int, num_kv: int) -> dict[str, int]:
    """What `plan.cu` is compiled for."""
    limits = {"ROWS": TILE_ROWS, "MAX_RANKED": MAX_RANKED, "MAX_TILES": MAX_TILES}
    return {"G": group, "HKV": num_kv, **limits}


def definitions(
    head_size: int,
    group: int,
    num_kv: int,
    *,
    num_splits: int,
    has_window: bool = False,
    own_is_token: bool = True,
) -> dict[str, int]:
    """What `attention.cu` is compiled for."""
    return {
        "D": head_size,
        "G": group,
        "HKV": num_kv,
        "STAGES": STAGES,
        "SPLITS": num_splits,
        "HALVES": num_halves(head_size),
        "ROWS": TILE_ROWS,
        "HAS_WINDOW": int(has_window),
        "OWN_IS_TOKEN": int(own_is_token),
    }


@cache
def num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


PRODUCTS = (
    ("multiply_keys", Product(64)),
    ("multiply_weights", Product(64, a_in_registers=True, b_transposed=True)),
)
"""Queries by the keys of a page, and their weights by its values."""


def count_slots(num_multiprocessors: int, num_splits: int) -> int:
    """Most clusters at a time, where a block has a multiprocessor to itself: they lie within groups
    of 16 or 18 multiprocessors. Of four blocks some fewer begin at once."""
    if num_splits > 2:
        num_multiprocessors -= num_multiprocessors % 16
    return num_multiprocessors // num_splits


def num_halves(head_size: int) -> int:
    """Of a block: two where registers (128 a thread) suffice."""
    return 2 if head_size == 64 else 1


def shared_bytes(head_size: int) -> int:
    """Shared memory of a block: of each half pages, barriers, references and totals; queries, the
    scores of their own keys, the unit, and a barrier."""
    half = STAGES * 4 * PAGE_SIZE * head_size + STAGES * 16 + TILE_ROWS * 8
    return num_halves(head_size) * half + TILE_ROWS * head_size * 2 + TILE_ROWS * 4 + 48
