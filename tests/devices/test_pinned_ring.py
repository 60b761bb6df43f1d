"""Pieces of page-locked memory are used again only when what they were used for has ended, in the order of a queue."""

from __future__ import annotations

import random

import pytest

from shoal.devices.pinned_ring import ALIGNMENT, PinnedRing


@pytest.mark.parametrize("seed", range(5))
def test_no_two_pieces_that_are_in_use_overlap(seed: int) -> None:
    generator = random.Random(seed)
    ring = PinnedRing(16 * ALIGNMENT)
    used: dict[int, range] = {}  # copies that have not landed
    landed: list[int] = []

    def land(copy: int) -> None:
        landed.append(copy)
        del used[copy]

    for copy in range(300):
        size = generator.choice((0, 1, ALIGNMENT, 3 * ALIGNMENT + 7, generator.randrange(ring.nbytes + 1)))
        start = ring.place(size)
        mine = range(start, start + size)
        assert start % ALIGNMENT == 0
        assert mine.stop <= ring.nbytes
        assert not any(max(mine.start, its.start) < min(mine.stop, its.stop) for its in used.values()), (
            "somebody else's bytes"
        )
        used[copy] = mine
        ring.take(size, copy, lambda copy=copy: land(copy))  # type: ignore[misc]
        if generator.random() < 0.1:
            asked = generator.randrange(copy + 1)
            ring.land(asked)
            assert asked in landed
    assert landed == sorted(landed)


def test_nobody_waits_as_long_as_there_is_room() -> None:
    ring, landed = PinnedRing(4 * ALIGNMENT), []
    for copy in range(4):
        assert ring.place(ALIGNMENT) == copy * ALIGNMENT
        ring.take(ALIGNMENT, copy, lambda copy=copy: landed.append(copy))  # type: ignore[misc]
    assert not landed
    assert ring.place(2 * ALIGNMENT) == 0
    assert landed == [0, 1]
    with pytest.raises(AssertionError):
        ring.place(5 * ALIGNMENT)
