"""A layer's kernels of `model/hopper/` one after the other, and when each of them does what.

    python benchmarks/hopper_layer.py            # H100 or H200

24 layers with weights and pages of their own in one CUDA graph, of Qwen2.5-0.5B's shape, 64
requests of 8 candidates and 1,024 tokens; programmatic dependent launch as in a step.

1. Every kernel of the first layer against fp32.
2. Microseconds a layer: all; without one kernel; one kernel alone.
3. The last layer's timeline: marks that are written into the sources note the time (and the
   cycles since the mark before) in one thread of each block: least, median, most.

It gave `experiments.hopper_queries_as_columns`, `hopper_many_queries_as_rows`,
`hopper_one_attention`, `hopper_pages_by_a_warp` and `under_load` in results/scorer_h200.json, with
changes to the sources that are not kept; `layer` there without any.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from lenvm.model import kernels  # noqa: E402
from lenvm.model.hopper import products, runtime  # noqa: E402
from lenvm.model.kernel_choices import Choices, LayerShape, choose  # noqa: E402
from lenvm.model.products import Rows  # noqa: E402
from scorer_kernels import Places, time_us  # noqa: E402

NUM_LAYERS, REQUESTS, MEAN, PREFIX, EPS = 24, 64, 8, 1024, 1e-6
SHAPE = LayerShape(hidden=896, inner=4864, num_heads=14, num_kv_heads=2, head_size=64)
NAMES = ("qkv", "attention", "out", "gate_up", "down")
BLOCKS = 300
"""Most blocks whose marks are kept."""


class Layers:
    """The chain of a step's kernels, over the tuner's inputs."""

    def __init__(self, choices: Choices, device: str = "cuda") -> None:
        self.choices, s = choices, SHAPE
        self.places = p = Places("0.5b", REQUESTS, MEAN, PREFIX, NUM_LAYERS, device)
        heads = s.num_heads + 2 * s.num_kv_heads
        self.qkv, self.out = p.weights(heads * s.head_size, s.hidden), p.weights(s.hidden, s.hidden)
        self.gate_up, self.down = p.weights(2 * s.inner, s.hidden), p.weights(s.hidden, s.inner)
        self.bias = torch.randn(heads * s.head_size, **p.kind)
        for turn in (p.cos, p.sin):  # halves are equal
            turn[:, s.head_size // 2 :] = turn[:, : s.head_size // 2]
        self.before = p.residual.clone()
        self.after: dict[str, Rows] = {}
        for name in ("out", "down"):
            squares = torch.zeros(s.hidden // choices.tiles[name].BN, p.tokens, device=device)
            self.after[name] = Rows(torch.empty_like(p.y), squares)

    def run(self, names: tuple[str, ...] = NAMES, num_layers: int = NUM_LAYERS) -> None:
        p, tiles = self.places, self.choices.tiles
        attend = p._attend_on_hopper(self.choices.attention)
        p.residual.copy_(self.before)
        rows = Rows(self.after["down"].x)
        kernels.add_norm(None, p.residual, p.norm, EPS, rows.x)
        for i in range(num_layers):
            if "qkv" in names:
                products.project_qkv(
                    rows, self.qkv[i], self.bias, p.cos, p.sin, EPS, p.q, p.stash[i, 0],
                    p.stash[i, 1], p.places, tile=tiles["qkv"],
                )  # fmt: skip
            if "attention" in names:
                attend(i)
            about = p.residual, p.norm
            if "out" in names:
                x, rows = p.attended.flatten(1), self.after["out"]
                products.project_out(x, self.out[i], *about, rows, tile=tiles["out"])
            if "gate_up" in names:
                rows, tile = self.after["out"], tiles["gate_up"]
                products.gate_and_up(rows, self.gate_up[i], EPS, p.activated, tile=tile)
            if "down" in names:
                x, rows = p.activated, self.after["down"]
                products.project_out(x, self.down[i], *about, rows, tile=tiles["down"])
            rows = self.after["down"]

    def time_us(self, names: tuple[str, ...] = NAMES) -> float:
        """Microseconds a layer."""
        return time_us(lambda _: self.run(names), 1) / NUM_LAYERS

    def errors(self) -> dict[str, float]:
        """Of each kernel of the first layer, given what the kernels before it gave."""
        self.run(num_layers=1)
        p, norm = self.places, self.places.norm.float()
        n, num_q, num_kv, size = p.tokens, SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_size

        def normalised(x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm

        heads = F.linear(normalised(self.before), self.qkv[0].float(), self.bias.float())
        heads = heads.view(n, -1, size)
        a, b = heads[:, : num_q + num_kv].chunk(2, -1)
        turned = heads[:, : num_q + num_kv] * p.cos.float()[:, None]
        turned += torch.cat([-b, a], -1) * p.sin.float()[:, None]
        attended = torch.empty_like(p.q, dtype=torch.float32)
        first = p.first.tolist()
        for r in range(REQUESTS):
            kv = p.data[0][:, p.table[r].long()].flatten(1, 2)[:, :PREFIX].float()
            for token in range(first[r], first[r + 1]):
                k, v = torch.cat([p.stash[0][:, token : token + 1].float(), kv], 1)
                q = p.q[token].float().view(num_kv, -1, size)
                weights = (torch.einsum("hgd,thd->hgt", q, k) * size**-0.5).softmax(-1)
                attended[token] = torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1)
        middle = self.before + F.linear(p.attended.float().flatten(1), self.out[0].float())
        gate, up = F.linear(normalised(middle), self.gate_up[0].float()).chunk(2, 1)
        end = middle + F.linear(p.activated.float(), self.down[0].float())
        pairs = {
            "q": (p.q, turned[:, :num_q]),
            "k": (p.stash[0, 0], turned[:, num_q:]),
            "v": (p.stash[0, 1], heads[:, num_q + num_kv :]),
            "attention": (p.attended, attended),
            "out": (self.after["out"].x, middle * norm),
            "gate_up": (p.activated, F.silu(gate) * up),
            "down": (p.residual, end),
        }
        return {
            name: float((got.double() - right.double()).norm() / right.double().norm())
            for name, (got, right) in pairs.items()
        }


# -- marks -----------------------------------------------------------------------------------------

MARK = f"""
__device__ u64 marks[{BLOCKS} * 32];
#define MARK(i) if (threadIdx.x == 0 && blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * \\
    blockIdx.z) < {BLOCKS}) {{ u64 now; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); \\
    u64* to = marks + 32 * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)) + \\
    2 * (i); to[0] = now; to[1] = clock64(); }}
extern "C" __global__ void get_marks(u64* to) {{
    for (int i = threadIdx.x; i < {BLOCKS} * 32; i += blockDim.x) to[i] = marks[i];
}}
"""
MARKS = {
    "products.cu": {
        "start": ("    const u32 tiles = (shared", "{}    const u32 tiles = (shared"),
        "waited": (
            "        // what the epilogue needs is read before",
            "{}        // what the epilogue needs is read before",
        ),
        "first tile": (
            "            const u32 x = described_x",
            "            if (block == 0) {{ {} }}\n            const u32 x = described_x",
        ),
        "multiplied": ("        settle(acc);\n", "        settle(acc);\n{}"),
        "may send": ("        const u32 to = tile_row", "{}        const u32 to = tile_row"),
        "exchanged": (
            "if (SPLITS > 1) barrier_wait(exchanged, 0);",
            "if (SPLITS > 1) barrier_wait(exchanged, 0);\n{}",
        ),
    },
    "attention.cu": {
        "start": (
            "    launch_next();\n    const int* const plan",
            "{}    launch_next();\n    const int* const plan",
        ),
        "planned": ("    const auto find_own", "{}    const auto find_own"),
        "waited": (
            "    {\n        uint4 query[QUERY_STEPS]",
            "{}    {{\n        uint4 query[QUERY_STEPS]",
        ),
        "queries": (
            "    {\n        const int row = step",
            "{}    {{\n        const int row = step",
        ),
        "first scores": (
            "        bool is_first = true;",
            "{}        bool is_first = true;",
        ),
        "second page": (
            "            is_first = false;",
            "            if (left - begin * TURNS * PAGE - seen == STRIDE) {{ {} }}\n"
            "            is_first = false;",
        ),
        "fourth page": (
            "            u32 packed[16];",
            "            if (left - begin * TURNS * PAGE - seen == 3 * STRIDE) {{ {} }}\n"
            "            u32 packed[16];",
        ),
        "pages seen": ("        meet(pair_id, HALF);", "{}        meet(pair_id, HALF);"),
        "met": ("    // 4 columns of either half", "{}    // 4 columns of either half"),
        "end": (
            "    if (SPLITS > 1) {  // the others may",
            "{}    if (SPLITS > 1) {{  // the others may",
        ),
    },
}
"""What each mark is called; where it stands in the source: text, and text with a place for it."""


def put_marks(file: str, source: str) -> str:
    marks, first = (
        MARKS[file],
        "constexpr int CONSUMERS" if file == "products.cu" else "constexpr int PAGE",
    )
    for number, (old, new) in enumerate(marks.values()):
        if old not in source:
            raise SystemExit(f"{file} does not have {old!r}: see MARKS")
        source = source.replace(old, new.format(f"MARK({number});\n"))
    if file == "products.cu":
        end = source.rindex("    }\n}")
        source = source[:end] + f"        MARK({len(marks)});\n" + source[end:]
    return source.replace(first, f"{MARK}{first}", 1)


class Marked:
    """Kernels compiled in here note their marks."""

    def __init__(self) -> None:
        self.modules: list[tuple[str, dict[str, int], Any]] = []

    def __enter__(self) -> "Marked":
        from cuda.bindings import driver

        self._build, self._compile = runtime.build_source, runtime.compile_source
        self._driver, self._load = driver, driver.cuModuleLoadData
        about: list[tuple[str, dict[str, int]]] = []

        def build(file: str, definitions: Any, products: Any) -> str:
            source = self._build(file, definitions, products)
            return put_marks(file, source) if file in MARKS else source

        def compile_source(file: str, definitions: Any, products: Any) -> bytes:
            about.append((file, dict(definitions)))
            return self._compile(file, definitions, products)

        def load(image: bytes) -> Any:
            result = self._load(image)
            self.modules.append((*about[-1], result[1]))
            return result

        runtime.build_source, runtime.compile_source = build, compile_source
        driver.cuModuleLoadData = load
        runtime._get_kernel.cache_clear()
        return self

    def __exit__(self, *_: object) -> None:
        runtime.build_source, runtime.compile_source = self._build, self._compile
        self._driver.cuModuleLoadData = self._load
        runtime._get_kernel.cache_clear()

    def show(self) -> None:
        """The last layer's, kernel by kernel, in nanoseconds from its beginning."""
        found = []
        for file, definitions, module in self.modules:
            if file not in MARKS:
                continue
            if definitions.get("PARTS") == 0 and definitions.get("EPILOGUE") == 0:
                continue  # the first layer's q/k/v
            kept = torch.zeros(BLOCKS * 32, dtype=torch.int64, device="cuda")
            function = runtime._check(self._driver.cuModuleGetFunction(module, b"get_marks"))
            runtime.Kernel(function, 0, 256, (1, 1, 1)).launch((1, 1, 1), kept, pdl=False)
            marks = kept.view(BLOCKS, 16, 2).cpu()
            names = [*MARKS[file], "end"][: len(MARKS[file]) if file == "attention.cu" else None]
            kernel = file.removesuffix(".cu")
            if file == "products.cu":
                is_down = definitions["K"] == SHAPE.inner
                kernel = ("qkv", "down" if is_down else "out", "gate_up")[definitions["EPILOGUE"]]
            found.append((kernel, names, marks[marks[:, 0, 0] > 0]))
        found.sort(key=lambda item: int(item[2][:, 0, 0].min()))
        begin = int(found[0][2][:, 0, 0].median())
        for kernel, names, marks in found:
            print(f"{kernel} ({len(marks)} blocks), ns: least, median, most; cycles: median")
            last = 0
            for number, name in enumerate(names):
                at = marks[:, number, 0]
                if int(at.max()) == 0:
                    continue  # no such mark in this kind
                at = at[at > 0] - begin
                cycles = (marks[:, number, 1] - marks[:, last, 1]).float().median()
                print(
                    f"  {name:13} {int(at.min()):8d} {int(at.float().median()):8d}"
                    f" {int(at.max()):8d}   {int(cycles):7d}"
                )
                last = number


@torch.inference_mode()
def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this measures kernels of Hopper GPUs; there is no CUDA device here")
    torch.manual_seed(0)
    choices = choose(torch.device("cuda"), SHAPE, REQUESTS * MEAN)
    if not (choices.attention.hopper and all(t.hopper for t in choices.tiles.values())):
        raise SystemExit(f"no kernels of hopper/ for {torch.cuda.get_device_name()}: {choices}")
    print(torch.cuda.get_device_name(), choices)
    layers = Layers(choices)
    print({name: f"{error:.2e}" for name, error in layers.errors().items()}, flush=True)
    print(f"{layers.time_us():7.2f} us a layer")
    for name in NAMES:
        without = layers.time_us(tuple(n for n in NAMES if n != name))
        print(f"{without:7.2f} us without {name}, {layers.time_us((name,)):.2f} alone", flush=True)
    with Marked() as marked:
        us = layers.time_us()
        print(f"timeline, {us:.2f} us a layer with marks")
        marked.show()


if __name__ == "__main__":
    main()
