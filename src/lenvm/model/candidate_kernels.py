"""Triton kernels that pack a step's candidates and keep the chosen ones, on the device.

What they find they tell the host: `told` int64 in its pinned memory, or the device's own, each
entry number x 2^32 + value, where `number` is the step's. How many candidates were packed; the
first row with an id that is no token or had no room (NO_ROW: none); and, only where it happens, a
row whose token to keep was not among its candidates.

Shape legend: R rows (requests), K candidates a row, N packed tokens, L layers, P pages, S tokens of
a page, Hkv key heads, D head size.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from torch import Tensor

from lenvm.model.kernels import next_power_of_2, tl, triton

NO_ROW = 2**31 - 1


@triton.jit(
    do_not_specialize=[
        "stride_row",
        "stride_column",
        "num_rows",
        "width",
        "vocab_size",
        "capacity",
        "row_capacity",
        "given_stride",
        "number",
    ]
)
def _pack_kernel(
    ids_ptr,
    stride_row,
    stride_column,
    num_rows,
    width,
    given_ptr,
    meta_ptr,
    given_stride,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    first_ptr,
    packed_ptr,
    told_ptr,
    number,
    vocab_size,
    capacity,
    row_capacity,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r_offs = tl.arange(0, BLOCK_R)
    k_offs = tl.arange(0, BLOCK_K)
    inside = (r_offs < num_rows)[:, None] & (k_offs < width)[None, :]
    # from the host's memory: these first, for they take longest
    r_mask = r_offs < row_capacity
    rows = tl.load(given_ptr + r_offs, mask=r_mask, other=0)
    lengths = tl.load(given_ptr + given_stride + r_offs, mask=r_mask, other=0)
    next_slots = tl.load(given_ptr + 2 * given_stride + r_offs, mask=r_mask, other=0)
    offs = r_offs[:, None] * stride_row + k_offs[None, :] * stride_column
    ids = tl.load(ids_ptr + offs, mask=inside, other=-1)
    wrong = (ids < -1) | (ids >= vocab_size)
    good = ((ids >= 0) & (ids < vocab_size)).to(tl.int32)
    counts = tl.sum(good, 1)
    ends = tl.cumsum(counts, 0)
    at = (ends - counts)[:, None] + tl.cumsum(good, 1) - good
    fits = (good > 0) & (at < capacity)
    lost = (good > 0) & (at >= capacity)
    tl.store(meta_ptr + r_offs, rows, mask=r_mask)
    tl.store(meta_ptr + given_stride + r_offs, lengths, mask=r_mask)
    tl.store(meta_ptr + 2 * given_stride + r_offs, next_slots, mask=r_mask)
    zeros = tl.zeros([BLOCK_R, BLOCK_K], tl.int32)
    tl.store(tokens_ptr + at, ids, mask=fits)
    tl.store(positions_ptr + at, (lengths[:, None] + zeros).to(tl.int64), mask=fits)
    tl.store(slots_ptr + at, (next_slots[:, None] + zeros).to(tl.int64), mask=fits)
    tl.store(
        packed_ptr + r_offs[:, None] * width + k_offs[None, :],
        tl.where(fits, at, capacity).to(tl.int64),
        mask=inside,
    )
    tl.store(first_ptr + 1 + r_offs, tl.minimum(ends, capacity), mask=r_mask)
    tl.store(first_ptr, 0)
    total = tl.minimum(tl.sum(counts, 0), capacity)
    n_offs = tl.arange(0, 1024)
    for base in range(0, capacity, 1024):  # what is left of the bucket: token 0, kept nowhere
        rest = (base + n_offs >= total) & (base + n_offs < capacity)
        none = tl.zeros([1024], tl.int64)
        tl.store(tokens_ptr + base + n_offs, none, mask=rest)
        tl.store(positions_ptr + base + n_offs, none, mask=rest)
        tl.store(slots_ptr + base + n_offs, none, mask=rest)
    bad = tl.max((wrong | lost).to(tl.int32), 1) > 0
    mark = number.to(tl.int64) << 32
    tl.debug_barrier()  # whoever is told that has read what was given
    tl.store(told_ptr, mark + total)
    tl.store(told_ptr + 1, mark + tl.min(tl.where(bad, r_offs, 2147483647), 0))


def pack_candidates(
    ids_RK: Tensor,
    given: Tensor,
    meta: Tensor,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    first: Tensor,
    packed_RK: Tensor,
    told: Tensor,
    number: int,
    *,
    vocab_size: int,
) -> None:
    """Drop the padding of ids_RK (-1), on the device.

    given [3, row capacity] int32: table row, length and next slot of each row, in pinned memory of
    the host or the device's own; copied to `meta`, which is like it. Writes `tokens`, `positions`,
    `slots` [N] of the packed candidates, `first` [row capacity + 1] (where each row's begin) and
    `packed_RK` (index of each candidate among the packed, N for padding). Beyond the packed
    candidates tokens, positions and slots are 0. Tells how many were packed, and a bad row.
    """
    num_rows, width = ids_RK.shape
    row_capacity = first.shape[0] - 1
    _pack_kernel[(1,)](
        ids_RK,
        ids_RK.stride(0),
        ids_RK.stride(1),
        num_rows,
        width,
        given,
        meta,
        given.stride(0),
        tokens,
        positions,
        slots,
        first,
        packed_RK,
        told,
        number,
        vocab_size,
        tokens.shape[0],
        row_capacity,
        BLOCK_R=max(2, next_power_of_2(row_capacity)),
        BLOCK_K=max(2, next_power_of_2(width)),
        num_warps=8,
    )


@triton.jit(do_not_specialize=["number"])
def _keep_kernel(
    stash_ptr,
    data_ptr,
    chosen_ptr,
    rows_ptr,
    slots_ptr,
    tokens_ptr,
    first_ptr,
    told_ptr,
    number,
    stash_stride,
    data_stride,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + i)
    first = tl.load(first_ptr + row)
    last = tl.load(first_ptr + row + 1)
    chosen = tl.load(chosen_ptr + i)
    k_offs = first + tl.arange(0, BLOCK_K)
    tokens = tl.load(tokens_ptr + k_offs, mask=k_offs < last, other=-1)
    at = tl.min(tl.where(tokens == chosen, k_offs, 2147483647), 0)
    if at < last:
        e_offs = tl.arange(0, BLOCK_E)
        slot = tl.load(slots_ptr + i).to(tl.int64)
        kept = tl.load(stash_ptr + plane * stash_stride + at.to(tl.int64) * E + e_offs, e_offs < E)
        tl.store(data_ptr + plane * data_stride + slot * E + e_offs, kept, e_offs < E)
    else:
        tl.store(told_ptr + 2, (number.to(tl.int64) << 32) + row)


def keep_candidates(
    stash: Tensor,
    data: Tensor,
    chosen: Tensor,
    rows: Tensor,
    slots: Tensor,
    tokens: Tensor,
    first: Tensor,
    told: Tensor,
    number: int,
    *,
    max_candidates: int,
) -> None:
    """Copy key and value of the candidate `chosen[i]` of row `rows[i]` to `slots[i]`, all layers.

    stash [L, 2, N, Hkv, D]; data [L, 2, P, S, Hkv, D]; tokens, first as `pack_candidates` left
    them. Tells a row whose token is not among its candidates.
    """
    num_layers = stash.shape[0]
    size = stash.shape[3] * stash.shape[4]
    _keep_kernel[(chosen.shape[0], num_layers * 2)](
        stash,
        data,
        chosen,
        rows,
        slots,
        tokens,
        first,
        told,
        number,
        stash.stride(1),
        data.stride(1),
        E=size,
        BLOCK_E=next_power_of_2(size),
        BLOCK_K=max(2, next_power_of_2(max_candidates)),
        num_warps=1,
    )
