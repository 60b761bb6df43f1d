"""Bytes that are wanted at once, read into a piece of memory of their own in the order they are asked for.

Knows one piece of memory and what is on its way there; reading is `readers`' work.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

from shoal.kernels.huge_pages import mapped

from .readers import Readers, Region
from .window import Line, Passage


class Fetcher:
    """Reads what is wanted at once into `nbytes` of its own. After a failure it takes other memory, as reads under way
    may still write to this."""

    def __init__(self, nbytes: int, *, whole: bool) -> None:
        self._line = Line()
        self.region = Region(self._line, mapped(nbytes)[:nbytes], whole=whole)

    def fetch(self, readers: Readers, passages: Sequence[Passage]) -> None:
        """Reads passages. Raises OffloadError."""
        for _ in self.arriving(readers, passages):
            pass

    def arriving(self, readers: Readers, passages: Sequence[Passage]) -> Generator[Passage, None, None]:
        """Reads passages and gives each as soon as it is here, in their order. Raises OffloadError."""
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
            # Reads that are under way still write to this memory.
            nbytes = len(self.region.memory)
            self.region.memory = mapped(nbytes)[:nbytes]


def _same(passage: Passage) -> Passage:
    return passage
