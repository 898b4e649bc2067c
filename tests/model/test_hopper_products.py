"""The Hopper products against plain fp32; and that they compile without spills."""

import pytest
import torch
import torch.nn.functional as F

from lenvm.model.hopper import products
from lenvm.model.hopper.products import GATE_UP, OUT, QKV
from lenvm.model.kernel_choices import Tile
from lenvm.model.products import Rows
from model.hopper import check_compiles, disassemble, on_hopper

EPS = 1e-6
COUNTS = [1, 7, 64, 130, 512]


def draw(*shape, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def draw_rows(num_tokens, size, num_parts):
    """Rows as a product before them leaves them, and normalised, in fp32."""
    rows = draw(num_tokens, size, scale=3.0)
    if not num_parts:
        return Rows(rows), rows.float()
    squares = torch.rand(num_parts, num_tokens, device="cuda") * size
    rms = (squares.sum(0) / size + EPS).sqrt()[:, None]
    return Rows(rows, squares), rows.float() / rms


def is_near(got, expected, limit=5e-3):
    got, expected = got.double(), expected.double()
    assert got.isfinite().all()
    assert (got - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("head_size", "num_heads", "num_kv"), [(64, 14, 2), (128, 3, 1)])
@pytest.mark.parametrize("num_parts", [0, 7])
@pytest.mark.parametrize("shares", [1, 2, 4])
class TestQkv:
    pytestmark = on_hopper

    def test_it_equals_fp32(
        self, num_tokens, block, head_size, num_heads, num_kv, num_parts, shares
    ):
        size, outputs = 320, (num_heads + 2 * num_kv) * head_size
        rows, x = draw_rows(num_tokens, size, num_parts)
        weight = draw(outputs, size, scale=size**-0.5)
        bias = draw(outputs) if num_parts else None
        cos, sin = draw(2, num_tokens, head_size // 2).repeat(1, 1, 2)
        q = torch.full((num_tokens, num_heads, head_size), torch.nan).bfloat16().cuda()
        k, v = torch.full((2, num_tokens + 5, num_kv, head_size), torch.nan).bfloat16().cuda()
        index = torch.randperm(num_tokens + 5, device="cuda")[:num_tokens]
        tile = Tile(block, head_size, stages=5, hopper=True, shares=shares)
        assert products.can_multiply("qkv", tile, size, outputs)
        products.project_qkv(rows, weight, bias, cos, sin, EPS, q, k, v, index, tile=tile)
        out = F.linear(x, weight.float(), None if bias is None else bias.float())
        heads = out.view(num_tokens, -1, head_size)
        turned, own = heads[:, : num_heads + num_kv], heads[:, num_heads + num_kv :]
        a, b = turned.chunk(2, -1)
        turned = turned * cos[:, None].float() + torch.cat([-b, a], -1) * sin[:, None].float()
        is_near(q, turned[:, :num_heads], 8e-3)
        is_near(k[index], turned[:, num_heads:], 8e-3)
        is_near(v[index], own)
        others = torch.ones(num_tokens + 5, dtype=torch.bool, device="cuda")
        others[index] = False
        assert k[others].isnan().all()
        assert v[others].isnan().all()


class TestOut:
    pytestmark = on_hopper

    @pytest.mark.parametrize("num_tokens", COUNTS)
    @pytest.mark.parametrize(
        "tile",
        [
            Tile(128, 64, splits=1, stages=4, hopper=True),
            Tile(64, 64, splits=1, stages=4, hopper=True),
            Tile(64, 96, splits=2, stages=4, hopper=True),
            Tile(128, 64, splits=2, stages=7, hopper=True),
            Tile(128, 192, splits=4, stages=3, hopper=True),
            Tile(128, 32, splits=8, stages=3, hopper=True),
            Tile(128, 128, splits=4, stages=5, hopper=True),
            Tile(64, 128, splits=1, stages=8, hopper=True),
            Tile(64, 64, splits=1, stages=4, hopper=True, shares=2),
            Tile(128, 64, splits=2, stages=7, hopper=True, shares=2),
            Tile(128, 64, splits=2, stages=7, hopper=True, shares=4),
            Tile(128, 128, splits=4, stages=5, hopper=True, shares=2),
            Tile(64, 128, splits=2, stages=8, hopper=True, shares=4),
            Tile(64, 128, splits=1, stages=8, hopper=True, shares=4),
        ],
    )
    def test_it_equals_fp32_again_and_again(self, num_tokens, tile):
        inner, size = 1216, 384
        assert products.can_multiply("down", tile, inner, size)
        x, weight, norm = draw(num_tokens, inner), draw(size, inner, scale=inner**-0.5), draw(size)
        before = torch.randn(num_tokens, size, device="cuda")
        found = []
        for _ in range(3):
            residual = before.clone()
            squares = torch.full((size // tile.BN, num_tokens), torch.nan, device="cuda")
            rows = Rows(torch.full_like(before, torch.nan, dtype=torch.bfloat16), squares)
            products.project_out(x, weight, residual, norm, rows, tile=tile)
            found.append((residual, rows.x, squares))
        expected = before + F.linear(x.float(), weight.float())
        residual, out, squares = found[0]
        is_near(residual, expected, 1e-5)
        is_near(out, expected * norm.float())
        is_near(squares.sum(0), expected.pow(2).sum(1), 1e-4)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class TestGateAndUp:
    pytestmark = on_hopper

    @pytest.mark.parametrize("num_tokens", COUNTS)
    @pytest.mark.parametrize("block", [64, 128])
    @pytest.mark.parametrize("columns", [64, 160])
    @pytest.mark.parametrize("num_parts", [0, 14])
    @pytest.mark.parametrize("shares", [1, 2])
    def test_it_equals_fp32(self, num_tokens, block, columns, num_parts, shares):
        size, inner = 256, 352  # tiles of 160: the last is a fifth full
        tile = Tile(block, columns, stages=4, hopper=True, shares=shares)
        assert products.can_multiply("gate_up", tile, size, inner)
        rows, x = draw_rows(num_tokens, size, num_parts)
        weight = draw(2 * inner, size, scale=3 * size**-0.5)  # far beyond what exp needs
        out = torch.full((num_tokens, inner), torch.nan).bfloat16().cuda()
        products.gate_and_up(rows, weight, EPS, out, tile=tile)
        gate, up = F.linear(x, weight.float()).chunk(2, 1)
        is_near(out, F.silu(gate) * up)

    @pytest.mark.parametrize("total", [1, 128, 129, 300])
    @pytest.mark.parametrize("shares", [1, 2])
    def test_tiles_of_padding_end_at_once(self, total, shares):
        tile = Tile(128, 64, stages=4, hopper=True, shares=shares)
        x, weight = draw(300, 128), draw(256, 128)
        out = torch.full((300, 128), torch.nan).bfloat16().cuda()
        count = torch.tensor([total], dtype=torch.int32, device="cuda")
        products.gate_and_up(Rows(x), weight, EPS, out, tile=tile, total=count)
        gate, up = F.linear(x.float(), weight.float()).chunk(2, 1)
        end = min(-(-total // (128 * shares)) * 128 * shares, 300)
        is_near(out[:end], (F.silu(gate) * up)[:end])
        assert out[end:].isnan().all()

    def test_a_gate_far_from_zero_overflows_nothing(self):
        tile = Tile(128, 64, stages=4, hopper=True)
        x = torch.ones(2, 64, device="cuda").bfloat16()
        x[1] = -1
        weight = torch.full((128, 64), 4.0).bfloat16().cuda()  # gate and up are 256 and -256
        out = torch.full((2, 64), torch.nan).bfloat16().cuda()
        products.gate_and_up(Rows(x), weight, EPS, out, tile=tile)
        assert (out[0] == 65536).all()
        assert (out[1].abs() < 1e-3).all()


KINDS = [
    (QKV, Tile(64, 64, stages=6), 896, 1152, 14, {"HQ": 14, "HKV": 2, "HAS_BIAS": 1}),
    (QKV, Tile(128, 64, stages=8), 896, 1152, 0, {"HQ": 14, "HKV": 2, "HAS_BIAS": 1}),
    (QKV, Tile(64, 128, stages=8), 1536, 2048, 12, {"HQ": 12, "HKV": 2, "HAS_BIAS": 0}),
    (OUT, Tile(128, 64, splits=2, stages=8), 4864, 896, 0, {}),
    (OUT, Tile(128, 128, splits=4, stages=5), 4864, 896, 0, {}),
    (OUT, Tile(64, 64, stages=8), 896, 896, 0, {}),
    (GATE_UP, Tile(128, 160, stages=4), 896, 4864, 14, {}),
    (GATE_UP, Tile(128, 128, stages=4), 1536, 8960, 12, {}),
    (
        QKV,
        Tile(128, 64, stages=8, shares=2),
        896,
        1152,
        14,
        {"HQ": 14, "HKV": 2, "HAS_BIAS": 1},
    ),
    (OUT, Tile(128, 128, splits=4, stages=5, shares=2), 4864, 896, 0, {}),
    (OUT, Tile(64, 128, splits=2, stages=8, shares=4), 4864, 896, 0, {}),
    (GATE_UP, Tile(128, 160, stages=4, shares=2), 896, 4864, 14, {}),
]
about = pytest.mark.parametrize(("kind", "tile", "inputs", "outputs", "num_parts", "heads"), KINDS)


def define(kind, tile, inputs, outputs, num_parts, heads):
    definitions = products.definitions(kind, tile, inputs, outputs, num_parts) | heads
    return "products.cu", definitions, [("multiply", products.product(kind, tile))]


@about
def test_they_compile_without_spills(kind, tile, inputs, outputs, num_parts, heads):
    check_compiles(*define(kind, tile, inputs, outputs, num_parts, heads))


@about
def test_none_waits_for_all_memory_of_the_gpu(kind, tile, inputs, outputs, num_parts, heads):
    """As mbarrier.arrive.release.cluster would, once for each tile along the inputs."""
    code = disassemble(*define(kind, tile, inputs, outputs, num_parts, heads))
    assert "HGMMA" in code
    assert "MEMBAR.ALL.GPU" not in code


@pytest.mark.parametrize(
    ("name", "tile", "inputs", "outputs", "expected"),
    [
        ("gate_up", Tile(128, 160, stages=4), 896, 4864, True),
        ("gate_up", Tile(128, 160, stages=5), 896, 4864, False),  # shared memory
        ("gate_up", Tile(256, 64, stages=2), 896, 4864, False),
        ("down", Tile(128, 64, splits=2), 4864, 896, True),
        ("down", Tile(128, 64, splits=3), 4864, 896, False),
        ("down", Tile(128, 160, splits=2), 4864, 896, False),  # 896 is no multiple
        ("down", Tile(64, 64, splits=8), 4864, 896, False),  # half a warp's rows
        ("down", Tile(64, 128, splits=2, stages=8, shares=4), 4864, 896, True),
        ("down", Tile(128, 128, splits=2, stages=5), 4864, 896, True),
        ("down", Tile(128, 128, stages=5), 4864, 896, False),  # squares of all 128 rows
        ("down", Tile(128, 128, splits=4, shares=2), 4864, 896, True),
        ("down", Tile(128, 64, splits=8, shares=2), 4864, 896, False),  # 16 blocks of a cluster
        ("gate_up", Tile(128, 160, stages=4, shares=4), 896, 4864, True),
        ("gate_up", Tile(128, 160, stages=4, shares=8), 896, 4864, False),
        ("out", Tile(128, 64, splits=2), 900, 896, False),
        ("out", Tile(128, 64, splits=4), 128, 896, False),  # less than one block each
    ],
)
def test_which_tiles_are_known(name, tile, inputs, outputs, expected):
    assert products.can_multiply(name, tile, inputs, outputs) == expected
