"""Which pages of a KV pool are free. Pure bookkeeping: no tensors, no tokens."""

from __future__ import annotations


class PageTable:
    """Which pages are free. Pure bookkeeping; prefers runs of consecutive pages, which read without a copy."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = [True] * pages
        self.free_pages = pages

    def take(self, count: int) -> list[int] | None:
        """`count` pages, consecutive when there is such a run (lowest first), else any; None when too few are free."""
        if count > self.free_pages:
            return None
        taken = self._run(count) or [page for page, free in enumerate(self._free) if free][:count]
        for page in taken:
            self._free[page] = False
        self.free_pages -= count
        return taken

    def give_back(self, pages: list[int]) -> None:
        for page in pages:
            assert not self._free[page], page
            self._free[page] = True
        self.free_pages += len(pages)

    def _run(self, count: int) -> list[int] | None:
        length = 0
        for page, free in enumerate(self._free):
            length = length + 1 if free else 0
            if length == count:
                return list(range(page - count + 1, page + 1))
        return None
