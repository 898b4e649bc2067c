"""PackedLinear against the linears it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lenvm.model.head import HeadName, build_head
from lenvm.model.packed_linear import PackedLinear, can_pack, pack_head, pack_linear

TYPES = [d for d in (torch.float32, torch.bfloat16) if can_pack(torch.device("cpu"), d)]
pytestmark = pytest.mark.skipif(not TYPES, reason="needs oneDNN")


@pytest.fixture(params=TYPES)
def dtype(request):
    torch.manual_seed(0)
    return request.param


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 130])
@torch.inference_mode()
def test_joined_and_reordered(dtype, bias, num_tokens):
    linears = [nn.Linear(24, n, bias=bias, dtype=dtype) for n in (6, 10)]
    order = torch.randperm(16)
    packed = PackedLinear(linears, order)
    assert packed.out_features == 16
    x, other = torch.randn(num_tokens, 24).to(dtype), torch.randn(num_tokens, 16).to(dtype)
    plain = torch.cat([linear(x) for linear in linears], -1)[:, order]
    torch.testing.assert_close(packed(x), plain, **tolerance(dtype))
    torch.testing.assert_close(packed(x, "swish"), F.silu(plain), **tolerance(dtype))
    torch.testing.assert_close(packed.times(x, other), plain * other, **tolerance(dtype))


def test_an_optimizer_step_is_seen(dtype):
    linear = nn.Linear(8, 4, dtype=dtype)
    packed, x = PackedLinear([linear]), torch.randn(3, 8).to(dtype)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    linear(x).sum().backward()
    before = packed(x)
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(packed(x), linear(x), **tolerance(dtype))
    assert not torch.equal(packed(x), before)


def test_what_cannot_be_packed_comes_back_as_it_is():
    for linear in (nn.Linear(4, 4, dtype=torch.float16), nn.Linear(4, 4, device="meta")):
        assert pack_linear(linear) is linear
    assert isinstance(pack_linear(nn.Linear(4, 4)), PackedLinear)


@pytest.mark.parametrize("name", ["scalar", "distribution"])
def test_a_packed_head_is_the_head(name: HeadName):
    head = build_head(name, 48)
    x = torch.randn(19, 48).bfloat16()
    packed = pack_head(head)
    assert (packed is not head) == can_pack(x.device, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), head(x), rtol=1e-5, atol=1e-5)

    def other(hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    assert pack_head(other) is other
