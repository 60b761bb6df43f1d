"""Pieces of page-locked memory are used again only when what they were used for has ended, in the order of a queue."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.devices.pinned_ring import ALIGNMENT, CopyEnds, PinnedRing, begin_copies, bunched


def ring_of(pieces: int) -> PinnedRing:
    """Whose memory says where it is."""
    return PinnedRing(range(pieces * ALIGNMENT))


@pytest.mark.parametrize("seed", range(5))
def test_no_two_pieces_that_are_in_use_overlap(seed: int) -> None:
    generator = random.Random(seed)
    ring = ring_of(16)
    used: dict[int, range] = {}  # copies that have not landed
    ended: set[int] = set()
    landed: list[int] = []

    def land(copy: int) -> None:
        assert copy in ended, "what comes has not come"
        landed.append(copy)
        del used[copy]

    def wait(copy: int) -> None:
        ended.update(range(copy + 1))

    for copy in range(300):
        size = generator.choice((0, 1, ALIGNMENT, 3 * ALIGNMENT + 7, generator.randrange(16 * ALIGNMENT + 1)))
        with ring.room(size, wait) as mine:
            assert len(mine) == size
            assert mine.start % ALIGNMENT == 0
            assert not any(max(mine.start, its.start) < min(mine.stop, its.stop) for its in used.values()), (
                "somebody else's bytes"
            )
            used[copy] = mine
            ring.take(size, copy, lambda copy=copy: land(copy))  # type: ignore[misc]
        if generator.random() < 0.1:
            asked = generator.randrange(copy + 1)
            wait(asked)
            ring.land(asked)
            assert asked in landed
    wait(299)
    ring.land_all()
    assert landed == [*range(300)]


def test_nobody_waits_as_long_as_there_is_room() -> None:
    ring, waited, landed = ring_of(4), list[int](), list[int]()
    for copy in range(4):
        with ring.room(ALIGNMENT, waited.append) as mine:
            assert mine.start == copy * ALIGNMENT
            ring.take(ALIGNMENT, copy, lambda copy=copy: landed.append(copy))  # type: ignore[misc]
    assert not waited
    with ring.room(2 * ALIGNMENT, waited.append) as mine:
        assert mine.start == 0
    assert waited == landed == [0, 1]
    with pytest.raises(AssertionError), ring.room(5 * ALIGNMENT, waited.append):
        pass


def test_who_waits_for_room_keeps_nobody_from_what_has_come() -> None:
    ring, waits, goes_on, landed = ring_of(2), threading.Event(), threading.Event(), list[int]()
    for copy in range(2):
        with ring.room(ALIGNMENT, landed.remove):
            ring.take(ALIGNMENT, copy, lambda copy=copy: landed.append(copy))  # type: ignore[misc]

    def wait(copy: int) -> None:
        waits.set()
        assert goes_on.wait(10)

    def take() -> None:
        with ring.room(2 * ALIGNMENT, wait):
            ring.take(2 * ALIGNMENT, 2, lambda: landed.append(2))

    other = threading.Thread(target=take, daemon=True)
    other.start()
    assert waits.wait(10)
    land = threading.Thread(target=ring.land, args=(0,), daemon=True)
    land.start()
    land.join(10)
    assert landed == [0]
    goes_on.set()
    other.join(10)
    assert landed == [0, 1]


@given(st.lists(st.integers(1, 5000), max_size=30), st.integers(1, 5000))
def test_bunches_have_all_in_order_and_no_more_than_there_is_room_for(sizes: list[int], most: int) -> None:
    sources = [torch.full((size,), place, dtype=torch.int32) for place, size in enumerate(sizes)]
    whole = [CopyEnds(it, torch.zeros_like(it)) for it in sources]
    found = []
    for bunch in bunched(iter(whole), most):
        found += bunch.copies
        assert len(bunch.copies) == 1 or bunch.starts[-1] + len(bunch.copies[-1].source) <= most
        for leaves in (False, True):
            piece = torch.full((bunch.nbytes,), -1, dtype=torch.int32)
            for its in bunch.copies:
                its.target.zero_()
            ways, land = bunch.by_way_of(piece, leaves=leaves)
            begin_copies(ways)
            land()
            assert all(torch.equal(its.source, its.target) for its in bunch.copies)
            assert all(at % ALIGNMENT == 0 for at in bunch.starts)
    assert [id(it) for it in found] == [id(it) for it in whole]
