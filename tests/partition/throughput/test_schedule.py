"""The predicted schedule of a window is that of the real one, driven with a clock instead of threads."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.offload.window.expert_cache import ExpertCache
from shoal.offload.window.window import Extent, Window
from shoal.partition.spec import BlockId
from shoal.partition.throughput.schedule import Experts, Use, expert_waits, lap, ring_s

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


def test_no_block_streams() -> None:
    assert lap([Use(0.1)] * 3, 0, 1e9, 0.05).step_s == pytest.approx(0.35)


EXPERT = 4 << 20
CHOICES = 20  # steps of as many layers


def driven_experts(its: Experts, experts: int, slots: int, bytes_per_s: float) -> tuple[float, float]:
    """(seconds of a layer, experts that were missing in it, both on average) with the policy that readers ask: one read
    at a time, in its order; choices and guesses as if by dice."""
    dice, layers, active = random.Random(0), 8, round(its.used)
    blocks = [[BlockId("expert", layer, it) for it in range(experts)] for layer in range(layers)]
    cache = ExpertCache(slots, EXPERT, [Extent(block, 0, EXPERT) for layer in blocks for block in layer])
    landed: dict[BlockId, float] = {}
    now = disk = 0.0
    reads = 0

    def read_one() -> bool:
        nonlocal disk, reads
        read = cache.next_read(EXPERT)
        if read is None:
            return False
        disk = max(disk, now) + read.nbytes / bytes_per_s
        reads += 1
        read.passage.landed += read.nbytes
        landed[read.passage.block] = disk
        cache.ended(read.passage)
        return True

    def compute(seconds: float) -> None:
        nonlocal now, disk
        end, disk = now + seconds, max(disk, now)
        while disk < end and read_one():
            pass
        now = end

    def chosen(layer: int) -> list[BlockId]:
        return sorted(dice.sample(blocks[layer], active))

    def guessed(layer: int, own: list[BlockId]) -> list[BlockId]:
        """What would be chosen, but for some."""
        others = [block for block in blocks[layer] if block not in own]
        return [block if dice.random() < its.right else dice.choice(others) for block in own]

    began_s, own = 0.0, chosen(0)
    for at in range(CHOICES * layers):
        if at == layers:  # it was full then
            began_s, reads = now, 0
        after = chosen((at + 1) % layers)
        compute(its.before_s)
        cache.expect(own)
        cache.guess(guessed((at + 1) % layers, after) if its.right else [])
        for start in range(0, active, its.together):
            held = []
            for block in own[start : start + its.together]:
                while (passage := cache.want(block)) is None or not passage.here:
                    assert read_one()
                passage.leases += 1
                held.append(passage)
                now = max(now, landed[block])
            compute(its.compute_s * len(held) / active)
            for passage in held:
                passage.leases -= 1
                cache.leave(passage)
        own = after
    count = (CHOICES - 1) * layers
    return (now - began_s) / count, reads / count


@pytest.mark.parametrize("right", [0.0, 0.85, 1.0])
@pytest.mark.parametrize("disk", [0.3, 1.0, 4.0])  # times as fast as computing what is missing
@pytest.mark.parametrize(("active", "before"), [(8, 0.3), (8, 1.0), (24, 0.1)])
def test_experts_from_disk(right: float, disk: float, active: int, before: float) -> None:
    """As the real policy, with as many missing as there were."""
    its = Experts(active, 0.0, EXPERT, 4, active * 1e-3, before * active * 1e-3, right)
    speed = disk * EXPERT / 2e-3
    layer_s, read = driven_experts(its, 32, 8 * 16, speed)
    # What was read has the wrong guesses in it.
    found = min(
        (it / 100 for it in range(100 * active)),
        key=lambda missing: abs(
            expert_waits(its._replace(missing=missing), speed).disk_s * speed / EXPERT - read
        ),
    )
    waits = expert_waits(its._replace(missing=found), speed)
    assert its.before_s + its.compute_s + waits.stall_s == pytest.approx(layer_s, rel=0.1)


def test_all_experts_are_there() -> None:
    its = Experts(8, 0.0, EXPERT, 4, 8e-3, 4e-3, 0.85)
    assert expert_waits(its, 1e9) == (0.0, 0.0)


def test_experts_that_no_router_guesses_wait_for_all_but_the_first_together() -> None:
    """Four of eight are missing at 1 ms each: they hide behind the half that is computed first, but for those of it."""
    slow, quick = (Experts(8, 4.0, EXPERT, 4, compute_s, 9e-3, 0.0) for compute_s in (2e-3, 20e-3))
    assert expert_waits(slow, EXPERT / 1e-3) == pytest.approx((3e-3, 4e-3))
    assert expert_waits(quick, EXPERT / 1e-3) == pytest.approx((2e-3, 4e-3))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 12),
    st.integers(0, 3),
    st.floats(1.0, 2.9),
    st.floats(0.001, 0.2),
    st.floats(0.0, 0.1),
)
def test_who_asks_often_gets_the_schedule_of_evenly_spread_blocks(
    blocks: int, pinned: int, room: float, compute_s: float, beside_s: float
) -> None:
    """`pinned` blocks stay between any two that stream. Of an odd number of blocks the first waits for the last."""
    blocks *= 2
    uses = [it for _ in range(blocks) for it in (Use(compute_s, BLOCK), *[Use(beside_s)] * pinned)]
    window = int(room * BLOCK)
    found = lap(uses, window, 1e9).step_s
    computing_s = blocks * (compute_s + pinned * beside_s)
    least_s = ring_s(blocks * BLOCK, BLOCK, window, compute_s, 1e9)
    assert max(computing_s, least_s) == pytest.approx(found, rel=0.05)
