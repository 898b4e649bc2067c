"""KVPages: keys and values of many requests in one preallocated store, cut into pages.

Host-side bookkeeping only: which pages a request owns, how long it is, who shares what. Full pages
are shared by forks and counted once; a page that is still being filled has exactly one owner, so
nothing that somebody else reads is ever written. No model, no attention.

Shape legend: L layers, P pages, S tokens of a page, Hkv key heads, D head size, R requests.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenvm.model.device import upload

Array = NDArray[np.int64]
"""Numbers of rows, on the host."""


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
        self._rows: dict[str, int] = {}
        # of each row: its tokens, its pages (0 beyond them), how many pages
        self._lengths = np.zeros(max_requests, np.int64)
        self._pages = np.zeros((max_requests, self.max_columns), np.int64)
        self._held = np.zeros(max_requests, np.int64)
        self._free_pages = list(range(self.num_pages - 1, 0, -1))
        self._free_rows = list(range(max_requests - 1, -1, -1))
        self._owners = [0] * self.num_pages
        self._changed: list[tuple[int, int, int]] = []
        self._table: Tensor | None = None
        if with_table:
            columns = (max_requests, self.max_columns)
            self._table = torch.zeros(columns, dtype=torch.int32, device=device)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def length(self, request_id: str) -> int:
        return int(self._lengths[self._rows[request_id]])

    def row(self, request_id: str) -> int:
        """The request's row in `table`."""
        return self._rows[request_id]

    def open(self, request_id: str) -> None:
        """A new, empty request."""
        self._rows[request_id] = self._free_rows.pop()

    def close(self, request_id: str) -> None:
        """Forget a request; pages that nobody else shares become free."""
        row = self._rows.pop(request_id)
        length, pages = int(self._lengths[row]), self._pages[row, : self._held[row]]
        for column, page in enumerate(pages.tolist()):
            self._owners[page] -= 1
            if not self._owners[page]:
                self.num_tokens -= min(max(length - column * self.page_size, 0), self.page_size)
                self._free_pages.append(page)
        pages[:] = self._lengths[row] = self._held[row] = 0
        self._free_rows.append(row)

    def fork(self, parent_id: str, child_id: str) -> None:
        """A new request with the parent's tokens: full pages are shared, an unfilled one copied."""
        self.open(child_id)
        parent, child = self._rows[parent_id], self._rows[child_id]
        full, rest = divmod(int(self._lengths[parent]), self.page_size)
        for page in self._pages[parent, :full].tolist():
            self._owners[page] += 1
            self._take(child, page)
        self._lengths[child] = full * self.page_size
        if rest:
            self.reserve(child_id, rest)
            self.advance(child_id, rest)
            source, target = self._pages[[parent, child], full].tolist()
            self.data[:, :, target, :rest] = self.data[:, :, source, :rest]

    def copied_by_fork(self, request_id: str) -> int:
        """Tokens that a fork of the request would store again."""
        return self.length(request_id) % self.page_size

    def reserve(self, request_id: str, num_tokens: int) -> None:
        """Give the request the pages that its next `num_tokens` tokens need."""
        row = self._rows[request_id]
        needed = -(-(int(self._lengths[row]) + num_tokens) // self.page_size)
        new = [self._free_pages.pop() for _ in range(needed - int(self._held[row]))]
        if new and self.data.device.type == "cpu":  # a stale NaN there would survive weight 0
            self.data[:, :, new] = 0
        for page in new:
            self._owners[page] = 1
            self._take(row, page)

    def advance(self, request_id: str, num_tokens: int) -> None:
        """Count `num_tokens` more tokens, written into reserved pages, as the request's."""
        self._lengths[self._rows[request_id]] += num_tokens
        self.num_tokens += num_tokens

    def slots(self, request_id: str, start: int, stop: int) -> list[int]:
        """Slots of positions start .. stop - 1, which must be reserved."""
        pages, size = self._pages[self._rows[request_id]], self.page_size
        at = np.arange(start, stop)
        found: list[int] = (pages[at // size] * size + at % size).tolist()
        return found

    # -- one more token of many requests, by their rows: what every step asks for -----------------

    def rows(self, request_ids: Iterable[str]) -> Array:
        """Their rows in `table`, each named once; KeyError for an unknown one."""
        return np.array([self._rows[r] for r in request_ids], np.int64)

    def lengths(self, rows: Array) -> Array:
        return self._lengths[rows]

    def reserve_next(self, request_ids: Sequence[str], rows: Array) -> None:
        """Give each the page that its next token needs."""
        is_full = self._lengths[rows] == self._held[rows] * self.page_size
        for index in is_full.nonzero()[0].tolist():
            self.reserve(request_ids[index], 1)

    def next_slots(self, rows: Array) -> Array:
        """Slots of the next positions, which must be reserved."""
        column, offset = np.divmod(self._lengths[rows], self.page_size)
        slots: Array = self._pages[rows, column] * self.page_size + offset
        return slots

    def advance_next(self, rows: Array) -> None:
        """Count one more token of each, written into a reserved page."""
        self._lengths[rows] += 1
        self.num_tokens += len(rows)

    def gather_table(self, rows: Array, num_tokens: int) -> Tensor:
        """Pages of the first `num_tokens` positions of each row, 0 beyond its end: [R, C]."""
        columns = -(-num_tokens // self.page_size)
        return torch.from_numpy(self._pages[rows, :columns])

    def table(self) -> Tensor:
        """Pages of every row on the device, [max_requests, C] int32, brought up to date without a
        host sync."""
        assert self._table is not None, "made without a table"
        if self._changed:
            device = self.data.device
            flat = {row * self.max_columns + column: p for row, column, p in self._changed}
            index, pages = upload([[*flat], [*flat.values()]], torch.long, device)
            self._table.view(-1).index_copy_(0, index, pages.int())
            self._changed.clear()
        return self._table

    def _take(self, row: int, page: int) -> None:
        column = int(self._held[row])
        if self._table is not None:
            self._changed.append((row, column, page))
        self._pages[row, column] = page
        self._held[row] += 1


def build_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU the system gives the memory only where it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
