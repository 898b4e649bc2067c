"""Which products may run in TF32, and that the process's own setting comes back."""

from collections.abc import Iterator

import pytest
import torch

from lenvm.model import ragged
from lenvm.model.device import tf32_products, with_fast_products
from lenvm.model.ragged import RaggedDecoder
from model.families import build

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _own_setting() -> Iterator[None]:
    before = MATMUL.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = before
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def set_new(value: str) -> None:
    MATMUL.allow_tf32 = False
    MATMUL.fp32_precision = value


SETTINGS = {
    "none": lambda: set_new("none"),
    "ieee": lambda: set_new("ieee"),
    "tf32": lambda: set_new("tf32"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}


def read() -> tuple[str, object]:
    """The newer setting, and the older one, which cannot be read where they are at odds."""
    try:
        return MATMUL.fp32_precision, torch.get_float32_matmul_precision()
    except RuntimeError:
        return MATMUL.fp32_precision, None


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_setting_comes_back(setting: str):
    SETTINGS[setting]()
    before = read()
    with tf32_products():
        assert MATMUL.fp32_precision == "tf32"
        assert read()[1] in ("high", "medium") or setting == "tf32", "nobody can read the older one"
        with tf32_products():
            pass
        assert MATMUL.fp32_precision == "tf32"
    assert read() == before
    with pytest.raises(ValueError, match="inside"), tf32_products():
        raise ValueError("inside")
    assert read() == before


def test_tf32_is_for_16_bits_on_a_gpu_alone():
    seen = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(MATMUL.fp32_precision)
        return hidden

    before = MATMUL.fp32_precision
    hidden = torch.ones(1, 2)
    for dtype in (torch.bfloat16, torch.float16):
        assert with_fast_products(head, dtype, "cuda")(hidden) is hidden
        assert with_fast_products(head, dtype, torch.device("cuda", 1))(hidden) is hidden
        assert with_fast_products(head, dtype, "cpu") is head
    for device in ("cuda", "cpu"):
        assert with_fast_products(head, torch.float32, device) is head
    assert seen == ["tf32"] * 4
    assert MATMUL.fp32_precision == before


def test_a_decoder_asks_with_its_backbones_type(monkeypatch: pytest.MonkeyPatch):
    asked, own = [], with_fast_products

    def ask(head, dtype, device):
        asked.append((dtype, device.type))
        return own(head, dtype, device)

    monkeypatch.setattr(ragged, "with_fast_products", ask)
    options = {"max_tokens": 50, "max_requests": 1, "max_candidates": 2}
    for dtype in (torch.float32, torch.bfloat16):
        precisions = []

        def head(hidden, precisions=precisions):
            precisions.append(MATMUL.fp32_precision)
            return hidden.float()

        decoder = RaggedDecoder(build("qwen2", dtype=dtype), head=head, **options)
        decoder.add({"a": [1, 2]})
        decoder.peek(["a"], torch.tensor([[3, 4]]))
        assert precisions == [MATMUL.fp32_precision] * 2
    assert asked == [(torch.float32, "cpu"), (torch.bfloat16, "cpu")]
    RaggedDecoder(build("qwen2"), **options)
    assert len(asked) == 2, "without a head there is nothing to ask"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_on_a_gpu():
    """TF32 inside and in a graph captured inside, full fp32 before and after."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 512).cuda()
    x = torch.randn(64, 512, device="cuda").bfloat16().float()
    truth = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())

    def error(out: torch.Tensor) -> float:
        return (out.double() - truth).abs().max().item()

    with torch.inference_mode():
        run = with_fast_products(layer, torch.bfloat16, "cuda")
        full, fast = error(layer(x)), error(run(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x)
        graph.replay()
        assert full < 1e-5
        assert 1e-5 < fast < 5e-3
        assert error(out) == pytest.approx(fast, rel=0.5)
        assert error(layer(x)) == full
