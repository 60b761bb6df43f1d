"""The blocks of a pack that stay in memory. They are read once, into one piece of memory.

They lie one behind the other there, so that the slices of a tied head are the embedding in memory, too, and the slices
of any head can be had as one block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from shoal.offload.block_store import Arriving
from shoal.offload.errors import StoreError
from shoal.offload.pack.pack import Pack
from shoal.partition.memory_layout import LOADING_BYTES
from shoal.partition.spec import BlockId

from .fetcher import Fetcher
from .readers import Readers
from .window import Extent, Passage

EMBED, HEAD = BlockId("embed"), BlockId("head")


class Pinned:
    """Memory for some blocks of a pack, and how they come there."""

    def __init__(self, pack: Pack, blocks: Sequence[BlockId]) -> None:
        """Raises StoreError when the pack lacks one of `blocks`."""
        self._pack = pack
        tables = {block for block in pack.blocks if block.kind in ("embed", "head")}
        slices = [block for block in pack.blocks if block.kind == "head"]
        self._whole_head = bool(slices) and HEAD in blocks
        if self._whole_head:
            blocks = [it for block in blocks for it in (slices if block == HEAD else (block,))]
        self._embed_is_head = pack.tied and tables <= set(blocks)
        self._passages: list[Passage] = []
        whole = 0
        for block, offset, nbytes in located(pack, blocks):
            if block != EMBED or not self._embed_is_head:
                self._passages.append(Passage(block, offset, whole, nbytes))
                whole += nbytes
        self._fetcher = Fetcher(whole, whole=True)
        self.region = self._fetcher.region

    def arriving(self, readers: Readers) -> Arriving:
        """Reads the blocks and gives each as soon as it is here. Raises OffloadError."""
        for passage in self._fetcher.arriving(readers, self._passages):
            if passage.block.kind != "head" or not self._whole_head:
                yield passage.block, self.region.weights(self._pack, passage)
        if self._whole_head:
            places = [passage for passage in self._passages if passage.block.kind == "head"]
            end = places[-1].position + places[-1].nbytes
            yield HEAD, self._pack.whole_head(self.region.memory[places[0].position : end])
        if self._embed_is_head:
            start = next(passage.position for passage in self._passages if passage.block.kind == "head")
            whole = self.region.memory[start : start + self._pack.blocks[EMBED].nbytes]
            yield EMBED, self._pack.weights(EMBED, whole)


class PackReader:
    """A `BlockReader` of a pack. Its reader threads end when the blocks have been read. Blocks that go `away` from this
    memory at once are read a few at a time, behind the others."""

    def __init__(self, pack: Pack, away: Collection[BlockId] = ()) -> None:
        self._pack = pack
        self._away = away

    def reserve(self, nbytes: int) -> None:
        """See `BlockReader`: they lie in one piece anyway."""

    def read_blocks(self, blocks: Sequence[BlockId]) -> Arriving:
        """See `BlockReader`. Raises OffloadError."""
        yield from self._together([block for block in blocks if block not in self._away])
        some: list[BlockId] = []
        for block in (block for block in blocks if block in self._away):
            alone = block.kind == "head" or (some and some[-1].kind == "head")
            if alone or self._nbytes([*some, block]) > LOADING_BYTES:
                yield from self._together(some)
                some = []
            some.append(block)
        yield from self._together(some)

    def _nbytes(self, blocks: Sequence[BlockId]) -> int:
        return sum(item.nbytes for block in blocks if (item := self._pack.blocks.get(block)) is not None)

    def _together(self, blocks: Sequence[BlockId]) -> Arriving:
        """All of them lie in one piece of memory."""
        if not blocks:
            return
        pinned = Pinned(self._pack, blocks)
        readers = Readers(self._pack, [pinned.region])
        try:
            yield from pinned.arriving(readers)
        finally:
            readers.close()


def located(pack: Pack, blocks: Iterable[BlockId]) -> list[Extent]:
    """Where in the pack the blocks lie. Raises StoreError when it lacks one of them."""
    try:
        items = [pack.blocks[block] for block in blocks]
    except KeyError as error:
        raise StoreError(f"{pack.path}: the pack has no block {error.args[0]}") from error
    return [Extent(item.block, item.offset, item.nbytes) for item in items]
