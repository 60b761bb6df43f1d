"""Where blocks lie in a ring, and what they wait for there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.throughput.ring import ring_places, waits_for


@given(blocks=st.lists(st.integers(1, 60), max_size=20), more=st.integers(0, 120))
def test_blocks_lie_within_the_ring(blocks: list[int], more: int) -> None:
    nbytes = max(blocks, default=0) + more
    places = ring_places(nbytes, blocks)
    assert all(0 <= place <= nbytes - size for place, size in zip(places, blocks, strict=True))


def test_in_a_ring_for_two_no_large_block_has_the_place_of_the_one_before_it() -> None:
    blocks = 2, 2, 9, 2, 9, 2, 2, 9
    waits = waits_for(11, blocks, 100)
    assert all(
        back > 1 for size, pieces in zip(blocks, waits, strict=True) if size == 9 for _, back in pieces
    )


def test_where_many_would_have_the_place_of_the_one_before_them_blocks_go_round_the_whole_ring() -> None:
    """Beside a head, say, that takes most of it."""
    blocks = *(9, 2) * 10, 58
    backs = [back for pieces in waits_for(67, blocks, 100)[1:-1] for _, back in pieces]
    assert min(backs) > 1
    assert ring_places(110, (48, 48, 48, 48, 62)) == [0, 48, 0, 48, 0]
