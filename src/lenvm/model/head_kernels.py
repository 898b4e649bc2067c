"""Triton kernels of a value head, for steps whose hidden states are in 16 bits.

`head.py` holds the same arithmetic in plain torch, which says what each must give. A product with
`fc` in TF32, whose epilogue is the bias, SiLU and, for heads of one output, its tile's share of the
product with `summary`; then a kernel that adds up the shares in a fixed order, where they are asked
for. With one output every row is computed alike, whatever and however many the others are; of many
outputs, the product with `summary` is cuBLAS's.

Shape legend: N packed tokens, H hidden size, E outputs, T column tiles of `fc`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,attr-defined"

from collections.abc import Callable

import torch
from torch import Tensor

from lenvm.model.device import tf32_products
from lenvm.model.head import ValueHead
from lenvm.model.kernel_choices import Tile
from lenvm.model.kernels import (
    TensorDescriptor,
    gdc_wait,
    inverse_rms,
    launch_options,
    tl,
    triton,
)
from lenvm.model.products import Rows

WIDE, NARROW = Tile(64, 64, BK=128, stages=3), Tile(64, 64, BK=64, stages=4)
"""One for all numbers of tokens, so that a row's result does not depend on the bucket: the first
is faster (6.5 us for 7.7), and needs 145 KB of shared memory, as GPUs of data centres have."""
SUM_SLOTS = 32
"""Outputs of a program that adds up shares."""


@triton.jit(do_not_specialize=["num_tokens"])
def _head_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    summary_ptr,
    squares_ptr,
    out_ptr,
    num_tokens,
    total_ptr,
    eps,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    T: tl.constexpr,
    SUMS: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    column = tl.program_id(1)
    n_offs = column * BN + tl.arange(0, BN)
    n_mask = n_offs < H
    bias = tl.load(bias_ptr + n_offs, mask=n_mask, other=0.0)
    if SUMS:
        summary = tl.load(summary_ptr + n_offs, mask=n_mask, other=0.0)
    if PDL:
        gdc_wait()
    if total_ptr is not None:
        end = tl.load(total_ptr)
        if tile * BM >= end:
            return
    m_offs = tile * BM + tl.arange(0, BM)
    m_mask = m_offs < num_tokens
    if T > 0:
        scale = inverse_rms(squares_ptr, m_offs, m_mask, num_tokens, eps, H, T)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, H, BK, num_stages=STAGES):
        x = x_desc.load([tile * BM, k]).to(tl.float32)
        w = w_desc.load([column * BN, k])
        acc = tl.dot(x, w.T, acc, input_precision="tf32")
    if T > 0:
        acc *= scale[:, None]
    acc += bias[None, :]
    acc = acc / (1.0 + tl.exp(-acc))
    if SUMS:
        share = tl.sum(acc * summary[None, :], 1)
        tl.store(out_ptr + column * num_tokens + m_offs, share, mask=m_mask)
    else:
        at = m_offs.to(tl.int64)[:, None] * H + n_offs[None, :]
        tl.store(out_ptr + at, acc, mask=m_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _sum_kernel(
    shares_ptr,
    bias_ptr,
    at_ptr,
    out_ptr,
    num_tokens,
    num_slots,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_slots
    at = offs
    if at_ptr is not None:
        at = tl.load(at_ptr + offs, mask=mask, other=0).to(tl.int32)
    real = mask & (at < num_tokens)
    total = tl.load(bias_ptr) + tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(0, T):
        total += tl.load(shares_ptr + part * num_tokens + at, mask=real, other=0.0)
    tl.store(out_ptr + offs, tl.where(real, total, 0.0), mask=mask)


class FusedHead:
    """A `ValueHead` over hidden states in 16 bits: [N, H] -> [N, E] fp32. For inference; reads the
    head's own weights."""

    def __init__(self, head: ValueHead) -> None:
        self.num_outputs = head.num_outputs
        self._tile = choose_tile(head.fc.weight.device)
        self._fc = head.fc.weight.detach(), head.fc.bias.detach()
        self._summary = head.summary.weight.detach(), head.summary.bias.detach()

    def __call__(self, hidden: Tensor) -> Tensor:
        out = self.build(len(hidden))
        if len(hidden):
            self.write(Rows(hidden), 0.0, out)
        return self.read(out)

    def build(self, num_tokens: int) -> Tensor:
        """What `write` fills and `read` reads: of one output [T, N], each tile's share; of many
        [N + 1, E], the last row 0."""
        weight = self._fc[0]
        if self.num_outputs == 1:
            return weight.new_empty(triton.cdiv(weight.shape[0], self._tile.BN), num_tokens)
        return weight.new_zeros(num_tokens + 1, self.num_outputs)

    def write(
        self,
        rows: Rows,
        eps: float,
        out: Tensor,
        *,
        pdl: bool = False,
        total: Tensor | None = None,
    ) -> None:
        """`out` (of `build`) of rows [N, H] whose norm has that eps, where it is still to be done.
        total [1] int32: what is left in rows from there on means nothing."""
        (weight, bias), tile = self._fc, self._tile
        num_tokens, size = rows.x.shape
        num_columns = triton.cdiv(size, tile.BN)
        sums = self.num_outputs == 1
        found = out if sums else weight.new_empty(num_tokens, size)
        _head_kernel[(triton.cdiv(num_tokens, tile.BM), num_columns)](
            TensorDescriptor.from_tensor(rows.x.contiguous(), [tile.BM, tile.BK]),
            TensorDescriptor.from_tensor(weight, [tile.BN, tile.BK]),
            bias,
            self._summary[0],
            rows.x if rows.squares is None else rows.squares,
            found,
            num_tokens,
            total,
            eps,
            H=size,
            BM=tile.BM,
            BN=tile.BN,
            BK=tile.BK,
            T=0 if rows.squares is None else rows.squares.shape[0],
            SUMS=sums,
            PDL=pdl,
            STAGES=tile.stages,
            num_warps=tile.warps,
            **launch_options(pdl),
        )
        if not sums:
            with tf32_products():
                torch.addmm(self._summary[1], found, self._summary[0].T, out=out[:-1])

    def read(self, out: Tensor, at: Tensor | None = None) -> Tensor:
        """Outputs [*, E] fp32 of the packed tokens `at` [*] int64, where N is nobody and has 0; or
        of all, [N, E]."""
        if self.num_outputs > 1:
            return out[:-1] if at is None else out[at]
        num_columns, num_tokens = out.shape
        found = out.new_empty(*((num_tokens,) if at is None else at.shape), 1)
        if found.numel():
            _sum_kernel[(triton.cdiv(found.numel(), SUM_SLOTS),)](
                out,
                self._summary[1],
                None if at is None else at.contiguous(),
                found,
                num_tokens,
                found.numel(),
                T=num_columns,
                BLOCK=SUM_SLOTS,
                num_warps=1,
            )
        return found


def fuse_head(head: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> FusedHead | None:
    """The head's kernels over hidden states of `dtype`, on a GPU; None where they do not apply: to
    fp32, whose products stay exact, and to heads that are not a `ValueHead` in fp32."""
    if not isinstance(head, ValueHead) or type(head).forward is not ValueHead.forward:
        return None
    parameters = list(head.parameters())
    plain = all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    weight = head.fc.weight
    aligned = weight.shape[1] % 16 == 0 and weight.data_ptr() % 16 == 0  # for the copy engine
    is_16_bit = dtype in (torch.bfloat16, torch.float16)
    return FusedHead(head) if plain and aligned and is_16_bit else None


def choose_tile(device: torch.device) -> Tile:
    """The one for a head on that device."""
    if device.type != "cuda":
        return NARROW
    needed = WIDE.stages * WIDE.BK * (2 * WIDE.BM + 4 * WIDE.BN) + 1024
    about = torch.cuda.get_device_properties(device)
    most = getattr(about, "shared_memory_per_block_optin", 0)  # AMD's do not say
    return WIDE if needed <= most else NARROW
