"""Which pages of rank 0 the other ranks have copies of, and where: they may have fewer pages than it (pure)."""

from __future__ import annotations

from collections.abc import Collection


class CopiedPages:
    """`pages`: how many the others have, the same numbers on each."""

    def __init__(self, pages: int) -> None:
        self.places: dict[
            int, int
        ] = {}  # page of rank 0 → page of the others; the one used longest ago first
        self._free = set(range(pages))
        self._most = pages

    def place(self, pages: Collection[int]) -> bool:
        """Have copies of these pages; others lose their places for it, the one used longest ago first. False if there
        is no room for so many: then all is as it was."""
        if len(pages) > self._most:
            return False
        for page in pages:  # none of them is to lose its place
            if (known := self.places.pop(page, None)) is not None:
                self.places[page] = known
        for page in pages:
            if page not in self.places:
                self.places[page] = self._room(page)
        return True

    def _room(self, page: int) -> int:
        """A page of its own number, if that can be: so all numbers are alike where all ranks have as many pages."""
        if not self._free:
            return self.places.pop(next(iter(self.places)))
        place = page if page in self._free else max(self._free)
        self._free.remove(place)
        return place
