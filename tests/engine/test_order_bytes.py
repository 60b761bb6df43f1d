"""Orders as bytes: what other ranks need comes back, token ids do not travel, and no number is believed."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.errors import OrderError
from shoal.engine.order import Order, Reading, Segment
from shoal.engine.order_bytes import order_bytes, order_of
from shoal.offload.kv.disk_index import Slot
from shoal.offload.kv.prefix_cache import Copy, Move, Put
from shoal.partition.plan import KvPlan, Plan

PAGES, PAGE_TOKENS, CONTEXT, SLOTS = 10, 64, 256, 20
DIGEST = bytes(range(32))
PLAN = Plan((), KvPlan(PAGES, PAGE_TOKENS, "f16", 0), CONTEXT, 256, 4, 8, 1, 0)

segments = st.builds(
    lambda start, count, pages, wanted, length: Segment(
        list(range(1000, 1000 + count)), start, pages, min(wanted, count), length
    ),
    st.integers(0, 64),
    st.integers(1, 60),
    st.lists(st.integers(0, PAGES - 1), min_size=2, max_size=4),
    st.integers(0, 60),
    st.integers(0, 300),
)
pages = st.integers(0, PAGES - 1)
slots = st.builds(Slot, st.integers(0, SLOTS - 1), st.binary(min_size=32, max_size=32))
copies = st.builds(Copy, pages, pages)
puts = st.builds(lambda page, slot: Put(page, *slot), pages, slots)
readings = st.lists(st.tuples(slots, pages), max_size=3).map(
    lambda pairs: Reading([slot for slot, _ in pairs], [page for _, page in pairs])
)


some_pages = st.lists(pages, max_size=PAGES)


@given(
    st.lists(segments, max_size=4),
    st.lists(copies | puts, max_size=4),
    st.lists(readings, max_size=3),
    some_pages,
    some_pages,
)
def test_everything_but_token_ids_comes_back(
    parts: list[Segment], moves: list[Move], reads: list[Reading], sent: list[int], returned: list[int]
) -> None:
    data = order_bytes(Order(parts, moves, reads, sent, returned))
    found = order_of(data, PLAN, SLOTS)
    assert found.readings == reads
    assert (found.sent, found.returned) == (sent, returned)
    assert [it._replace(tokens=()) for it in found.segments] == [it._replace(tokens=()) for it in parts]
    assert [len(it.tokens) for it in found.segments] == [len(it.tokens) for it in parts]
    assert found.moves == moves


def test_token_ids_do_not_travel() -> None:
    one = order_bytes(Order([Segment([1, 2, 3], 0, [0], 1)]))
    other = order_bytes(Order([Segment([7, 8, 9], 0, [0], 1)]))
    assert one == other


@given(st.lists(segments, max_size=4))
def test_token_ids_travel_to_ranks_that_embed_them(parts: list[Segment]) -> None:
    data = order_bytes(Order(parts), tokens=True)
    found = order_of(data, replace(PLAN, guesses=240), tokens=True).segments
    assert [it._replace(tokens=list(it.tokens)) for it in found] == parts
    if parts:
        with pytest.raises(OrderError, match="with token ids"):
            order_of(data, PLAN)
        with pytest.raises(OrderError, match="without token ids"):
            order_of(order_bytes(Order(parts)), PLAN, tokens=True)


@pytest.mark.parametrize("wrong", [[-1], [1 << 31], [0.5], ["a"], [None]])
def test_what_is_no_token_id_is_refused(wrong: list[object]) -> None:
    with pytest.raises(OrderError, match="read"):
        order_of(msgspec.msgpack.encode([[[wrong, 0, [0], 1, 0]], []]), PLAN, tokens=True)


def test_no_more_logits_are_made_than_there_is_memory_for() -> None:
    def wanting(rows: int) -> bytes:
        return order_bytes(
            Order([Segment([5] * 32, 0, [0], rows), Segment([5] * 32, 0, [1], 2)]), tokens=True
        )

    most = PLAN.sequences + PLAN.guesses
    assert order_of(wanting(most - 2), PLAN, tokens=True).segments[0].rows_wanted == most - 2
    with pytest.raises(OrderError, match=f"number of wanted rows {most + 1}: must be below {most + 1}"):
        order_of(wanting(most - 1), PLAN, tokens=True)


@pytest.mark.parametrize("count", [0, 65, PLAN.step_rows + 1])
def test_no_number_of_token_ids_is_believed(count: int) -> None:
    with pytest.raises(OrderError, match=r"no tokens|end|number of tokens"):
        order_of(msgspec.msgpack.encode([[[[0] * count, 0, [0], 0, 0]], []]), PLAN, tokens=True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([[[1, 0, [PAGES], 1, 0]], []], "page"),
        ([[[1, 0, [0], 2, 0]], []], "rows"),
        ([[[0, 0, [0], 0, 0]], []], "no tokens"),
        ([[[65, 0, [0], 1, 0]], []], "end"),
        ([[[1, CONTEXT, [0, 1, 2, 3, 4, 5], 1, 0]], []], "end"),
        ([[[1 << 21, 0, [0], 1, 0]], []], "end"),
        ([[[64, 0, [0], 1, 0]] * 5, []], "number of tokens 320: must be below 269"),
        ([[], [[0, PAGES]]], "copied page"),
        ([[], [[PAGES, 0]]], "copied page"),
        ([[[1, -1, [0], 1, 0]], []], "read"),
        ([[[1, 0, [0], 1, 1 << 30]], []], "length"),
        ([[], [[PAGES, 0, DIGEST]]], "saved page"),
        ([[], [[0, SLOTS, DIGEST]]], "slot"),
        ([[], [[0, 0, DIGEST[1:]]]], "read"),
        ([[], [[0, 0, "text"]]], "read"),
        ([[], [], [[[[SLOTS, DIGEST]], [0]]]], "slot"),
        ([[], [], [[[[0, DIGEST]], [PAGES]]]], "page"),
        ([[], [], [[[[0, DIGEST]], [0, 1]]]], "reads 1 slots into 2 pages"),
        ([[], [], [], [PAGES], []], "page"),
        ([[], [], [], [], [PAGES]], "page"),
        ([[], [], [], [0] * (PAGES + 1), []], "number of pages to pass on"),
        ([[], [], [], [], [0] * (PAGES + 1)], "number of pages to pass on"),
        ([[], [], [], [-1], []], "read"),
        ([[], [], [[[[0, DIGEST]] * PAGES, [0] * PAGES], [[[0, DIGEST]], [1]]]], "number of pages to read"),
        ([[], [], [[[[0, DIGEST[1:]]], [0]]]], "read"),
        ([[], [], [[[[-1, DIGEST]], [0]]]], "read"),
        ([[[1, 0, [0], 1, 0]] * 5, []], "number of segments"),
        ([[], [[0, 0]] * 10_000], "size in bytes"),
        ([1, 2], "read"),
        ({}, "read"),
    ],
)
def test_no_number_is_believed(wrong: object, said: str) -> None:
    with pytest.raises(OrderError, match=said):
        order_of(msgspec.msgpack.encode(wrong), PLAN, SLOTS)


def test_a_rank_without_a_disk_is_told_of_no_slots() -> None:
    for order in (Order(moves=[Put(0, 0, DIGEST)]), Order(readings=[Reading([Slot(0, DIGEST)], [0])])):
        with pytest.raises(OrderError, match="slot 0: must be below 0"):
            order_of(order_bytes(order), PLAN)


def bounded(data: bytes) -> None:
    """It is refused, or asks for nothing beyond the plan."""
    with contextlib.suppress(OrderError):
        order = order_of(data, PLAN, SLOTS)
        assert sum(len(it.tokens) for it in order.segments) <= PLAN.step_rows
        assert sum(len(it.pages) for it in order.readings) <= PAGES
        for move in order.moves:
            assert isinstance(move, Copy | Put)
            assert all(0 <= number < SLOTS for number in move[:2])
        for reading in order.readings:
            assert len(reading.entries) == len(reading.pages)
            assert all(0 <= slot.slot < SLOTS and len(slot.digest) == 32 for slot in reading.entries)
            assert all(0 <= page < PAGES for page in reading.pages)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data: bytes) -> None:
    bounded(data)


@given(
    st.lists(segments, max_size=4),
    st.lists(copies | puts, max_size=4),
    st.lists(readings, max_size=3),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 1 << 16),
)
def test_damaged_orders_are_refused_or_harmless(
    parts: list[Segment],
    moves: list[Move],
    reads: list[Reading],
    flips: list[tuple[int, int]],
    end: int,
) -> None:
    data = bytearray(order_bytes(Order(parts, moves, reads)))
    for place, byte in flips:
        data[place % len(data)] = byte
    bounded(bytes(data))
    bounded(bytes(data[: end % len(data)]))


numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.none()
nested = st.recursive(
    numbers | st.binary(max_size=40), lambda inner: st.lists(inner, max_size=3), max_leaves=6
)


@settings(max_examples=30)
@given(st.lists(nested, max_size=4))
def test_whatever_has_another_form_is_refused(wrong: list[object]) -> None:
    bounded(msgspec.msgpack.encode(wrong))
