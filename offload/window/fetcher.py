"""Fetches bytes that somebody waits for, in the order in which they are asked for, into memory of their own.

Knows one piece of memory and what is on its way there; `readers` do the reading.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

from shoal.kernels.huge_pages import Arena

from .readers import Readers, Region
from .window import Line, Passage


class Fetcher:
    """Reads passages into `nbytes` of its own. After a failure it takes new memory, because reads under way may still
    write to the old."""

    def __init__(self, nbytes: int, *, whole: bool) -> None:
        self._line = Line()
        self.region = Region(self._line, Arena().take(nbytes), whole=whole)

    def fetch(self, readers: Readers, passages: Sequence[Passage]) -> None:
        """Reads passages. Raises OffloadError."""
        for _ in self.arriving(readers, passages):
            pass

    def arriving(self, readers: Readers, passages: Sequence[Passage]) -> Generator[Passage, None, None]:
        """Reads passages, and gives each as soon as it is here, in order. Raises OffloadError."""
        readers.change(partial(self._line.extend, passages))
        try:
            for passage in passages:
                readers.lease(self.region, partial(_same, passage))
                yield passage
        except BaseException:
            readers.change(partial(self._abandon, passages))
            raise

    def _abandon(self, passages: Sequence[Passage]) -> None:
        for passage in passages:
            self._line.leave(passage)
        if not all(passage.quiet for passage in passages):
            # Reads that are under way still write to the old memory.
            self.region.memory = Arena().take(len(self.region.memory))


def _same(passage: Passage) -> Passage:
    return passage
