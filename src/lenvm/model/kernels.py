"""Triton kernels of a RaggedDecoder on the GPU, and nothing else: pointers in, pointers out.

`candidate_attention` reads each request's prefix once for all its candidates (split along the
prefix, merged by log-sum-exp); a candidate's own key and value are the start of the softmax, so no
mask between candidates exists. `causal_attention` is the prefill. `pack_candidates` and
`keep_candidates` are the bookkeeping that stays on the device; the rest are the small fused pieces
of a decoder layer.

Shape legend: R rows (requests), K candidates a row, N packed tokens, Hq query heads, Hkv key heads,
G = Hq / Hkv, D head size, S tokens of a page, C pages of a row, H hidden size, I MLP size.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "gdc_launch_dependents", "gdc_wait", "tl", "triton"]

LOG2_E = 1.4426950408889634
NO_ROW = 2**31 - 1
PIPELINE_BYTES = 160 * 1024
"""Shared memory for pages on their way."""


def launch_options(pdl: bool) -> dict[str, bool]:
    """Programmatic dependent launch; the interpreter and older GPUs know no such option."""
    return {"launch_pdl": True} if pdl else {}


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


# -- attention over the prefix and oneself ---------------------------------------------------------


@triton.jit
def _see_page(q, k, v, m, total, acc, scale, seen, MASKS: tl.constexpr):
    """Running softmax over the keys and values of one more page."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKS:
        scores = tl.where(seen[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    safe = m_new
    if MASKS:
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a page all before the window
    shrink = tl.exp2(m - safe)
    p = tl.exp2(scores * scale - safe[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    return m_new, total, tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["window", "num_tokens", "num_rows", "num_splits"])
def _candidate_kernel(
    q_ptr,
    own_k_ptr,
    own_v_ptr,
    own_index_ptr,
    k_ptr,
    v_ptr,
    k_pages,
    v_pages,
    table_ptr,
    rows_ptr,
    lengths_ptr,
    first_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    count_ptr,
    scale,
    window,
    num_columns,
    num_tokens,
    num_rows,
    num_splits,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MERGES: tl.constexpr,
    OWN_IS_TOKEN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    COPIES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    row = tl.program_id(1) % num_rows
    tile = tl.program_id(1) // num_rows  # the first tiles come first: many rows have no other
    split = tl.program_id(2)
    first = tl.load(first_ptr + row)
    num_queries = (tl.load(first_ptr + row + 1) - first) * G
    if tile * BLOCK_M < num_queries:
        length = tl.load(lengths_ptr + row)
        pages = table_ptr + tl.load(rows_ptr + row).to(tl.int64) * num_columns
        m_offs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_mask = m_offs < num_queries
        token = first + m_offs // G
        q_row = token * (Hkv * G) + kv_head * G + m_offs % G
        d_offs = tl.arange(0, BLOCK_D)
        d_mask = d_offs < D
        qd_mask = m_mask[:, None] & d_mask[None, :]
        q = tl.load(q_ptr + q_row[:, None] * D + d_offs[None, :], mask=qd_mask, other=0.0)
        # the candidate itself, merged at the end by the first split; read here, used there
        own = token
        if not OWN_IS_TOKEN:
            own = tl.load(own_index_ptr + token, mask=m_mask, other=0)
        own_offs = (own.to(tl.int64) * Hkv + kv_head)[:, None] * D + d_offs[None, :]
        own_mask = qd_mask & (split == 0)
        if BLOCK_D <= 64:  # larger ones would not fit the registers
            own_k = tl.load(own_k_ptr + own_offs, mask=own_mask, other=0.0)
            own_v = tl.load(own_v_ptr + own_offs, mask=own_mask, other=0.0)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(length - window + 1, 0)
        first_page = begin // S
        last_page = (length + S - 1) // S
        share = (last_page - first_page + num_splits - 1) // num_splits
        low = first_page + split * share
        high = tl.minimum(low + share, last_page)
        full = tl.minimum(high, length // S)
        n_offs = tl.arange(0, S)
        # the last page, if it is not full: likewise read here and used after the others
        rest = (low < high) & (full < high)
        places = tl.load(pages + full, mask=rest, other=0).to(tl.int64) * S + n_offs
        rest_offs = (places * Hkv + kv_head)[:, None] * D + d_offs[None, :]
        rest_seen = (full * S + n_offs >= begin) & (full * S + n_offs < length)
        rest_mask = (rest & rest_seen)[:, None] & d_mask[None, :]  # beyond it there may be NaN
        if BLOCK_D <= 64:
            rest_k = tl.load(k_ptr + rest_offs, mask=rest_mask, other=0.0)
            rest_v = tl.load(v_ptr + rest_offs, mask=rest_mask, other=0.0)
        for column in tl.range(low, full, num_stages=STAGES):
            page = tl.load(pages + column)
            if COPIES:
                k = k_pages.load([page * S, kv_head * D])
                v = v_pages.load([page * S, kv_head * D])
            else:
                places = (page.to(tl.int64) * S + n_offs) * Hkv + kv_head
                kv_offs = places[:, None] * D + d_offs[None, :]
                k = tl.load(k_ptr + kv_offs, mask=d_mask[None, :], other=0.0)
                v = tl.load(v_ptr + kv_offs, mask=d_mask[None, :], other=0.0)
            seen = column * S + n_offs >= begin
            m, total, acc = _see_page(q, k, v, m, total, acc, scale, seen, HAS_WINDOW)
        if rest:
            if BLOCK_D > 64:
                rest_k = tl.load(k_ptr + rest_offs, mask=rest_mask, other=0.0)
                rest_v = tl.load(v_ptr + rest_offs, mask=rest_mask, other=0.0)
            m, total, acc = _see_page(q, rest_k, rest_v, m, total, acc, scale, rest_seen, True)
        if BLOCK_D > 64:
            own_k = tl.load(own_k_ptr + own_offs, mask=own_mask, other=0.0)
            own_v = tl.load(own_v_ptr + own_offs, mask=own_mask, other=0.0)
        own_score = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * scale
        own_score = tl.where(split == 0, own_score, float("-inf"))
        m_new = tl.maximum(m, own_score)
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        shrink = tl.exp2(m - safe)
        p = tl.exp2(own_score - safe)
        total = total * shrink + p
        acc = acc * shrink[:, None] + own_v.to(tl.float32) * p[:, None]
        m = m_new
        if not IS_SPLIT:
            out = acc / total[:, None]
            tl.store(
                out_ptr + q_row[:, None] * D + d_offs[None, :],
                out.to(out_ptr.dtype.element_ty),
                mask=qd_mask,
            )
        else:
            at = split.to(tl.int64) * num_tokens * (Hkv * G) + q_row
            norm = tl.where(total > 0, total, 1.0)
            out = acc / norm[:, None]
            tl.store(part_ptr + at[:, None] * D + d_offs[None, :], out, mask=qd_mask)
            tl.store(lse_ptr + at, m + tl.log2(total), mask=m_mask)
            if MERGES:  # the last split to arrive merges them all, in their order
                tl.debug_barrier()  # every thread has stored before one of them says so
                which = count_ptr + tl.program_id(1) * Hkv + kv_head
                if tl.atomic_add(which, 1, sem="acq_rel") == num_splits - 1:
                    tl.store(which, 0)
                    at = q_row.to(tl.int64)
                    offs = d_offs[None, :]
                    m = tl.load(lse_ptr + at, mask=m_mask, other=0.0, cache_modifier=".cg")
                    acc = tl.load(
                        part_ptr + at[:, None] * D + offs, qd_mask, 0.0, cache_modifier=".cg"
                    )
                    total = tl.full([BLOCK_M], 1.0, tl.float32)
                    for _split in tl.range(1, num_splits, num_stages=1):
                        at += num_tokens.to(tl.int64) * (Hkv * G)
                        lse = tl.load(lse_ptr + at, mask=m_mask, other=0.0, cache_modifier=".cg")
                        part = tl.load(
                            part_ptr + at[:, None] * D + offs, qd_mask, 0.0, cache_modifier=".cg"
                        )
                        m_new = tl.maximum(m, lse)
                        old, new = tl.exp2(m - m_new), tl.exp2(lse - m_new)
                        total = total * old + new
                        acc = acc * old[:, None] + part * new[:, None]
                        m = m_new
                    tl.store(
                        out_ptr + q_row[:, None] * D + offs,
                        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
                        mask=qd_mask,
                    )


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _merge_splits_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    count_ptr,
    num_tokens,
    num_splits,
    Hq: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0)
    if token < tl.load(count_ptr):
        h_offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        d_offs = tl.arange(0, BLOCK_D)
        h_mask = h_offs < Hq
        mask = h_mask[:, None] & (d_offs < D)[None, :]
        at = token.to(tl.int64) * Hq + h_offs
        m = tl.load(lse_ptr + at, mask=h_mask, other=0.0)  # split 0 holds the token itself: finite
        total = tl.full([BLOCK_H], 1.0, tl.float32)
        acc = tl.load(part_ptr + at[:, None] * D + d_offs[None, :], mask=mask, other=0.0)
        for _split in range(1, num_splits):
            at += num_tokens.to(tl.int64) * Hq
            lse = tl.load(lse_ptr + at, mask=h_mask, other=0.0)
            part = tl.load(part_ptr + at[:, None] * D + d_offs[None, :], mask=mask, other=0.0)
            m_new = tl.maximum(m, lse)
            old, new = tl.exp2(m - m_new), tl.exp2(lse - m_new)
            total = total * old + new
            acc = acc * old[:, None] + part * new[:, None]
            m = m_new
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        at = token.to(tl.int64) * Hq + h_offs
        tl.store(out_ptr + at[:, None] * D + d_offs[None, :], out, mask=mask)


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
    scratch: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    window: int | None,
    max_candidates: int,
    num_splits: int,
    max_block: int = 64,
    num_stages: int = 3,
    merges: bool = False,
    own_is_token: bool = False,
    pdl: bool = False,
) -> None:
    """out[n] = attention of packed token n over its row's prefix and itself.

    q, out [N, Hq, D]; own_k, own_v [*, Hkv, D] indexed by own_index [N]; k_pages, v_pages
    [P, S, Hkv, D]; table [*, C] int32, of which `rows` [R] names each row's; lengths [R]; first
    [R + 1]: row r owns packed tokens first[r] .. first[r + 1] - 1, at most `max_candidates`.
    max_block: most query rows (candidates x G) of one program; rows with more read their prefix
    again, from the L2 cache. scratch: fp32 [num_splits, N, Hq, D] and [num_splits, N, Hq], int32 of
    `count_size` that is 0 between kernels; unused with one split. merges: the split that ends last
    merges them, in place of a second kernel. own_is_token: own_index is 0, 1, 2 ... pdl: start
    while the kernel before still ends (all kernels of the stream must wait for theirs).
    """
    num_tokens, num_heads, head_size = q.shape
    page_size, num_kv = k_pages.shape[1], k_pages.shape[2]
    group = num_heads // num_kv
    block_m, num_tiles = _query_tiles(max_candidates * group, max_block)
    grid = (num_kv, rows.shape[0] * num_tiles, num_splits)
    part, lse, count = scratch
    copies = can_copy(q)
    page_bytes = 2 * page_size * head_size * q.element_size()
    k, v = k_pages, v_pages
    if copies:
        k, v = (
            TensorDescriptor.from_tensor(x.flatten(0, 1).flatten(1), [page_size, head_size])
            for x in (k_pages, v_pages)
        )
    _candidate_kernel[grid](
        q,
        own_k,
        own_v,
        own_index,
        k_pages,
        v_pages,
        k,
        v,
        table,
        rows,
        lengths,
        first,
        out,
        part,
        lse,
        count,
        scale * LOG2_E,
        window or 0,
        table.shape[1],
        num_tokens,
        rows.shape[0],
        num_splits,
        Hkv=num_kv,
        G=group,
        D=head_size,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        S=page_size,
        BLOCK_M=block_m,
        IS_SPLIT=num_splits > 1,
        MERGES=merges,
        OWN_IS_TOKEN=own_is_token,
        HAS_WINDOW=window is not None,
        COPIES=copies,
        STAGES=max(
            1, min(num_stages if copies else min(num_stages, 3), PIPELINE_BYTES // page_bytes)
        ),
        PDL=pdl,
        num_warps=8 if block_m >= 128 else 4,
        **launch_options(pdl),
    )
    if num_splits > 1 and not merges:
        block_h = min(16, next_power_of_2(num_heads))
        _merge_splits_kernel[(num_tokens, -(-num_heads // block_h))](
            part,
            lse,
            out,
            first[-1:],
            num_tokens,
            num_splits,
            Hq=num_heads,
            D=head_size,
            BLOCK_H=block_h,
            BLOCK_D=next_power_of_2(head_size),
        )


def can_copy(q: Tensor) -> bool:
    """Whether the tensor copy engine (Hopper and later) brings whole pages: q [N, Hq, D]."""
    head_size = q.shape[-1]
    if head_size < 16 or head_size != next_power_of_2(head_size):
        return False
    return q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] >= 9


def count_size(num_rows: int, num_kv: int, max_queries: int, max_block: int = 64) -> int:
    """Counters that `candidate_attention` needs; max_queries: query rows (candidates x G) a row."""
    return num_rows * num_kv * _query_tiles(max_queries, max_block)[1]


def _query_tiles(max_queries: int, max_block: int) -> tuple[int, int]:
    """Query rows of one program, and programs for one row of requests."""
    block = min(max_block, max(16, next_power_of_2(max_queries)))
    return block, -(-max_queries // block)


# -- causal attention of a prefill -----------------------------------------------------------------


@triton.jit(do_not_specialize=["window"])
def _causal_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    blocks_ptr,
    out_ptr,
    scale,
    window,
    num_columns,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    block = blocks_ptr + tl.program_id(0) * 4
    row = tl.load(block)
    token = tl.load(block + 1)
    start = tl.load(block + 2)
    num_queries = tl.load(block + 3)
    head = tl.program_id(1)
    kv_head = head // G
    m_offs = tl.arange(0, BLOCK_M)
    d_offs = tl.arange(0, BLOCK_D)
    n_offs = tl.arange(0, S)
    m_mask = m_offs < num_queries
    d_mask = d_offs < D
    qd_mask = m_mask[:, None] & d_mask[None, :]
    q_offs = ((token + m_offs).to(tl.int64) * (Hkv * G) + head)[:, None] * D + d_offs[None, :]
    q = tl.load(q_ptr + q_offs, mask=qd_mask, other=0.0)
    at = start + m_offs
    end = start + num_queries
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(start - window + 1, 0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    pages = table_ptr + row.to(tl.int64) * num_columns
    for column in tl.range(begin // S, (end + S - 1) // S, num_stages=2):
        page = tl.load(pages + column).to(tl.int64)
        position = column * S + n_offs
        kv_offs = ((page * S + n_offs) * Hkv + kv_head)[:, None] * D + d_offs[None, :]
        kv_mask = (position < end)[:, None] & d_mask[None, :]
        k = tl.load(k_ptr + kv_offs, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = position[None, :] <= at[:, None]
        if HAS_WINDOW:
            seen = seen & (position[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: before the window
        shrink = tl.exp2(m - safe)
        p = tl.exp2(scores - safe[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + kv_offs, mask=kv_mask, other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + q_offs, out.to(out_ptr.dtype.element_ty), mask=qd_mask)


CAUSAL_BLOCK = 64
"""Queries of one program of `causal_attention`."""


def causal_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    blocks: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
) -> None:
    """Causal attention of packed new tokens over their requests' pages, which hold them already.

    q, out [N, Hq, D]; blocks [B, 4] int32: table row, first packed token, its position, number of
    tokens (at most CAUSAL_BLOCK, consecutive, of one request).
    """
    num_heads, head_size = q.shape[1:]
    page_size, num_kv = k_pages.shape[1], k_pages.shape[2]
    _causal_kernel[(blocks.shape[0], num_heads)](
        q,
        k_pages,
        v_pages,
        table,
        blocks,
        out,
        scale * LOG2_E,
        window or 0,
        table.shape[1],
        Hkv=num_kv,
        G=num_heads // num_kv,
        D=head_size,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        S=page_size,
        BLOCK_M=CAUSAL_BLOCK,
        HAS_WINDOW=window is not None,
        num_warps=4,
    )


# -- candidates in and out -------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "stride_row",
        "stride_column",
        "num_rows",
        "width",
        "vocab_size",
        "capacity",
        "row_capacity",
    ]
)
def _pack_kernel(
    ids_ptr,
    stride_row,
    stride_column,
    num_rows,
    width,
    lengths_ptr,
    next_slots_ptr,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    first_ptr,
    packed_ptr,
    defect_ptr,
    vocab_size,
    capacity,
    row_capacity,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r_offs = tl.arange(0, BLOCK_R)
    k_offs = tl.arange(0, BLOCK_K)
    inside = (r_offs < num_rows)[:, None] & (k_offs < width)[None, :]
    offs = r_offs[:, None] * stride_row + k_offs[None, :] * stride_column
    ids = tl.load(ids_ptr + offs, mask=inside, other=-1)
    wrong = (ids < -1) | (ids >= vocab_size)
    good = ((ids >= 0) & (ids < vocab_size)).to(tl.int32)
    counts = tl.sum(good, 1)
    ends = tl.cumsum(counts, 0)
    at = (ends - counts)[:, None] + tl.cumsum(good, 1) - good
    fits = (good > 0) & (at < capacity)
    lost = (good > 0) & (at >= capacity)
    lengths = tl.load(lengths_ptr + r_offs, mask=r_offs < num_rows, other=0)
    next_slots = tl.load(next_slots_ptr + r_offs, mask=r_offs < num_rows, other=0)
    zeros = tl.zeros([BLOCK_R, BLOCK_K], tl.int32)
    tl.store(tokens_ptr + at, ids, mask=fits)
    tl.store(positions_ptr + at, (lengths[:, None] + zeros).to(tl.int64), mask=fits)
    tl.store(slots_ptr + at, (next_slots[:, None] + zeros).to(tl.int64), mask=fits)
    tl.store(
        packed_ptr + r_offs[:, None] * width + k_offs[None, :],
        tl.where(fits, at, capacity).to(tl.int64),
        mask=inside,
    )
    tl.store(first_ptr + 1 + r_offs, tl.minimum(ends, capacity), mask=r_offs < row_capacity)
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
    tl.store(defect_ptr, tl.min(tl.where(bad, r_offs, 2147483647), 0))
    tl.store(defect_ptr + 1, 2147483647)


def pack_candidates(
    ids_RK: Tensor,
    lengths: Tensor,
    next_slots: Tensor,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    first: Tensor,
    packed_RK: Tensor,
    defect: Tensor,
    *,
    vocab_size: int,
) -> None:
    """Drop the padding of ids_RK (-1), on the device.

    Writes `tokens`, `positions`, `slots` [N] of the packed candidates, `first` [row capacity + 1]
    (where each row's begin), `packed_RK` (index of each candidate among the packed, N for padding)
    and `defect` [2]: the first row with an id that is no token or had no room, and no row yet for
    `keep_candidates` (NO_ROW is none). Beyond the packed candidates tokens, positions and slots
    are 0.
    """
    num_rows, width = ids_RK.shape
    row_capacity = first.shape[0] - 1
    _pack_kernel[(1,)](
        ids_RK,
        ids_RK.stride(0),
        ids_RK.stride(1),
        num_rows,
        width,
        lengths,
        next_slots,
        tokens,
        positions,
        slots,
        first,
        packed_RK,
        defect,
        vocab_size,
        tokens.shape[0],
        row_capacity,
        BLOCK_R=max(2, next_power_of_2(row_capacity)),
        BLOCK_K=max(2, next_power_of_2(width)),
        num_warps=8,
    )


@triton.jit
def _keep_kernel(
    stash_ptr,
    data_ptr,
    chosen_ptr,
    rows_ptr,
    slots_ptr,
    tokens_ptr,
    first_ptr,
    defect_ptr,
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
        tl.atomic_min(defect_ptr + 1, row)


def keep_candidates(
    stash: Tensor,
    data: Tensor,
    chosen: Tensor,
    rows: Tensor,
    slots: Tensor,
    tokens: Tensor,
    first: Tensor,
    defect: Tensor,
    *,
    max_candidates: int,
) -> None:
    """Copy key and value of the candidate `chosen[i]` of row `rows[i]` to `slots[i]`, all layers.

    stash [L, 2, N, Hkv, D]; data [L, 2, P, S, Hkv, D]; tokens, first as `pack_candidates` left
    them. `defect` [2]: the second falls to the least row whose token is not among its candidates.
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
        defect,
        stash.stride(1),
        data.stride(1),
        E=size,
        BLOCK_E=next_power_of_2(size),
        BLOCK_K=max(2, next_power_of_2(max_candidates)),
        num_warps=1,
    )


# -- pieces of a decoder layer ---------------------------------------------------------------------


@triton.jit
def inverse_rms(squares_ptr, m_offs, m_mask, num_tokens, eps, SIZE: tl.constexpr, T: tl.constexpr):
    """1 / rms of rows of SIZE from T parts of their sums of squares, [T, num_tokens]."""
    total = tl.load(squares_ptr + m_offs, mask=m_mask, other=0.0)
    for part in tl.static_range(1, T):
        total += tl.load(squares_ptr + part * num_tokens + m_offs, mask=m_mask, other=0.0)
    return tl.rsqrt(total / SIZE + eps)


@triton.jit
def _add_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    total_ptr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_X: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if total_ptr is not None:
        end = tl.load(total_ptr)
        if tl.program_id(0) >= end:
            return
    row = tl.program_id(0).to(tl.int64) * H
    offs = tl.arange(0, BLOCK)
    mask = offs < H
    kind = out_ptr.dtype.element_ty
    x = tl.load(residual_ptr + row + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_X:
        x += tl.load(x_ptr + row + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row + offs, x, mask=mask)
    norm = x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = norm.to(kind).to(tl.float32) * weight
    tl.store(out_ptr + row + offs, out.to(kind), mask=mask)


def add_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    pdl: bool = False,
    total: Tensor | None = None,
) -> None:
    """residual += x (where given), out = RMSNorm(residual) * weight; all [N, H], residual fp32.

    total [1] int32: rows from there on are left as they are; None: there are N."""
    num_tokens, size = residual.shape
    _add_norm_kernel[(num_tokens,)](
        residual if x is None else x,
        residual,
        weight,
        out,
        eps,
        total,
        H=size,
        BLOCK=next_power_of_2(size),
        HAS_X=x is not None,
        PDL=pdl,
        num_warps=4 if size <= 2048 else 8,
        **launch_options(pdl),
    )


@triton.jit
def _head_norm(x1, x2, weight_ptr, d_offs, d_mask, eps, HALF: tl.constexpr, kind: tl.constexpr):
    scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)
    w1 = tl.load(weight_ptr + d_offs, mask=d_mask, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + HALF + d_offs, mask=d_mask, other=0.0).to(tl.float32)
    x1 = (x1 * scale[:, None]).to(kind).to(tl.float32) * w1[None, :]
    x2 = (x2 * scale[:, None]).to(kind).to(tl.float32) * w2[None, :]
    return x1.to(kind).to(tl.float32), x2.to(kind).to(tl.float32)


@triton.jit
def _finish(row_ptr, bias_ptr, offs, mask, scale, T: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Entries of a product's row, with what it still lacks: the scale of its norm, the bias."""
    x = tl.load(row_ptr + offs, mask=mask, other=0.0)
    kind = x.dtype
    x = x.to(tl.float32)
    if T > 0:
        x *= scale
        if HAS_BIAS:
            x += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = x.to(kind).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    squares_ptr,
    bias_ptr,
    num_tokens,
    eps,
    H: tl.constexpr,
    Hq: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    kind = q_ptr.dtype.element_ty
    d_offs = tl.arange(0, BLOCK_HALF)
    d_mask = d_offs < HALF
    cos1 = tl.load(cos_ptr + token * D + d_offs, mask=d_mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + token * D + HALF + d_offs, mask=d_mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + token * D + d_offs, mask=d_mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + token * D + HALF + d_offs, mask=d_mask, other=0.0).to(tl.float32)
    packed = qkv_ptr + token * (Hq + 2 * Hkv) * D
    scale = 1.0
    if T > 0:
        scale = inverse_rms(squares_ptr, token, True, num_tokens, eps, H, T)
    h_offs = tl.arange(0, BLOCK_Q)
    mask = (h_offs < Hq)[:, None] & d_mask[None, :]
    offs = h_offs[:, None] * D + d_offs[None, :]
    x1 = _finish(packed, bias_ptr, offs, mask, scale, T, HAS_BIAS)
    x2 = _finish(packed, bias_ptr, offs + HALF, mask, scale, T, HAS_BIAS)
    if HAS_NORM:
        x1, x2 = _head_norm(x1, x2, q_norm_ptr, d_offs, d_mask, eps, HALF, kind)
    out = q_ptr + token * Hq * D
    tl.store(out + offs, (x1 * cos1[None, :] - x2 * sin1[None, :]).to(kind), mask=mask)
    tl.store(out + offs + HALF, (x2 * cos2[None, :] + x1 * sin2[None, :]).to(kind), mask=mask)
    h_offs = tl.arange(0, BLOCK_KV)
    mask = (h_offs < Hkv)[:, None] & d_mask[None, :]
    offs = h_offs[:, None] * D + d_offs[None, :]
    x1 = _finish(packed, bias_ptr, Hq * D + offs, mask, scale, T, HAS_BIAS)
    x2 = _finish(packed, bias_ptr, Hq * D + offs + HALF, mask, scale, T, HAS_BIAS)
    if HAS_NORM:
        x1, x2 = _head_norm(x1, x2, k_norm_ptr, d_offs, d_mask, eps, HALF, kind)
    at = tl.load(index_ptr + token).to(tl.int64) * Hkv * D
    tl.store(k_ptr + at + offs, (x1 * cos1[None, :] - x2 * sin1[None, :]).to(kind), mask=mask)
    tl.store(
        k_ptr + at + offs + HALF, (x2 * cos2[None, :] + x1 * sin2[None, :]).to(kind), mask=mask
    )
    offs_v = (Hq + Hkv) * D + offs
    x1 = _finish(packed, bias_ptr, offs_v, mask, scale, T, HAS_BIAS)
    x2 = _finish(packed, bias_ptr, offs_v + HALF, mask, scale, T, HAS_BIAS)
    tl.store(v_ptr + at + offs, x1.to(kind), mask=mask)
    tl.store(v_ptr + at + offs + HALF, x2.to(kind), mask=mask)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    squares: Tensor | None = None,
    bias: Tensor | None = None,
    hidden_size: int = 0,
    pdl: bool = False,
) -> None:
    """Per-head norms (where given) and rotary positions; keys and values go where `index` says.

    qkv [N, (Hq + 2 Hkv) D]; cos, sin [N, D]; q [N, Hq, D]; k, v [*, Hkv, D]; index [N]. squares
    [T, N]: qkv is of rows of `hidden_size` not yet divided by their rms, and lacks the `bias`.
    """
    num_tokens, num_heads, head_size = q.shape
    num_kv = k.shape[-2]
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    _rotate_kernel[(num_tokens,)](
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        q,
        k,
        v,
        index,
        qkv if squares is None else squares,
        qkv if bias is None else bias,
        num_tokens,
        eps,
        H=hidden_size,
        Hq=num_heads,
        Hkv=num_kv,
        D=head_size,
        BLOCK_Q=next_power_of_2(num_heads),
        BLOCK_KV=next_power_of_2(num_kv),
        BLOCK_HALF=next_power_of_2(head_size // 2),
        HAS_NORM=norms is not None,
        T=0 if squares is None else squares.shape[0],
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _silu_mul_kernel(
    x_ptr,
    out_ptr,
    squares_ptr,
    num_tokens,
    eps,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    kind = out_ptr.dtype.element_ty
    gate = tl.load(x_ptr + token * (2 * SIZE) + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * (2 * SIZE) + SIZE + offs, mask=mask, other=0.0).to(tl.float32)
    if T > 0:
        scale = inverse_rms(squares_ptr, token, True, num_tokens, eps, H, T)
        gate *= scale
        up *= scale
    gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out_ptr + token * SIZE + offs, (gate * up).to(kind), mask=mask)


def silu_mul(
    x: Tensor,
    out: Tensor,
    squares: Tensor | None = None,
    eps: float = 0.0,
    hidden_size: int = 0,
    pdl: bool = False,
) -> None:
    """out [N, I] = SiLU(x[:, :I]) * x[:, I:], x [N, 2 I]; squares as in `rotate_and_store`."""
    num_tokens, size = out.shape
    block = min(2048, next_power_of_2(size))
    _silu_mul_kernel[(num_tokens, -(-size // block))](
        x,
        out,
        x if squares is None else squares,
        num_tokens,
        eps,
        H=hidden_size,
        SIZE=size,
        BLOCK=block,
        T=0 if squares is None else squares.shape[0],
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
