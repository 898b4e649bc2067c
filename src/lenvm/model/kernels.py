"""Triton kernels for the small pieces of a decoder layer, fused, and nothing else: pointers in,
pointers out. What other files of kernels share stands at the top.

Shape legend: N packed tokens, Hq query heads, Hkv key heads, D head size, H hidden size, I MLP
size.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "gdc_launch_dependents", "gdc_wait", "tl", "triton"]


def launch_options(pdl: bool) -> dict[str, bool]:
    """Programmatic dependent launch; the interpreter and older GPUs know no such option."""
    return {"launch_pdl": True} if pdl else {}


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


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
    row = tl.program_id(0).to(tl.int64) * H
    offs = tl.arange(0, BLOCK)
    mask = offs < H
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if total_ptr is not None:
        end = tl.load(total_ptr)
        if tl.program_id(0) >= end:
            return
    kind = out_ptr.dtype.element_ty
    x = tl.load(residual_ptr + row + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_X:
        x += tl.load(x_ptr + row + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row + offs, x, mask=mask)
    norm = x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)
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
def _begin_kernel(
    tokens_ptr,
    positions_ptr,
    embedding_ptr,
    frequencies_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    factor,
    eps,
    total_ptr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BESIDE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    if BESIDE:
        gdc_launch_dependents()
    if total_ptr is not None:
        end = tl.load(total_ptr)
        if tl.program_id(0) >= end:
            if BESIDE:
                gdc_wait()
            return
    kind = out_ptr.dtype.element_ty
    offs = tl.arange(0, BLOCK)
    mask = offs < H
    token = tl.load(tokens_ptr + at).to(tl.int64)
    x = tl.load(embedding_ptr + token * H + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + at * H + offs, x, mask=mask)
    norm = x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(out_ptr + at * H + offs, (norm.to(kind).to(tl.float32) * weight).to(kind), mask=mask)
    d_offs = tl.arange(0, BLOCK_HALF)
    d_mask = d_offs < HALF
    position = tl.load(positions_ptr + at).to(tl.float32)
    angle = position * tl.load(frequencies_ptr + d_offs, mask=d_mask, other=0.0)
    cos, sin = (tl.cos(angle) * factor).to(kind), (tl.sin(angle) * factor).to(kind)
    to = at * (2 * HALF) + d_offs
    tl.store(cos_ptr + to, cos, mask=d_mask)
    tl.store(cos_ptr + to + HALF, cos, mask=d_mask)
    tl.store(sin_ptr + to, sin, mask=d_mask)
    tl.store(sin_ptr + to + HALF, sin, mask=d_mask)
    if BESIDE:  # who waits for this kernel has waited for that too
        gdc_wait()


def begin(
    tokens: Tensor,
    positions: Tensor,
    embedding: Tensor,
    frequencies: Tensor,
    factor: float,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    total: Tensor | None = None,
    beside: bool = False,
) -> None:
    """What comes before the first layer: residual [N, H] fp32 = embedding [V, H] of tokens [N], out
    [N, H] = its RMSNorm * weight, and cos, sin [N, D] of positions [N] x frequencies [D / 2], times
    `factor`. total as in `add_norm`. beside: runs beside the kernel before, of which it reads
    nothing and which launches it early."""
    num_tokens, size = residual.shape
    half = frequencies.shape[0]
    _begin_kernel[(num_tokens,)](
        tokens,
        positions,
        embedding,
        frequencies,
        weight,
        residual,
        out,
        cos,
        sin,
        factor,
        eps,
        total,
        H=size,
        BLOCK=next_power_of_2(size),
        HALF=half,
        BLOCK_HALF=next_power_of_2(half),
        BESIDE=beside,
        num_warps=4 if size <= 2048 else 8,
        **launch_options(beside),
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
