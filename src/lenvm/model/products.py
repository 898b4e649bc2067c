"""Matrix products with a layer's small work in their epilogues: Triton, for steps of few tokens.

Three kernels make a Llama-shaped layer, beside attention: `project_qkv` (bias, rotary positions,
keys and values stored), `project_out` (residual add, next norm's weight, the rows' sums of squares;
split along K, the last part to arrive adds up), `gate_and_up` (SiLU x up). No norm kernel is left:
`project_out` leaves x * weight unnormalised with sums of squares, and the next product multiplies
its result by 1 / rms. Tiles come in by the tensor copy engine (host-made descriptors).

Where one of these is faster than cuBLAS and a small kernel is for `kernel_choices.py` to say. Each
may be given a `total` [1] int32, read on the device: rows from there on are padding, whose tiles
end at once. What is left in those rows means nothing, and no other row depends on it.

Shape legend: N packed tokens, H hidden size, I MLP size, O outputs, Hq query heads, Hkv key heads,
D head size, T column tiles of a `project_out`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,attr-defined"

from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm.model.kernel_choices import Tile
from lenvm.model.kernels import (
    TensorDescriptor,
    gdc_launch_dependents,
    gdc_wait,
    inverse_rms,
    launch_options,
    tl,
    triton,
)


@dataclass
class Rows:
    """Input of a product: rows, and what is still to be done to them."""

    x: Tensor
    """[N, H]"""
    squares: Tensor | None = None
    """[T, N] fp32: parts of the rows' sums of squares; the result is still to be divided by the
    rows' root mean square. None: the rows are normalised."""


# -- queries, keys and values ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def _qkv_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    squares_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    num_tokens,
    total_ptr,
    eps,
    K: tl.constexpr,
    Hq: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    if total_ptr is not None:
        end = tl.load(total_ptr)
        if tile * BM >= end:
            return
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    m_offs = tile * BM + tl.arange(0, BM)
    m_mask = m_offs < num_tokens
    d_offs = tl.arange(0, D)
    h_offs = tl.arange(0, HALF)
    turn = m_offs[:, None] * D + h_offs[None, :]
    # read here and used after the product, so that nobody waits for them
    place = tl.load(index_ptr + m_offs, mask=m_mask, other=0)
    cos = tl.load(cos_ptr + turn, mask=m_mask[:, None], other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + turn, mask=m_mask[:, None], other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + head * D + d_offs)
    if T > 0:
        scale = inverse_rms(squares_ptr, m_offs, m_mask, num_tokens, eps, K, T)
    acc = tl.zeros([BM, D], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        x = x_desc.load([tile * BM, k])
        w = w_desc.load([head * D, k])
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    if T > 0:
        acc *= scale[:, None]
    if HAS_BIAS:
        acc += bias.to(tl.float32)[None, :]
    kind = q_ptr.dtype.element_ty
    acc = acc.to(kind)
    if head >= Hq + Hkv:
        v_at = (place * Hkv + head - Hq - Hkv)[:, None] * D + d_offs[None, :]
        tl.store(v_ptr + v_at, acc, mask=m_mask[:, None])
    else:
        x1, x2 = tl.split(tl.permute(tl.reshape(acc, [BM, 2, HALF]), (0, 2, 1)))
        x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
        y1 = (x1 * cos - x2 * sin).to(kind)
        y2 = (x2 * cos + x1 * sin).to(kind)
        if head < Hq:
            q_at = (m_offs.to(tl.int64) * Hq + head)[:, None] * D + h_offs[None, :]
            tl.store(q_ptr + q_at, y1, mask=m_mask[:, None])
            tl.store(q_ptr + q_at + HALF, y2, mask=m_mask[:, None])
        else:
            k_at = (place * Hkv + head - Hq)[:, None] * D + h_offs[None, :]
            tl.store(k_ptr + k_at, y1, mask=m_mask[:, None])
            tl.store(k_ptr + k_at + HALF, y2, mask=m_mask[:, None])


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
    pdl: bool,
    total: Tensor | None = None,
) -> None:
    """q [N, Hq, D], and k, v [*, Hkv, D] at `index` [N], rotated, from rows [N, H].

    weight [(Hq + 2 Hkv) D, H]; cos, sin [N, D], whose halves are equal. One head a program: BN of
    the tile is D.
    """
    num_tokens, size = rows.x.shape
    num_heads, head_size = q.shape[1:]
    num_kv = k.shape[-2]
    _qkv_kernel[(triton.cdiv(num_tokens, tile.BM), num_heads + 2 * num_kv)](
        TensorDescriptor.from_tensor(rows.x, [tile.BM, tile.BK]),
        TensorDescriptor.from_tensor(weight, [head_size, tile.BK]),
        weight if bias is None else bias,
        rows.x if rows.squares is None else rows.squares,
        cos,
        sin,
        q,
        k,
        v,
        index,
        num_tokens,
        total,
        eps,
        K=size,
        Hq=num_heads,
        Hkv=num_kv,
        D=head_size,
        BM=tile.BM,
        BK=tile.BK,
        T=0 if rows.squares is None else rows.squares.shape[0],
        HAS_BIAS=bias is not None,
        PDL=pdl,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **launch_options(pdl),
    )


# -- gate and up -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_kernel(
    x_desc,
    w_desc,
    squares_ptr,
    out_ptr,
    num_tokens,
    total_ptr,
    eps,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    if total_ptr is not None:
        end = tl.load(total_ptr)
        if tile * BM >= end:
            return
    column = tl.program_id(1) * BN
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        x = x_desc.load([tile * BM, k])
        gate = tl.dot(x, w_desc.load([column, k]).T, gate, input_precision="ieee")
        up = tl.dot(x, w_desc.load([SIZE + column, k]).T, up, input_precision="ieee")
    m_offs = tile * BM + tl.arange(0, BM)
    m_mask = m_offs < num_tokens
    if T > 0:
        scale = inverse_rms(squares_ptr, m_offs, m_mask, num_tokens, eps, K, T)[:, None]
        gate *= scale
        up *= scale
    out = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    at = m_offs.to(tl.int64)[:, None] * SIZE + column + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + at, out, mask=m_mask[:, None])


def gate_and_up(
    rows: Rows,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    tile: Tile,
    pdl: bool,
    total: Tensor | None = None,
) -> None:
    """out [N, I] = SiLU(gate) * up of rows [N, H]; weight [2 I, H]: gate's rows, then up's."""
    num_tokens, hidden = rows.x.shape
    size = out.shape[1]
    _gate_up_kernel[(triton.cdiv(num_tokens, tile.BM), size // tile.BN)](
        TensorDescriptor.from_tensor(rows.x, [tile.BM, tile.BK]),
        TensorDescriptor.from_tensor(weight, [tile.BN, tile.BK]),
        rows.x if rows.squares is None else rows.squares,
        out,
        num_tokens,
        total,
        eps,
        K=hidden,
        SIZE=size,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        T=0 if rows.squares is None else rows.squares.shape[0],
        PDL=pdl,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **launch_options(pdl),
    )


# -- back to the residual stream -------------------------------------------------------------------


@triton.jit
def _add_to_residual(
    acc,
    residual_ptr,
    norm_ptr,
    out_ptr,
    squares_ptr,
    m_offs,
    n_offs,
    part,
    num_tokens,
    SIZE: tl.constexpr,
):
    m_mask = m_offs < num_tokens
    at = m_offs.to(tl.int64)[:, None] * SIZE + n_offs[None, :]
    kind = out_ptr.dtype.element_ty
    acc += tl.load(residual_ptr + at, mask=m_mask[:, None], other=0.0).to(tl.float32)
    tl.store(residual_ptr + at, acc, mask=m_mask[:, None])
    tl.store(squares_ptr + part * num_tokens + m_offs, tl.sum(acc * acc, 1), mask=m_mask)
    norm = tl.load(norm_ptr + n_offs).to(tl.float32)
    tl.store(out_ptr + at, (acc * norm[None, :]).to(kind), mask=m_mask[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _out_kernel(
    x_desc,
    w_desc,
    residual_ptr,
    norm_ptr,
    out_ptr,
    squares_ptr,
    part_ptr,
    count_ptr,
    num_tokens,
    total_ptr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    if total_ptr is not None:
        end = tl.load(total_ptr)
        if tile * BM >= end:
            return
    column = tl.program_id(1)
    split = tl.program_id(2)
    SHARE: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS) * BK
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(split * SHARE, min(split * SHARE + SHARE, K), BK, num_stages=STAGES):
        x = x_desc.load([tile * BM, k])
        w = w_desc.load([column * BN, k])
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    m_offs = tile * BM + tl.arange(0, BM)
    n_offs = column * BN + tl.arange(0, BN)
    if SPLITS == 1:
        _add_to_residual(
            acc,
            residual_ptr,
            norm_ptr,
            out_ptr,
            squares_ptr,
            m_offs,
            n_offs,
            column,
            num_tokens,
            SIZE,
        )
    else:
        which = tile * tl.num_programs(1) + column
        inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        base = part_ptr + which.to(tl.int64) * (SPLITS * BM * BN)
        tl.store(base + split * (BM * BN) + inside, acc, cache_modifier=".cg")
        tl.debug_barrier()  # every thread has stored before one of them says so
        arrived = tl.atomic_add(count_ptr + which, 1, sem="acq_rel")
        if arrived == SPLITS - 1:  # the last; adds up in a fixed order, so results repeat exactly
            acc = tl.load(base + inside, cache_modifier=".cg")
            for part in tl.range(1, SPLITS, num_stages=1):
                acc += tl.load(base + part * (BM * BN) + inside, cache_modifier=".cg")
            tl.store(count_ptr + which, 0)
            _add_to_residual(
                acc,
                residual_ptr,
                norm_ptr,
                out_ptr,
                squares_ptr,
                m_offs,
                n_offs,
                column,
                num_tokens,
                SIZE,
            )


def project_out(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm: Tensor,
    out: Rows,
    count: Tensor,
    *,
    tile: Tile,
    pdl: bool,
    total: Tensor | None = None,
) -> None:
    """residual [N, H] fp32 += x [N, K] @ weight [H, K]^T; out.x = residual * norm [H], not yet
    divided by the rms of the rows, whose sums of squares go to out.squares [H / BN, N].

    count: int32, one for each tile of the result, 0 between kernels; of use where K is split."""
    num_tokens, inner = x.shape
    size = weight.shape[0]
    assert out.squares is not None
    num_tiles = triton.cdiv(num_tokens, tile.BM), size // tile.BN
    room = num_tiles[0] * num_tiles[1] * tile.BM * tile.BN * tile.splits if tile.splits > 1 else 1
    part = torch.empty(room, dtype=torch.float32, device=x.device)
    _out_kernel[(*num_tiles, tile.splits)](
        TensorDescriptor.from_tensor(x, [tile.BM, tile.BK]),
        TensorDescriptor.from_tensor(weight, [tile.BN, tile.BK]),
        residual,
        norm,
        out.x,
        out.squares,
        part,
        count,
        num_tokens,
        total,
        K=inner,
        SIZE=size,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        SPLITS=tile.splits,
        PDL=pdl,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **launch_options(pdl),
    )
