"""What passes through a window, and experts that come in parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import DENSE, MB, MIXED, device, wanted
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.errors import ProfileError
from shoal.partition.plan import Plan, plan_in_ram
from shoal.partition.spec import BlockId
from shoal.partition.streamed_plan import plan_streamed
from shoal.partition.throughput import contention
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.explain import with_faster_disk
from shoal.partition.throughput.laws import NOTHING, Rows, block_bytes_per_s, ring_bytes_per_s
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import ANY, Contention, Overheads, Profile, ReadLaw, RingLaw, RowsLaw
from shoal.partition.throughput.profile_checks import check_profile
from shoal.partition.throughput.schedule import Experts, Use, contended, lap
from shoal.partition.throughput.step_pieces import Pieces

RINGS = RingLaw((16 * MB, 64 * MB), (2.5e9, 2e9))
READS = ReadLaw((256_000, 4 * MB), (1.5e9, 2e9), RINGS)


def test_a_small_ring_is_filled_sooner_than_a_large_one() -> None:
    measured = replace(device(), reads=READS)
    found = [ring_bytes_per_s(measured, it * MB) for it in (4, 16, 40, 64, 900)]
    assert found == pytest.approx([2.5e9, 2.5e9, 2.25e9, 2e9, 2e9])
    assert ring_bytes_per_s(replace(measured, reads=replace(READS, rings=None)), 16 * MB) == 2e9
    assert ring_bytes_per_s(device(), 16 * MB) == 1e9, "one speed that is known"


def test_experts_come_as_fast_as_blocks_of_their_size_into_memory_that_no_cache_holds() -> None:
    measured = replace(device(), reads=READS)
    found = [block_bytes_per_s(measured, it) for it in (1, 256_000, 2_128_000, 4 * MB, 900 * MB)]
    assert found == pytest.approx([1.5e9, 1.5e9, 1.75e9, 2e9, 2e9])


def test_a_step_reads_as_fast_as_its_ring_is_filled() -> None:
    plan = plan_streamed(
        wanted(DENSE.spec), DENSE.extents, DENSE.vectors_bytes, memory_bytes=DENSE.weights_bytes // 2
    )
    assert isinstance(plan, Plan)

    def token_s(ring_bytes: int) -> float:
        rings = RingLaw((ring_bytes, ring_bytes + 1), (2e9, 1e9))
        machine = replace(device(), reads=replace(READS, rings=rings), overheads=Overheads(0.0, 0.0))
        return cost(DENSE, plan, machine, Job()).token_s

    assert token_s(plan.window_bytes - 1) > 1.5 * token_s(plan.window_bytes)


KEEPS = replace(device(), contention=Contention(0.8, 0.8))


def test_what_is_read_while_the_processor_waits_slows_nothing() -> None:
    """A window that holds one block is filled when that has been computed, and nothing is computed meanwhile."""
    uses = [Use(0.010, 20 * MB)] * 6
    one, many = (contended(KEEPS, window, uses, {}, 0.0) for window in (20 * MB, 80 * MB))
    assert one.step_s == pytest.approx(6 * (0.010 + 0.020))
    # Where there is room for more, the disk never rests: a block's 20 ms of work take t, as of its speed a fifth of the
    # square of the share is lost in which something is computed, 12.5 ms of t.
    took_s = many.step_s / 6
    assert took_s * (1 - 0.2 * (0.0125 / took_s) ** 2) == pytest.approx(0.020, rel=0.005)


@pytest.mark.parametrize("keeps", [0.4, 0.61, 0.95])
def test_a_little_computing_takes_next_to_nothing_of_a_disk(keeps: float) -> None:
    """A quarter of the time costs a sixteenth of what all of it does; all of it, what was measured."""
    machine = replace(device(), contention=Contention(1.0, keeps))
    none, little, all_ = (contention.together(machine, share, 0.0)[1] for share in (0.0, 0.25, 1.0))
    assert none == 1.0
    assert 1 - 1 / little == pytest.approx((1 - keeps) / 16)
    assert all_ == pytest.approx(1 / keeps)


@given(
    st.lists(st.tuples(st.floats(1e-4, 0.05), st.integers(0, 30)), min_size=2, max_size=12),
    st.integers(0, 60),
    st.floats(0.2, 1.0),
    st.floats(0.2, 1.0),
)
def test_contention_lies_between_none_and_all_of_the_time(
    blocks: list[tuple[float, int]], spare: int, compute_keeps: float, disk_keeps: float
) -> None:
    uses = [Use(seconds, megabytes * MB) for seconds, megabytes in blocks]
    window = max(use.nbytes for use in uses) + spare * MB
    none, some = (
        contended(replace(device(), contention=Contention(*keeps)), window, uses, {}, 0.0)
        for keeps in ((1.0, 1.0), (compute_keeps, disk_keeps))
    )
    slowest = [use._replace(compute_s=use.compute_s / compute_keeps) for use in uses]
    slow_disk = replace(device(), disk_bytes_per_s=device().disk_bytes_per_s * disk_keeps)
    all_ = contended(replace(slow_disk, contention=Contention(1.0, 1.0)), window, slowest, {}, 0.0)
    assert none.step_s * (1 - 1e-9) <= some.step_s <= max(all_.step_s, none.step_s) * (1 + 1e-9)


@given(
    st.floats(0.2, 1.0),
    st.floats(0.2, 1.0),
    st.sampled_from([0.25, 0.5, 0.8, 1.0, 1.3, 2.0, 4.0]),
    st.booleans(),
)
def test_contention_is_found(compute_keeps: float, disk_keeps: float, ratio: float, roomy: bool) -> None:
    """More rounds would change a step by less than a hundredth, also where both take as long."""
    keeps = replace(device(), contention=Contention(compute_keeps, disk_keeps))
    uses = [Use(ratio * 0.020, 20 * MB)] * 12
    window = (80 if roomy else 30) * MB
    found = contended(keeps, window, uses, {}, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contention, "_COUNTS", (*contention._COUNTS, *(0.1,) * 40))
        patch.setattr(contention, "_SETTLED", 1e-9)
        assert found.step_s == pytest.approx(contended(keeps, window, uses, {}, 0.0).step_s, rel=0.01)


def test_rows_of_an_embedding_on_disk_are_read_one_by_one() -> None:
    plan = plan_streamed(
        wanted(DENSE.spec), DENSE.extents, DENSE.vectors_bytes, memory_bytes=DENSE.weights_bytes // 2
    )
    assert isinstance(plan, Plan)

    def step_s(streams: int, small: float) -> float:
        """With small blocks so many times as slow."""
        rings = RingLaw(RINGS.nbytes, (1e14, 1e14))  # else it waits for the disk anyhow
        reads = ReadLaw((256 << 10, 4 << 20), (1.5e9 / small, 2e9), rings)
        machine = replace(device(), reads=reads, contention=Contention(1.0, 1.0))
        return cost(DENSE, plan, machine, Job(batch=streams)).token_s

    row_s = (256 << 10) / 1.5e9
    for streams in (1, 4):
        assert step_s(streams, 11) - step_s(streams, 1) == pytest.approx(streams * 10 * row_s)


def test_rows_of_a_tied_embedding_are_read_as_well() -> None:
    """Its bytes are the head's."""
    model = replace(DENSE, extents={**DENSE.extents, BlockId("embed"): 0})
    plan = plan_streamed(
        wanted(model.spec), model.extents, model.vectors_bytes, memory_bytes=model.weights_bytes // 2
    )
    assert isinstance(plan, Plan)
    rings = RingLaw(RINGS.nbytes, (1e14, 1e14))
    slow, quick = (
        replace(device(), reads=ReadLaw((256 << 10, 4 << 20), (speed, 2e9), rings)) for speed in (1e7, 1.5e9)
    )
    assert cost(model, plan, slow, Job()).token_s > cost(model, plan, quick, Job()).token_s + 0.02


def test_a_mixture_goes_once_at_least() -> None:
    one = Experts(2.0, 1.0, 1, 4, 0.0, 0.0, 0.0)
    assert (one.goes, one._replace(used=6.0).goes) == (1.0, 1.5)


def test_a_disk_that_is_faster_is_so_with_each_size() -> None:
    before = replace(device(), reads=READS)
    twice = with_faster_disk(before, 2)
    assert twice.disk_bytes_per_s == 2 * before.disk_bytes_per_s
    assert twice.reads is not None
    assert twice.reads.bytes_per_s == (3e9, 4e9)
    assert twice.reads.rings == RingLaw(RINGS.nbytes, (5e9, 4e9))
    assert with_faster_disk(before, 1) == before


def test_rings_that_cannot_be_true_are_refused() -> None:
    wrong = replace(READS, rings=RingLaw((2, 1), (1e9, 1e9)))
    with pytest.raises(ProfileError, match=r"devices\[0\].reads.rings.nbytes must rise"):
        check_profile(Profile((replace(device(), reads=wrong),)))


def test_experts_have_the_rows_of_one_part_at_a_time() -> None:
    """Each part chooses experts of its own, with few rows each: 4 × 32 rows take as long as 32 rows four times."""
    law = RowsLaw(ANY, 1.0, (1, 1024), (1e-10, 1.2e-10))  # which hardly depends on rows
    machine = replace(device(), products=(law,))
    plan = plan_in_ram(wanted(MIXED.spec), MIXED.block_bytes, memory_bytes=10**12)
    assert isinstance(plan, Plan)
    kind = MIXED.kind_of(0)

    def mixed_s(rows: int, part: int) -> float:
        pieces = Pieces(MIXED, replace(plan, part_tokens=part), machine, [Rows(1, rows, 0)], 1.0)
        assert pieces.experts(kind, 0) == NOTHING
        return pieces.experts(kind, rows).seconds

    assert mixed_s(128, 32) == pytest.approx(4 * mixed_s(32, 1024))
    assert mixed_s(144, 32) == pytest.approx(4 * mixed_s(32, 1024) + mixed_s(16, 1024))
    assert mixed_s(128, 32) > 3 * mixed_s(128, 1024)


def test_guessing_asks_the_next_router_as_well() -> None:
    """In each layer but the last, where experts are on disk; not where all are in memory."""

    def token_s(memory: int, mixture_s: float, router: int = MIXED.spec.hidden) -> float:
        products = {
            block: (it[0]._replace(nbytes=32 * 2 * router),) if block.kind == "router" else it
            for block, it in MIXED.products.items()
        }
        model = replace(MIXED, products=products)
        asked = wanted(model.spec)
        plan = (
            plan_streamed(asked, model.extents, model.vectors_bytes, memory_bytes=memory)
            if memory
            else plan_in_ram(asked, model.block_bytes, memory_bytes=10**12)
        )
        assert isinstance(plan, Plan)
        over = Overheads(0.0, 0.0, mixture_s, 0.0)
        machine = device(overheads=over, disk_bytes_per_s=1e14, contention=Contention(1.0, 1.0))
        return cost(model, plan, machine, Job()).token_s

    half = MIXED.weights_bytes // 2
    assert token_s(0, 0.1) - token_s(0, 0.0) == pytest.approx(8 * 0.1)
    leased = 8 * 2  # all experts that a layer uses go together
    assert token_s(half, 0.1) - token_s(half, 0.0) == pytest.approx((15 + leased) * 0.1, rel=0.01)
    more_s = 32 * 2 * (10**6 - 1024) / 20e9
    assert token_s(half, 0.0, 10**6) - token_s(half, 0.0) == pytest.approx(15 * more_s, rel=0.01)


def test_reads_that_go_on_beside_a_block_s_last_one_delay_it() -> None:
    """Worked out by hand: blocks of 10 at 10 a second, computed for half a second, in a ring of two. If all of the next
    block comes beside, a block and the next are here together, every two seconds, and half a second of the first's
    computing passes in which nothing may be read."""
    uses = [Use(0.5, 10)] * 2
    one_by_one, beside = lap(uses, 20, 10.0), lap(uses, 20, 10.0, beside_bytes=10)
    assert one_by_one.step_s == pytest.approx(2.0)
    assert beside.step_s == pytest.approx(2.5)
    assert beside.disk_s == one_by_one.disk_s


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(0, 9)), min_size=1, max_size=6),
    st.integers(9, 40),
    st.integers(0, 30),
)
def test_what_comes_beside_takes_no_longer_than_reading_and_computing_by_turns(
    uses: list[tuple[float, int]], window: int, beside: int
) -> None:
    its = [Use(compute_s, nbytes) for compute_s, nbytes in uses]
    alone, found = lap(its, window, 3.0), lap(its, window, 3.0, beside_bytes=beside)
    turns_s = sum(it.compute_s for it in its) + alone.disk_s
    begun_s = beside / 3.0 / 2 + 1e-9  # in the first lap every place is free, and two are looked at behind it
    assert alone.step_s - begun_s <= found.step_s <= turns_s + begun_s
    tight = [Use(compute_s, 9) for compute_s, _ in uses]  # the next one's place is never free
    assert lap(tight, 9, 3.0, beside_bytes=beside) == lap(tight, 9, 3.0)
