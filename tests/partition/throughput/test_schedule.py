"""The predicted schedule of a window is that of the real one, driven with a clock instead of threads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.offload.window.window import Extent, Window
from shoal.partition.spec import BlockId
from shoal.partition.throughput.schedule import Use, lap

PIECE = 4 << 20


def driven(uses: list[Use], window_bytes: int, bytes_per_s: float, laps: int = 8) -> float:
    """Seconds of a step in the long run, with the policy that readers ask: one read at a time, in its order."""
    extents = [Extent(BlockId("ffn", i), 0, use.nbytes) for i, use in enumerate(uses) if use.nbytes]
    window = Window(window_bytes, extents)
    landed: dict[int, float] = {}  # when the last piece of a passage came
    now = disk = 0.0
    ends = []

    def compute(seconds: float) -> None:
        """Meanwhile what has room is read, as far as there is time."""
        nonlocal now, disk
        end, disk = now + seconds, max(disk, now)
        while disk < end and (read := window.next_read(PIECE)) is not None:
            disk += read.nbytes / bytes_per_s
            read.passage.landed += read.nbytes
            landed[id(read.passage)] = disk
            window.ended(read.passage)
        now = end

    for _ in range(laps):
        for place, use in enumerate(uses):
            if not use.nbytes:
                compute(use.compute_s)
                continue
            passage = window.want(BlockId("ffn", place))
            while not passage.here:
                read = window.next_read(PIECE)
                assert read is not None
                disk = max(disk, now) + read.nbytes / bytes_per_s
                read.passage.landed += read.nbytes
                landed[id(read.passage)] = disk
                window.ended(read.passage)
            now = max(now, landed.pop(id(passage), 0.0))
            passage.leases += 1
            compute(use.compute_s)
            passage.leases -= 1
            window.leave(passage)
        ends.append(now)
    return (ends[-1] - ends[2]) / (laps - 3)


BLOCK = 64 << 20


@pytest.mark.parametrize("room", [1, 2, 3, 5])
@pytest.mark.parametrize("compute_s", [0.001, 0.06, 0.064, 0.3])
def test_blocks_of_one_size(room: int, compute_s: float) -> None:
    uses = [Use(compute_s, BLOCK)] * 12
    assert lap(uses, room * BLOCK, 1e9).step_s == pytest.approx(driven(uses, room * BLOCK, 1e9), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 0.2), st.sampled_from([0, 1, 3, 8])), min_size=3, max_size=16).filter(
        lambda uses: any(size for _, size in uses)
    ),
    st.floats(1.0, 3.0),
)
def test_blocks_of_any_size(uses: list[tuple[float, int]], room: float) -> None:
    blocks = [Use(compute_s, size * PIECE) for compute_s, size in uses]
    window = int(room * max(use.nbytes for use in blocks))
    assert lap(blocks, window, 1e9).step_s == pytest.approx(driven(blocks, window, 1e9, 16), rel=1e-6)


def test_a_window_of_two_blocks_hides_the_faster_half() -> None:
    for compute_s in (0.01, 0.2):
        found = lap([Use(compute_s, BLOCK)] * 10, 2 * BLOCK, 1e9)
        assert found.step_s == pytest.approx(10 * max(compute_s, BLOCK / 1e9), rel=0.02)
    one = lap([Use(0.05, BLOCK)] * 10, BLOCK, 1e9)  # nothing can come while it is used
    assert one.step_s == pytest.approx(10 * (0.05 + BLOCK / 1e9), rel=0.02)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 0.2), st.integers(0, 9)), min_size=1, max_size=12),
    st.floats(1.0, 4.0),
    st.floats(1.0, 10.0),
)
def test_it_takes_no_less_than_either_half_and_no_more_than_both(
    uses: list[tuple[float, int]], room: float, faster: float
) -> None:
    blocks = [Use(compute_s, size * PIECE) for compute_s, size in uses]
    window = int(room * max(1, *(use.nbytes for use in blocks), 1))
    found = lap(blocks, window, 1e9)
    compute_s = sum(use.compute_s for use in blocks)
    disk_s = sum(use.nbytes for use in blocks) / 1e9
    assert max(compute_s, disk_s) * 0.999 <= found.step_s <= (compute_s + disk_s) * 1.001
    assert lap(blocks, window, 1e9 * faster).step_s <= found.step_s * 1.0001
    assert lap(blocks, 2 * window, 1e9).step_s <= found.step_s * 1.001 + 0.1 * disk_s


def test_no_block_streams() -> None:
    assert lap([Use(0.1)] * 3, 0, 1e9, 0.05).step_s == pytest.approx(0.35)
