"""Attention of a RaggedDecoder on the GPU: Triton kernels, pointers in, pointers out.

`candidate_attention` reads each request's prefix once for all its candidates (split along the
prefix, merged by log-sum-exp); a candidate's own key and value are part of its softmax, so no mask
between candidates exists. `causal_attention` is the prefill.

Shape legend: R rows (requests), K candidates a row, N packed tokens, Hq query heads, Hkv key heads,
G = Hq / Hkv, D head size, S tokens of a page, C pages of a row.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

import torch
from torch import Tensor

from lenvm.model.kernels import (
    TensorDescriptor,
    gdc_launch_dependents,
    gdc_wait,
    launch_options,
    next_power_of_2,
    tl,
    triton,
)

LOG2_E = 1.4426950408889634
PIPELINE_BYTES = 160 * 1024
"""Shared memory for pages on their way."""

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
    copies = _can_copy(q)
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


def _can_copy(q: Tensor) -> bool:
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
