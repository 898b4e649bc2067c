"""PackedLinear: a linear layer on the CPU whose weights are kept in oneDNN's own layout.

A plain product in torch brings its weights into that layout at every call, which for a few dozen
tokens takes as long as the product; fp32 goes to MKL, which is slow on some CPUs. Packed once, a
small product is two to three times as fast. The numbers are the same up to the order of sums.

A packed copy is a second copy of the weights, so there is a limit (`has_room`). It is packed anew
when the weights are changed in place (by an optimizer, not through `.data`).
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lenvm.model.head import ValueHead

logger = logging.getLogger(__name__)
SHARE = 0.25
"""Most of the machine's memory that packed copies of one model may take."""
TOKENS = 16
"""Tokens that the layout is chosen for; measured to be the best for 1 to 128 alike."""


class PackedLinear:
    """x [N, in] -> [N, out] through linears of one input, joined; theirs stay as they are.

    order: rows of the joined weight, in the order in which they should come out.
    """

    def __init__(self, linears: Sequence[nn.Linear], order: Tensor | None = None) -> None:
        self.linears, self.order = list(linears), order
        self._sources = [p for m in linears for p in (m.weight, m.bias) if p is not None]
        self._versions = [p for p in self._sources if not p.is_inference()]
        self.out_features = sum(m.out_features for m in linears)
        self._pack()

    def _pack(self) -> None:
        self._version = sum(p._version for p in self._versions)
        weight = self._join([m.weight for m in self.linears])
        biases = [m.bias for m in self.linears]
        self._bias = None if any(b is None for b in biases) else self._join(biases)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)

    @torch.no_grad()
    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        joined = torch.cat([p.detach() for p in parts]) if len(parts) > 1 else parts[0].detach()
        return joined if self.order is None else joined[self.order]

    def __call__(self, x: Tensor, activation: Literal["none", "swish"] = "none") -> Tensor:
        """The product, or SiLU of it, rounded once."""
        if sum(p._version for p in self._versions) != self._version:
            self._pack()
        run = torch.ops.mkldnn._linear_pointwise
        out: Tensor = run(x, self._weight, self._bias, activation, [], "")
        return out

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other` [N, out], rounded once."""
        if sum(p._version for p in self._versions) != self._version:
            self._pack()
        run = torch.ops.mkldnn._linear_pointwise.binary
        out: Tensor = run(x, other, self._weight, self._bias, "mul")
        return out


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and this CPU run packed products of that type well."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    mkldnn: Any = torch.ops.mkldnn
    if not hasattr(mkldnn, "_linear_pointwise") or not hasattr(mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def has_room(parameters: Iterable[Tensor]) -> bool:
    """Whether a second copy of these parameters is little beside the machine's memory."""
    needed = sum(p.numel() * p.element_size() for p in parameters)
    if not hasattr(os, "sysconf"):  # Windows does not say
        return True
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= SHARE * total:
        return True
    logger.warning(
        "%.1f GB of weights are not packed: a second copy is over a quarter of %.1f GB of memory, "
        "so products on the CPU are slower",
        needed / 1e9,
        total / 1e9,
    )
    return False


def pack_linear(linear: nn.Linear) -> PackedLinear | nn.Linear:
    """The linear, packed where that can be done."""
    weight = linear.weight
    if type(linear) is nn.Linear and can_pack(weight.device, weight.dtype) and has_room([weight]):
        return PackedLinear([linear])
    return linear


def pack_head(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A `ValueHead` [N, H] -> [N, D] with its two products packed, where that can be done."""
    if not isinstance(head, ValueHead) or type(head).forward is not ValueHead.forward:
        return head
    first, last = pack_linear(head.fc), pack_linear(head.summary)
    if not isinstance(first, PackedLinear) or not isinstance(last, PackedLinear):
        return head
    return lambda hidden: last(first(hidden.float(), "swish"))
