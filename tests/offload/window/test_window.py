"""The window's policy, without threads: the test ends the reads."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.offload.window.window import Extent, Line, Passage, Read, Window
from shoal.partition.spec import BlockId

PAGE = 4096


def extents(sizes: list[int]) -> list[Extent]:
    return [Extent(BlockId("ffn", i), 1_000_000 * PAGE * i, PAGE * size) for i, size in enumerate(sizes)]


class Disk:
    """Memory in pages, and reads that end when the test says so. A page of memory holds (block, page of the block)."""

    def __init__(self, window: Window, pages: int) -> None:
        self.window = window
        self.memory: list[tuple[BlockId, int] | None] = [None] * pages
        self.under_way: list[Read] = []

    def begin(self, most_pages: int) -> bool:
        idle = self.window.idle
        chunk = self.window.next_read(most_pages * PAGE)
        if chunk is not None:
            assert not idle, "nobody would have woken a reader"
            assert 0 < chunk.nbytes <= most_pages * PAGE
            self.under_way.append(chunk)
        return chunk is not None

    def end(self, which: int, error: Exception | None = None) -> None:
        chunk = self.under_way.pop(which % len(self.under_way))
        passage = chunk.passage
        for page in range(chunk.start // PAGE, (chunk.start + chunk.nbytes) // PAGE):
            self.memory[passage.position // PAGE + page] = passage.block, page
        passage.landed += chunk.nbytes
        passage.error = passage.error or error
        self.window.ended(passage)

    def until_here(self, block: BlockId, reads: int, pages: int, source: random.Random) -> Passage:
        for _ in range(10_000):
            passage = self.window.want(block)
            if passage.here or passage.error:
                return passage
            while len(self.under_way) < reads and self.begin(pages):
                pass
            assert self.under_way, f"{block} will never come"
            self.end(source.randrange(len(self.under_way)))
        raise AssertionError("endless")


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    spare=st.integers(0, 20),
    reads=st.integers(1, 5),
    pages=st.integers(1, 4),
    jumps=st.lists(st.integers(0, 11), max_size=6),
    seed=st.integers(0, 99),
)
def test_every_block_arrives_whole_whatever_is_left_out(
    sizes: list[int], spare: int, reads: int, pages: int, jumps: list[int], seed: int
) -> None:
    source = random.Random(seed)
    cycle = extents(sizes)
    room = max(sizes) + spare
    window = Window(room * PAGE, cycle)
    disk = Disk(window, room)
    at = 0
    for _ in range(4 * len(cycle)):
        extent = cycle[at]
        passage = disk.until_here(extent.block, reads, pages, source)
        begin = passage.position // PAGE
        held = [(extent.block, page) for page in range(extent.nbytes // PAGE)]
        passage.leases += 1
        assert disk.memory[begin : begin + len(held)] == held
        for _ in range(source.randrange(8)):  # reading goes on while it is used
            while len(disk.under_way) < reads and disk.begin(pages):
                pass
            if disk.under_way:
                disk.end(source.randrange(len(disk.under_way)))
        assert disk.memory[begin : begin + len(held)] == held
        passage.leases -= 1
        window.leave(passage)
        at = (at + 1) % len(cycle)
        if jumps and not source.randrange(3):
            at = jumps.pop() % len(cycle)


def test_the_next_block_is_read_piece_by_piece_while_its_place_becomes_free() -> None:
    window = Window(8 * PAGE, extents([4, 4, 6]))
    disk = Disk(window, 8)
    while disk.begin(2):
        pass
    assert [c.passage.block.layer for c in disk.under_way] == [0, 0, 1, 1]
    for _ in range(4):
        disk.end(0)
    window.leave(window.want(BlockId("ffn", 0)))
    assert disk.begin(2)
    assert disk.begin(2)
    assert not disk.begin(2), "its last third lies where block 1 is"
    window.leave(window.want(BlockId("ffn", 1)))
    assert disk.begin(2)


def test_the_window_wraps_to_the_next_step() -> None:
    window = Window(12 * PAGE, extents([4, 4, 4]))
    disk = Disk(window, 12)
    disk.until_here(BlockId("ffn", 2), 1, 4, random.Random(0))
    disk.begin(4)
    assert disk.under_way[0].passage.block.layer == 0


def test_a_failed_block_is_read_again_when_it_is_wanted_again() -> None:
    window = Window(8 * PAGE, extents([4, 4, 4]))
    disk = Disk(window, 8)
    disk.begin(2)
    disk.begin(2)
    disk.end(0, OSError("broken"))
    first = window.want(BlockId("ffn", 0))
    assert first.error
    window.leave(first)
    disk.end(0)
    again = disk.until_here(BlockId("ffn", 0), 2, 2, random.Random(0))
    assert again is not first
    assert again.here


def test_a_line_is_first_come_first_served() -> None:
    line = Line()
    passages = [Passage(BlockId("attn", i), 0, 0, 3 * PAGE) for i in range(3)]
    line.extend(passages)
    assert line.next_read(2 * PAGE) == Read(passages[0], 0, 2 * PAGE)
    line.leave(passages[0])
    line.leave(passages[2])
    assert line.next_read(4 * PAGE) == Read(passages[1], 0, 3 * PAGE)
    assert line.next_read(PAGE) is None


def test_what_failed_ahead_of_a_step_that_failed_is_not_told_to_the_next() -> None:
    window = Window(8 * PAGE, extents([4, 4, 4]))
    disk = Disk(window, 8)
    disk.until_here(BlockId("ffn", 2), 1, 4, random.Random(0))
    window.leave(window.want(BlockId("ffn", 2)))
    while disk.begin(4):
        pass
    while disk.under_way:
        disk.end(0, OSError("away for a while"))
    first = window.want(BlockId("ffn", 0))
    assert first.error
    window.leave(first)
    assert window.want(BlockId("ffn", 1)).error is None
