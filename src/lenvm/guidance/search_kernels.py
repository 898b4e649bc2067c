"""Triton kernels of `candidates.search`: the logits are read once, in place and in their own type.

`candidates.py` holds the same in plain torch, which says what they must give. The first kernel
reads a row in parts: the maximum of each block of tokens and, for the log-normaliser, each part's
maximum and sum. The second has one program a row: the tokens are in the blocks of the largest
maxima, and only those are read again. Tokens of one logit come in the order of their ids.

Shape legend: R rows, V vocabulary, K candidates, E ending tokens, P parts of a row, N blocks of it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,attr-defined"

from typing import Any

import torch
from torch import Tensor

from lenvm.errors import LenVMError
from lenvm.guidance import candidates
from lenvm.guidance.candidates import Truncation
from lenvm.model.kernels import tl, triton  # the one file that imports Triton

MAX_K = 64
MAX_ENDINGS = 64
MAX_BLOCKS = 4096
"""Of a row: what a program holds in registers."""
PART = 32
"""Blocks that a program of the first kernel reads."""
OF_ROWS = ["ending_ptr", "temperature_ptr", "num_generated_ptr", "may_end_from_ptr"]
"""One or few numbers a row: what they are aligned to changes with R, and is not worth a kernel."""

BLOCK = tl.constexpr(candidates.BLOCK)
BANNED = tl.constexpr(candidates.BANNED)
LOG2_E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
NO_KEY = tl.constexpr(-(2**63))
"""Below the key of every logit."""
LOW_BITS = tl.constexpr(2**31 - 1)


@triton.jit
def _temperature(temperature_ptr, row):
    t = tl.load(temperature_ptr + row)
    return tl.maximum(tl.where(t > 0, t, 1.0), 1e-6)


@triton.jit
def _may_end(num_generated_ptr, may_end_from_ptr, row):
    return tl.load(num_generated_ptr + row) + 1 >= tl.load(may_end_from_ptr + row)


@triton.jit
def _key(x, index):
    """int64 that sort as logits x do, equal ones by index, the lowest first. -0 is below 0, and NaN
    has a place."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & LOW_BITS)
    return (ordered.to(tl.int64) << 32) | (index ^ LOW_BITS).to(tl.int64)


@triton.jit
def _index(key):
    return ((key & LOW_BITS) ^ LOW_BITS).to(tl.int32)


@triton.jit
def _logit(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & LOW_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _pick(keys, num, SIZE: tl.constexpr):
    """The `num` largest of distinct keys, largest first: [SIZE], NO_KEY where there are no more."""
    place = tl.arange(0, SIZE)
    found = tl.full([SIZE], NO_KEY, tl.int64)
    for i in range(num):
        best = tl.max(keys, 0)
        found = tl.where(place == i, best, found)
        keys = tl.where(keys == best, NO_KEY, keys)
    return found


@triton.jit(do_not_specialize=["num_endings", "num_parts"], do_not_specialize_on_alignment=OF_ROWS)
def _read_kernel(
    logits_ptr, ending_ptr, temperature_ptr, num_generated_ptr, may_end_from_ptr,
    maxima_ptr, parts_ptr, stride, num_tokens, num_endings, num_parts,
    PART: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    start = part * (PART * BLOCK)
    blocks = tl.arange(0, PART)
    tokens = start + blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logits_ptr += row.to(tl.int64) * stride
    x = tl.load(logits_ptr + tokens, tokens < num_tokens, other=-INF).to(tl.float32)
    # nothing of this is read where the row must end
    if not _may_end(num_generated_ptr, may_end_from_ptr, row):
        for i in range(num_endings):
            ending = tl.load(ending_ptr + row * num_endings + i)
            if (ending >= start) & (ending < start + PART * BLOCK):
                x = tl.where((tokens == ending) & (x > BANNED), BANNED, x)
    scale = LOG2_E / _temperature(temperature_ptr, row)
    maxima = tl.max(x, 1)
    most = tl.max(maxima, 0)
    mass = tl.exp2((x - tl.where(most > -INF, most, 0.0)) * scale)
    place = row * num_parts + part
    tl.store(maxima_ptr + place * PART + blocks, maxima)
    tl.store(parts_ptr + 2 * place, most)
    tl.store(parts_ptr + 2 * place + 1, tl.sum(tl.sum(mass, 1), 0))


@triton.jit(
    do_not_specialize=["num_endings", "num_parts", "num"],
    do_not_specialize_on_alignment=[*OF_ROWS, "must_end_from_ptr"],
)
def _choose_kernel(
    logits_ptr, ending_ptr, temperature_ptr, num_generated_ptr, may_end_from_ptr, must_end_from_ptr,
    maxima_ptr, parts_ptr, top_ptr, ids_ptr,
    stride, num_tokens, num_endings, num_parts, num,
    PART: tl.constexpr, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    temperature = _temperature(temperature_ptr, row)
    scale = LOG2_E / temperature
    order = tl.arange(0, E)
    endings = tl.load(ending_ptr + row * num_endings + order, order < num_endings, other=-1)
    is_real = (endings >= 0) & (endings < num_tokens)
    own = tl.load(logits_ptr + endings, is_real, other=-INF).to(tl.float32)
    can_end = tl.max((own > -INF).to(tl.int32), 0) > 0
    must_end = tl.load(num_generated_ptr + row) + 1 >= tl.load(must_end_from_ptr + row)
    if must_end & can_end:
        repeats = (endings[:, None] == endings[None, :]) & (order[None, :] < order[:, None])
        is_new = is_real & (tl.sum(repeats.to(tl.int32), 1) == 0)
        most = tl.max(own, 0)
        total = tl.sum(tl.where(is_new, tl.exp2((own - most) * scale), 0.0), 0)
        ending_keys = tl.where(is_new, _key(own, endings.to(tl.int32)), NO_KEY)
        found = _pick(ending_keys, num, K)
    else:
        parts = tl.arange(0, P)
        has_part = parts < num_parts
        place = row * num_parts + parts
        part_max = tl.load(parts_ptr + 2 * place, has_part, other=-INF)
        part_sum = tl.load(parts_ptr + 2 * place + 1, has_part, other=0.0)
        most = tl.max(part_max, 0)
        part_sum *= tl.exp2((part_max - tl.where(most > -INF, most, 0.0)) * scale)
        total = tl.sum(part_sum, 0)
        blocks = tl.arange(0, P * PART)
        num_blocks = num_parts * PART
        maxima_ptr += row * num_blocks
        maxima = tl.load(maxima_ptr + blocks, blocks < num_blocks, other=-INF)
        chosen = _pick(_key(maxima, blocks), num, K)
        first = tl.where(chosen > NO_KEY, _index(chosen) * BLOCK, num_tokens)
        tokens = first[:, None] + tl.arange(0, BLOCK)[None, :]
        is_token = tokens < num_tokens
        x = tl.load(logits_ptr + tokens, is_token, other=-INF).to(tl.float32)
        if not _may_end(num_generated_ptr, may_end_from_ptr, row):
            for i in range(num_endings):
                ending = tl.load(ending_ptr + row * num_endings + i)
                x = tl.where((tokens == ending) & (x > BANNED), BANNED, x)
        token_keys = tl.where(is_token, _key(x, tokens), NO_KEY)
        found = _pick(tl.reshape(token_keys, [K * BLOCK]), num, K)
    # as log_softmax of logits over the temperature rounds it
    x = tl.div_rn(_logit(found), tl.zeros_like(_logit(found)) + temperature)
    top = x - tl.div_rn(most, temperature) - tl.log(total)
    is_found = found > NO_KEY
    rank = tl.arange(0, K)
    tl.store(top_ptr + row * num + rank, tl.where(is_found, top, -INF), rank < num)
    ids = tl.where(is_found, _index(found), 0).to(tl.int64)
    tl.store(ids_ptr + row * num + rank, ids, rank < num)


# -- from tensors ----------------------------------------------------------------------------------


def can_search(logits_RV: Tensor, truncation: Truncation) -> bool:
    """Whether `search` takes them: any of the usual types, rows of consecutive logits, and no more
    candidates, ending tokens and blocks than a program can hold."""
    num_tokens = logits_RV.shape[-1]
    return (
        logits_RV.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits_RV.stride(-1) == 1
        and logits_RV.numel() > 0
        and min(truncation.max_candidates, num_tokens) <= MAX_K
        and truncation.ending_ids.shape[-1] <= MAX_ENDINGS
        and num_tokens <= MAX_BLOCKS * candidates.BLOCK
        and (not logits_RV.is_cuda or logits_RV.device.index == torch.cuda.current_device())
    )


def search(
    logits_RV: Tensor,
    truncation: Truncation,
    num_generated_R: Tensor,
    may_end_from_R: Tensor,
    must_end_from_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """`candidates.search`: (log-probabilities [R, K] fp32, ids [R, K] int64), most likely first.

    logits: fp32, bf16 or fp16, any row stride; they stay as they are. num_generated_R int64 tokens;
    the next one may, or must, end an answer of at least `may_end_from_R`, `must_end_from_R` tokens
    with it (fp32, see `RuleParams`). Nothing waits for the device.
    """
    rows, num_tokens = logits_RV.shape
    num = min(truncation.max_candidates, num_tokens)
    num_parts = -(-num_tokens // (PART * candidates.BLOCK))
    endings = truncation.ending_ids.contiguous()
    temperature = truncation.temperature.contiguous()
    floats: dict[str, Any] = {"dtype": torch.float32, "device": logits_RV.device}
    read = torch.empty(rows, num_parts, PART, **floats), torch.empty(rows, num_parts, 2, **floats)
    top = torch.empty(rows, num, **floats)
    ids = torch.empty(rows, num, dtype=torch.int64, device=logits_RV.device)
    sizes = (logits_RV.stride(0), num_tokens, endings.shape[-1], num_parts)
    _read_kernel[(num_parts, rows)](
        logits_RV, endings, temperature, num_generated_R, may_end_from_R, *read, *sizes,
        PART=PART, num_warps=4,
    )  # fmt: skip
    _choose_kernel[(rows,)](
        logits_RV, endings, temperature, num_generated_R, may_end_from_R, must_end_from_R,
        *read, top, ids, *sizes, num,
        PART=PART,
        E=max(8, triton.next_power_of_2(endings.shape[-1])),
        P=triton.next_power_of_2(num_parts),
        K=max(16, triton.next_power_of_2(num)),
        num_warps=8,
    )  # fmt: skip
    return top, ids


def try_out(device: str = "cuda") -> None:
    """Search one row there, against the torch code. LenVMError where they differ."""
    one: dict[str, Any] = {"device": device}
    logits = torch.linspace(3, -3, 5 * candidates.BLOCK, **one).roll(77).unsqueeze(0)
    cut = Truncation(
        temperature=torch.full((1,), 0.7, **one),
        top_k=torch.full((1,), 15, **one),
        top_p=torch.ones(1, **one),
        min_p=torch.zeros(1, **one),
        ending_ids=torch.full((1, 1), 77, **one),
        max_candidates=15,
    )
    ends = torch.full((1,), 9.0, **one), torch.full((1,), torch.inf, **one)
    top, ids = search(logits, cut, torch.zeros(1, dtype=torch.long, **one), *ends)
    no = torch.zeros(1, dtype=torch.bool, **one)
    want, want_ids = candidates.search(logits, cut, may_end_R=no, must_end_R=no)
    if not torch.equal(ids, want_ids) or not torch.allclose(top, want, atol=1e-4):
        raise LenVMError(f"ids {ids.tolist()}, expected {want_ids.tolist()}")
