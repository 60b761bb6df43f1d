"""Which pages of a KV pool are free. Pure bookkeeping: no arrays, no tokens.

Knows page numbers only. Whose a page is, and what it holds, is `offload.prefix`'s business.
"""

from __future__ import annotations

from heapq import heappop, heappush


class PageTable:
    """The free pages; lowest first, so that no more memory is touched than was ever in use at once."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages))
        self._taken = [False] * pages

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages; None, and nothing changes, when too few are free."""
        if count > len(self._free):
            return None
        taken = [heappop(self._free) for _ in range(count)]
        for page in taken:
            self._taken[page] = True
        return taken

    def give_back(self, pages: list[int]) -> None:
        for page in pages:
            assert self._taken[page], page
            self._taken[page] = False
            heappush(self._free, page)
