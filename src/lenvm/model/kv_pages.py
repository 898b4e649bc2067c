"""KVPages: keys and values of many requests in one preallocated store, cut into pages.

Host-side bookkeeping only: which pages a request owns, how long it is, who shares what. Full pages
are shared by forks and counted once; a page that is still being filled has exactly one owner, so
nothing that somebody else reads is ever written. No model, no attention.

Shape legend: L layers, P pages, S tokens of a page, Hkv key heads, D head size, R requests.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class KVPages:
    """Room for `max_tokens` tokens of up to `max_requests` requests.

    `data` is [L, 2, P, S, Hkv, D]; page 0 belongs to nobody and may be written by padding. The
    `slot` of a token is page * S + offset. Every request of at most `max_length` tokens that fits
    `max_tokens` finds its pages: each may leave one page unfilled, and has one spare page for it.
    `with_table` keeps a page table on the device, for kernels.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        max_tokens: int,
        max_requests: int,
        max_length: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        with_table: bool = False,
    ) -> None:
        self.page_size, self.max_tokens, self.max_requests = page_size, max_tokens, max_requests
        self.num_pages = -(-max_tokens // page_size) + max_requests + 1
        shape = (num_layers, 2, self.num_pages, page_size, num_kv_heads, head_size)
        self.data = build_zeros(shape, dtype, device)
        self.max_columns = -(-min(max_length, max_tokens) // page_size) + 1
        self.num_tokens = 0
        """Tokens stored, a shared page counted once."""
        self._pages: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._free_pages = list(range(self.num_pages - 1, 0, -1))
        self._free_rows = list(range(max_requests - 1, -1, -1))
        self._owners = [0] * self.num_pages
        self._fill = [0] * self.num_pages
        self._changed: list[tuple[int, int, int]] = []
        self._table: Tensor | None = None
        if with_table:
            columns = (max_requests, self.max_columns)
            self._table = torch.zeros(columns, dtype=torch.int32, device=device)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def length(self, request_id: str) -> int:
        return self._lengths[request_id]

    def row(self, request_id: str) -> int:
        """The request's row in `table`."""
        return self._rows[request_id]

    def pages(self, request_id: str) -> Sequence[int]:
        return self._pages[request_id]

    def open(self, request_id: str) -> None:
        """A new, empty request."""
        self._rows[request_id] = self._free_rows.pop()
        self._lengths[request_id], self._pages[request_id] = 0, []

    def close(self, request_id: str) -> None:
        """Forget a request; pages that nobody else shares become free."""
        for page in self._pages.pop(request_id):
            self._owners[page] -= 1
            if not self._owners[page]:
                self.num_tokens -= self._fill[page]
                self._fill[page] = 0
                self._free_pages.append(page)
        del self._lengths[request_id]
        self._free_rows.append(self._rows.pop(request_id))

    def fork(self, parent_id: str, child_id: str) -> None:
        """A new request with the parent's tokens: full pages are shared, an unfilled one copied."""
        self.open(child_id)
        length = self._lengths[parent_id]
        full, rest = divmod(length, self.page_size)
        for page in self._pages[parent_id][:full]:
            self._owners[page] += 1
            self._take(child_id, page)
        self._lengths[child_id] = full * self.page_size
        if rest:
            self.reserve(child_id, rest)
            self.advance(child_id, rest)
            source, target = self._pages[parent_id][full], self._pages[child_id][full]
            self.data[:, :, target, :rest] = self.data[:, :, source, :rest]

    def copied_by_fork(self, request_id: str) -> int:
        """Tokens that a fork of the request would store again."""
        return self._lengths[request_id] % self.page_size

    def reserve(self, request_id: str, num_tokens: int) -> None:
        """Give the request the pages that its next `num_tokens` tokens need."""
        pages = self._pages[request_id]
        needed = -(-(self._lengths[request_id] + num_tokens) // self.page_size)
        new = [self._free_pages.pop() for _ in range(needed - len(pages))]
        if new and self.data.device.type == "cpu":  # a stale NaN there would survive weight 0
            self.data[:, :, new] = 0
        for page in new:
            self._owners[page] = 1
            self._take(request_id, page)

    def advance(self, request_id: str, num_tokens: int) -> None:
        """Count `num_tokens` more tokens, written into reserved pages, as the request's."""
        start = self._lengths[request_id]
        for column in range(start // self.page_size, -(-(start + num_tokens) // self.page_size)):
            begin = column * self.page_size
            filled = min(start + num_tokens - begin, self.page_size)
            self._fill[self._pages[request_id][column]] = filled
        self._lengths[request_id] = start + num_tokens
        self.num_tokens += num_tokens

    def slots(self, request_id: str, start: int, stop: int) -> list[int]:
        """Slots of positions start .. stop - 1, which must be reserved."""
        pages, size = self._pages[request_id], self.page_size
        return [pages[i // size] * size + i % size for i in range(start, stop)]

    def next_slot(self, request_id: str) -> int:
        """Slot of the next position, which must be reserved."""
        column, offset = divmod(self._lengths[request_id], self.page_size)
        return self._pages[request_id][column] * self.page_size + offset

    def gather_table(self, request_ids: Iterable[str], num_tokens: int) -> Tensor:
        """Pages of the first `num_tokens` positions of each request, 0 beyond its end: [R, C]."""
        columns = -(-num_tokens // self.page_size)
        rows = [self._pages[r][:columns] for r in request_ids]
        return torch.tensor([[*row, *[0] * (columns - len(row))] for row in rows])

    def table(self) -> Tensor:
        """Pages of every row on the device, [max_requests, C] int32, brought up to date without a
        host sync."""
        assert self._table is not None, "made without a table"
        if self._changed:
            device = self.data.device
            flat = {row * self.max_columns + column: p for row, column, p in self._changed}
            pin = device.type == "cuda"
            index = torch.tensor([*flat], pin_memory=pin).to(device, non_blocking=True)
            pages = torch.tensor([*flat.values()], dtype=torch.int32, pin_memory=pin)
            self._table.view(-1).index_copy_(0, index, pages.to(device, non_blocking=True))
            self._changed.clear()
        return self._table

    def _take(self, request_id: str, page: int) -> None:
        pages = self._pages[request_id]
        if self._table is not None:
            self._changed.append((self._rows[request_id], len(pages), page))
        pages.append(page)


def build_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU the system gives the memory only where it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    import numpy as np

    num_bytes = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
