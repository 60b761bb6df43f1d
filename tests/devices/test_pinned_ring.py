"""Pieces of page-locked memory are used again only when what they were used for has ended, in the order of a queue."""

from __future__ import annotations

import random
import threading

import pytest

from shoal.devices.pinned_ring import ALIGNMENT, PinnedRing


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
