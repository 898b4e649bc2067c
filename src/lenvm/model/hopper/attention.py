"""Attention of a RaggedDecoder's candidates on Hopper GPUs: the kernel in `attention.cu`.

Shape legend: R rows (requests), N packed tokens, P pages, S tokens of a page, C pages of a row,
Hq query heads, Hkv key heads, G = Hq / Hkv, D head size.
"""

from functools import cache

import torch
from torch import Tensor

from lenvm.model.hopper.runtime import SHARED_BYTES, Product, build_map, get_kernel
from lenvm.model.kernel_choices import MAX_CLUSTER

LOG2_E = 1.4426950408889634
PAGE_SIZE = 64
TILE_ROWS = 128
"""Query rows (candidates x G) of one unit."""
NUM_THREADS = 256
"""Threads of a block for each of its units."""
MAX_RANKED, MAX_TILES = 256, 64
"""Most requests, and tiles of one, that are ranked by their number of candidates."""
SPLITS = (1, 2, 4, MAX_CLUSTER)


def can_attend(q: Tensor, k_pages: Tensor) -> bool:
    """Whether `candidate_attention` serves queries [N, Hq, D] over pages [P, S, Hkv, D]."""
    num_heads, head_size = q.shape[1:]
    page_size, num_kv = k_pages.shape[1:3]
    return (
        q.dtype == torch.bfloat16
        and head_size in (64, 128)
        and page_size == PAGE_SIZE
        and num_heads % num_kv == 0
        and num_heads // num_kv <= 64
    )


def candidate_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_index: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    first: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    max_candidates: int,
    num_splits: int,
    num_stages: int,
    own_is_token: bool = False,
    pdl: bool = False,
) -> None:
    """out[n] = attention of packed token n over its row's prefix and itself.

    q, out [N, Hq, D] bf16; own_k, own_v [*, Hkv, D] indexed by own_index [N] int64; k_pages,
    v_pages [P, S, Hkv, D]; int32: table [*, C], of which `rows` [R] names each row's; lengths [R];
    first [R + 1]: row r owns packed tokens first[r] .. first[r + 1] - 1, at most `max_candidates`.
    num_splits: blocks that share a prefix, one of SPLITS; num_stages: pages on their way to each, 4
    or 6 (heads of 64: even numbers up to 12, but from 8 on a block serves one unit instead of two).
    own_is_token: own_index is 0, 1, 2 ... pdl: start while the kernel before still ends; pages,
    table, rows, lengths and first are read before it has.
    """
    num_heads, head_size = q.shape[1:]
    num_kv = k_pages.shape[2]
    group = num_heads // num_kv
    assert can_attend(q, k_pages)
    assert num_splits in SPLITS
    assert num_stages % 2 == 0
    assert all(x.dtype == torch.int32 for x in (table, rows, lengths, first))
    assert own_is_token or own_index.dtype == torch.int64
    assert all(x.is_contiguous() for x in (q, own_k, own_v, k_pages, v_pages, table, out))
    kernel = get_kernel(
        "attention.cu",
        definitions(
            head_size,
            group,
            num_kv,
            num_splits=num_splits,
            num_stages=num_stages,
            has_window=window is not None,
            own_is_token=own_is_token,
        ),
        products(head_size),
        shared_bytes=shared_bytes(head_size, num_stages),
        num_threads=NUM_THREADS * units_of_block(head_size, num_stages),
        cluster=(num_splits, 1, 1),
    )
    num_rows, num_tiles = rows.shape[0], -(-max_candidates * group // TILE_ROWS)
    slots = count_slots(num_multiprocessors(q.device), num_splits)
    num_units = num_rows * num_tiles
    if 1 < num_rows <= MAX_RANKED and num_tiles <= MAX_TILES:  # only those with rows count
        num_units = min(num_units, num_rows + q.shape[0] * group // TILE_ROWS)
    num_clusters = num_units * num_kv
    if units_of_block(head_size, num_stages) == 2:
        num_clusters = count_clusters(num_clusters, slots)
    kernel.launch(
        (num_splits * num_clusters, 1, 1),
        *(build_map(x.view(-1, num_kv * head_size), PAGE_SIZE) for x in (k_pages, v_pages)),
        q,
        own_k,
        own_v,
        own_index,
        table,
        rows,
        lengths,
        first,
        out,
        float(scale * LOG2_E),
        window or 0,
        table.shape[1],
        num_rows,
        num_tiles,
        slots,
        pdl=pdl,
    )


def definitions(
    head_size: int,
    group: int,
    num_kv: int,
    *,
    num_splits: int,
    num_stages: int,
    has_window: bool = False,
    own_is_token: bool = True,
) -> dict[str, int]:
    """What `attention.cu` is compiled for."""
    return {
        "D": head_size,
        "G": group,
        "HKV": num_kv,
        "STAGES": num_stages,
        "SPLITS": num_splits,
        "UNITS": units_of_block(head_size, num_stages),
        "HAS_WINDOW": int(has_window),
        "OWN_IS_TOKEN": int(own_is_token),
    }


@cache
def num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def products(head_size: int) -> dict[str, Product]:
    """What it multiplies: queries by the keys of a page, weights by their values."""
    return {
        "multiply_keys": Product(PAGE_SIZE, a_in_registers=True),
        "multiply_values": Product(head_size, a_in_registers=True, b_transposed=True),
    }


def count_slots(num_multiprocessors: int, num_splits: int) -> int:
    """Clusters at a time, where a block has a multiprocessor to itself. Groups of 16 or 18
    multiprocessors have whole clusters."""
    if num_splits > 2:
        num_multiprocessors -= num_multiprocessors % 16
    return num_multiprocessors // num_splits


def count_clusters(num_units: int, slots: int) -> int:
    """Clusters of blocks of two units: with two units each, and as many more, with one, as there
    is room for at once. Cluster c of C serves unit c and, if there is one, 2 C - 1 - c."""
    return max(-(-num_units // 2), min(num_units, slots))


def units_of_block(head_size: int, num_stages: int) -> int:
    """Two where registers (128 a thread) and shared memory suffice."""
    return 2 if head_size == 64 and 2 * unit_bytes(head_size, num_stages) <= SHARED_BYTES else 1


def unit_bytes(head_size: int, num_stages: int) -> int:
    """Shared memory: pages (keys and values), queries, the pages' barriers and the request."""
    return num_stages * (4 * PAGE_SIZE * head_size + 24) + TILE_ROWS * head_size * 2 + 32


def shared_bytes(head_size: int, num_stages: int) -> int:
    """Shared memory of a block."""
    return units_of_block(head_size, num_stages) * unit_bytes(head_size, num_stages)
