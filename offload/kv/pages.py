"""Which pages of a KV pool are free. Pure bookkeeping: no arrays, no tokens.

Knows page numbers only. `prefix_cache` knows who holds a page and what is in it.
"""

from __future__ import annotations

from heapq import heappop, heappush


class PageTable:
    """Hands out the lowest free pages first, so that the pool touches no more memory than was ever in use at once."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages))
        self._taken: set[int] = set()

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Takes `count` pages. Returns None and changes nothing when too few are free."""
        if count > len(self._free):
            return None
        taken = [heappop(self._free) for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give_back(self, pages: list[int]) -> None:
        for page in pages:
            assert page in self._taken, page
            self._taken.remove(page)
            heappush(self._free, page)
