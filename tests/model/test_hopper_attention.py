"""The Hopper attention kernel against plain fp32; and that it compiles without spills."""

import pytest
import torch

from lenvm.model.hopper import attention
from lenvm.model.hopper.runtime import SHARED_BYTES
from model.hopper import check_compiles, on_hopper

PAGE = 64
LENGTHS = [0, 1, 63, 64, 65, 1000, 8000, 1024, 200]
COUNTS = [3, 0, 20, 1, 8, 9, 5, 19, 10]


class Case:
    """Random requests; NaN wherever nothing may be read, and in `out`."""

    def __init__(self, lengths, counts, group, num_kv, head_size, single=False, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, device="cuda").bfloat16()

        self.lengths, self.counts, self.single = lengths, counts, single
        padding, num_rows = 3, len(lengths)
        first = [sum(counts[:i]) for i in range(num_rows + 1)]
        self.num_tokens, heads = first[-1], group * num_kv
        columns = max(lengths) // PAGE + 1
        num_pages = num_rows * columns + 2
        self.pages = torch.full((2, num_pages, PAGE, num_kv, head_size), torch.nan)
        self.pages = self.pages.bfloat16().cuda()
        order = torch.randperm(num_pages - 1, generator=generator, device="cuda") + 1
        self.table = torch.zeros(num_rows + 2, columns, dtype=torch.int32, device="cuda")
        self.rows = list(range(num_rows + 1, 1, -1))
        for r, length in enumerate(lengths):
            mine = order[r * columns : (r + 1) * columns]
            self.table[self.rows[r]] = mine
            flat = draw(2, columns * PAGE, num_kv, head_size)
            flat[:, length:] = torch.nan
            self.pages[:, mine] = flat.view(2, columns, PAGE, num_kv, head_size)
        self.q = draw(self.num_tokens + padding, heads, head_size) * 2
        self.own = draw(2, self.num_tokens + padding, num_kv, head_size)
        for x in (self.q, self.own[0], self.own[1]):
            x[self.num_tokens :] = torch.nan
        self.index = torch.arange(self.num_tokens, device="cuda")
        self.first = first
        if single:  # own keys and values lie in the store, behind the prefix
            assert max(counts) == 1
            slots = []
            for r, length in enumerate(lengths):
                if counts[r]:
                    page = int(self.table[self.rows[r], length // PAGE])
                    slots.append(page * PAGE + length % PAGE)
            self.index = torch.tensor(slots, device="cuda")
            flat = self.pages.flatten(1, 2)
            flat[:, self.index] = self.own[:, : self.num_tokens]

    def run(self, num_splits, window=None, only=None):
        """[N, Hq, D]; of one request alone where `only` names it."""
        rows, lengths, first, q, own, index = (
            self.rows, self.lengths, self.first, self.q, self.own, self.index,
        )  # fmt: skip
        if only is not None:
            rows, lengths = rows[only : only + 1], lengths[only : only + 1]
            q, own = q[first[only] :].clone(), own[:, first[only] :].clone()
            index = index[first[only] :]
            first = [0, first[only + 1] - first[only]]
        out = torch.full_like(q, torch.nan)
        ints = {"dtype": torch.int32, "device": "cuda"}
        own_k, own_v = self.pages.flatten(1, 2) if self.single else own
        num_kv, size = own.shape[2:]
        units = attention.plan_units(
            self.table,
            torch.tensor(rows, **ints),
            torch.tensor(lengths, **ints),
            torch.tensor(first, **ints),
            num_tokens=q.shape[0],
            num_heads=q.shape[1],
            num_kv=num_kv,
            head_size=size,
            max_candidates=max(1, *self.counts),
            num_splits=num_splits,
        )
        attention.candidate_attention(
            q,
            own_k,
            own_v,
            index,
            *self.pages,
            units,
            out,
            scale=size**-0.5,
            window=window,
            own_is_token=not self.single,
        )
        torch.cuda.synchronize()
        assert out[first[-1] :].isnan().all(), "padding was written"
        return out[: first[-1]]

    def expect(self, window=None):
        out = torch.empty(self.q[: self.num_tokens].shape, device="cuda")
        num_kv, size = self.own.shape[2:]
        for r, length in enumerate(self.lengths):
            begin = 0 if window is None else max(length - window + 1, 0)
            pages = self.pages[:, self.table[self.rows[r]].long()].flatten(1, 2)
            prefix = pages[:, begin : max(length, begin)].float()
            for n in range(self.first[r], self.first[r + 1]):
                k, v = torch.cat([self.own[:, n : n + 1].float(), prefix], 1)
                q = self.q[n].float().view(num_kv, -1, size)
                scores = torch.einsum("hgd,thd->hgt", q, k) * size**-0.5
                out[n] = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v).flatten(0, 1)
        return out


def compare(out, expected):
    assert not out.isnan().any()
    error = out.float() - expected
    assert error.norm() / expected.norm() < 5e-3
    assert (error.norm(dim=-1) / expected.norm(dim=-1)).max() < 3e-2


def mark(test):
    for one in on_hopper:
        test = one(test)
    return test


@mark
@pytest.mark.parametrize(
    ("group", "head_size"), [(7, 64), (6, 128), (1, 64), (2, 64), (8, 64), (8, 128), (1, 128)]
)
@pytest.mark.parametrize("num_splits", attention.SPLITS)
def test_ragged_requests(group, head_size, num_splits):
    case = Case(LENGTHS, COUNTS, group, 2, head_size)
    out = case.run(num_splits)
    compare(out, case.expect())
    assert torch.equal(out, case.run(num_splits))
    for r in (0, 2, 3, 5, 6):
        assert torch.equal(out[case.first[r] : case.first[r + 1]], case.run(num_splits, only=r))


@mark
@pytest.mark.parametrize(("group", "head_size"), [(7, 64), (6, 128)])
@pytest.mark.parametrize("window", [1, 2, 60, 64, 65, 500])
@pytest.mark.parametrize("num_splits", [1, 2, 8])
def test_windows(group, head_size, window, num_splits):
    case = Case(LENGTHS, COUNTS, group, 2, head_size, seed=1)
    compare(case.run(num_splits, window=window), case.expect(window))


@mark
@pytest.mark.parametrize("num_splits", attention.SPLITS)
@pytest.mark.parametrize(("group", "head_size"), [(6, 128), (7, 64)])
def test_parts_of_a_prefix_that_ends_amid_a_page(group, head_size, num_splits):
    """As the scorers of 1.5B and 0.5B have it, from 1 to 18 candidates."""
    case = Case([1000] * 64, [r % 18 + 1 for r in range(64)], group, 2, head_size, seed=5)
    out = case.run(num_splits)
    compare(out, case.expect())
    assert torch.equal(out, case.run(num_splits))


@mark
@pytest.mark.parametrize("head_size", [64, 128])
def test_own_keys_in_the_store(head_size):
    lengths = [0, 1, 63, 64, 65, 1000, 130]
    case = Case(lengths, [1, 1, 1, 0, 1, 1, 1], 7, 2, head_size, single=True)
    compare(case.run(2), case.expect())


@mark
@pytest.mark.parametrize(("group", "head_size"), [(7, 64), (6, 128)])
@pytest.mark.parametrize("num_rows", [64, 67, 200, 256, 257])
@pytest.mark.parametrize("num_splits", [1, 2, 8])
def test_many_requests(group, head_size, num_rows, num_splits):
    """Ranked by their number of candidates (up to 256 requests), with equals and empty ones."""
    counts = [(0, 1, 5, 9, 9, 15, 18, 20)[(r * 5) % 8] for r in range(num_rows)]
    lengths = [(130, 64, 0, 300, 1)[r % 5] for r in range(num_rows)]
    case = Case(lengths, counts, group, 2, head_size, seed=3)
    out = case.run(num_splits)
    compare(out, case.expect())
    for r in range(0, num_rows, 17):
        if counts[r]:
            assert torch.equal(out[case.first[r] : case.first[r + 1]], case.run(num_splits, only=r))


@mark
@pytest.mark.parametrize(
    ("num_rows", "num_kv"), [(1, 1), (2, 1), (3, 1), (67, 3), (133, 1), (257, 1), (300, 3)]
)
@pytest.mark.parametrize("num_splits", attention.SPLITS)
def test_two_units_of_a_block(num_rows, num_kv, num_splits):
    """Odd numbers of units, of up to three tiles, and none in either half of a block."""
    counts = [(40, 0, 3, 18, 0, 19, 1)[r % 7] for r in range(num_rows)]
    lengths = [(130, 300, 64, 0, 1000)[r % 5] for r in range(num_rows)]
    case = Case(lengths, counts, 7, num_kv, 64, seed=6)
    out = case.run(num_splits)
    compare(out, case.expect())
    assert torch.equal(out, case.run(num_splits))


@mark
@pytest.mark.parametrize(("group", "head_size"), [(7, 64), (6, 128)])
@pytest.mark.parametrize("window", [None, 700])
def test_scores_that_grow_along_the_prefix(group, head_size, window):
    """The reference is left behind by little, by much, and often; at last in a page's part."""
    case = Case([64 * 16, 64 * 16 - 20] * 2, [15, 7, 11, 18], group, 2, head_size, seed=4)
    for r in range(4):
        for i, page in enumerate(case.table[case.rows[r]][:16].tolist()):
            case.pages[0, page] *= (0.1, 0.5, 1, 1.5, 2, 2.5, 8, 30)[i // 2]
    for num_splits in (1, 2, 8):
        out = case.run(num_splits, window=window)
        compare(out, case.expect(window))
        assert torch.equal(out, case.run(num_splits, window=window))


@mark
def test_nobody_has_a_candidate():
    assert Case([5, 70], [0, 0], 7, 2, 64).run(2).shape[0] == 0


@pytest.mark.parametrize("head_size", [64, 128])
def test_shared_memory_of_a_block(head_size):
    assert attention.shared_bytes(head_size) <= SHARED_BYTES


@pytest.mark.parametrize(
    ("group", "head_size", "num_splits"),
    [(7, 64, 1), (7, 64, 2), (7, 64, 8), (6, 128, 1), (6, 128, 2)],
)
@pytest.mark.parametrize("has_window", [False, True])
def test_it_compiles_without_spills(group, head_size, num_splits, has_window):
    definitions = attention.definitions(
        head_size, group, 2, num_splits=num_splits, has_window=has_window
    )
    check_compiles("attention.cu", definitions, attention.PRODUCTS)


@pytest.mark.parametrize(("group", "num_kv"), [(7, 2), (6, 2), (1, 3)])
def test_the_plan_compiles(group, num_kv):
    check_compiles("plan.cu", attention.plan_definitions(group, num_kv), ())
