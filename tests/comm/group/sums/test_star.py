"""A star of a hub and spokes: sums with the same bits everywhere, orders in turn, giving up, failing, and lies."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fakes.group.streams import PairStream, stream_pair

from shoal.comm.group.sums.frames import FrameKind, Header
from shoal.comm.group.sums.star import Hub, Spoke
from shoal.comm.group.sums.star_errors import Departed, GivenUp
from shoal.comm.group.sums.wire_types import WireType, decode, encode, wire_bytes

PATIENCE_S = 10.0
EPOCH = 7


class Star:
    """A hub and spokes, and the far ends' streams."""

    def __init__(self, spokes: int, wire: WireType = "f32", patience_s: float = PATIENCE_S) -> None:
        pairs = [stream_pair() for _ in range(spokes)]
        self.near: list[PairStream] = [one for one, _ in pairs]
        self.far: list[PairStream] = [other for _, other in pairs]
        self.hub = Hub(self.near, EPOCH, wire, patience_s)
        self.spokes = [Spoke(other, EPOCH, wire, patience_s) for other in self.far]

    def together(self, *acts: Callable[[], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(acts)) as threads:
            return [future.result(PATIENCE_S) for future in [threads.submit(act) for act in acts]]


def partials(
    ranks: int, shape: tuple[int, int], seed: int = 0
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    source = np.random.default_rng(seed)
    return [source.standard_normal(shape).astype(np.float32) for _ in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("wire", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(1, 64), (5, 33), (300, 96)])
def test_all_ranks_get_the_same_sum(ranks: int, wire: WireType, shape: tuple[int, int]) -> None:
    star = Star(ranks - 1, wire)
    parts = partials(ranks, shape)

    def hub() -> Any:
        star.hub.begin(b"order")
        sums = [star.hub.allreduce(parts[0]) for _ in range(3)]
        star.hub.end()
        return sums

    def spoke(rank: int) -> Any:
        assert star.spokes[rank - 1].next() == b"order"
        return [star.spokes[rank - 1].allreduce(parts[rank]) for _ in range(3)]

    first, *others = star.together(hub, *(lambda rank=rank: spoke(rank) for rank in range(1, ranks)))
    exact = np.sum(np.stack(parts).astype(np.float64), axis=0)
    bound = {"f32": 1e-6, "bf16": 2.0**-8 * 2, "int8": 1 / 127}[wire] * ranks * np.abs(np.stack(parts)).max()
    assert np.abs(first[0] - exact).max() <= bound
    for sums in others:
        assert [it.tobytes() for it in sums] == [it.tobytes() for it in first]
    if wire == "f32":  # in the order of ranks
        expected = parts[0].copy()
        for part in parts[1:]:
            expected += part
        assert first[0].tobytes() == expected.tobytes()


def test_bytes_are_dealt_to_each_rank_and_collected() -> None:
    """Of whatever lengths, and many one after the other."""
    star = Star(2, "int8")
    dealt = [np.arange(1000 * rank, dtype=np.uint16).view(np.uint8) for rank in (1, 300)]
    back = [np.zeros_like(part) for part in dealt]

    def hub() -> None:
        star.hub.begin(b"order")
        for _ in range(20):
            star.hub.deal(dealt)
        for _ in range(20):
            star.hub.collect(None, back)
        star.hub.end()

    def spoke(rank: int) -> None:
        star.spokes[rank].next()
        here = np.zeros_like(dealt[rank])
        for _ in range(20):
            star.spokes[rank].deal((), here)
        for _ in range(20):
            star.spokes[rank].collect(here)

    star.together(hub, lambda: spoke(0), lambda: spoke(1))
    assert all(np.array_equal(one, other) for one, other in zip(dealt, back, strict=True))


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_rank_that_brings_more_or_less_than_it_has_departs(wrong: int) -> None:
    star = Star(1)

    def hub() -> None:
        star.hub.begin(b"order")
        with pytest.raises(Departed, match="bytes"):
            star.hub.collect(None, [np.empty(100, np.uint8)])

    def spoke() -> None:
        star.spokes[0].next()
        star.spokes[0].collect(np.zeros(100 + wrong, np.uint8))

    star.together(hub, spoke)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_was_to_be_collected_may_be_given_up(ranks: int) -> None:
    """Though it is more than any partial so far, and is on its way already."""
    pairs = [stream_pair() for _ in range(ranks - 1)]
    hub = Hub([near for near, _ in pairs], EPOCH, patience_s=PATIENCE_S, most_collected=1 << 20)
    spokes = [Spoke(far, EPOCH, patience_s=PATIENCE_S, rank=rank) for rank, (_, far) in enumerate(pairs, 1)]
    sent = threading.Barrier(ranks)
    into = [np.zeros(1 << 20, np.uint8) for _ in spokes]

    def first() -> None:
        hub.begin(b"one")
        sent.wait(PATIENCE_S)
        hub.give_up()
        hub.begin(b"two")
        hub.collect(None, into)
        hub.end()

    def spoke(one: Spoke) -> None:
        assert one.next() == b"one"
        threading.Timer(0.05, sent.wait, (PATIENCE_S,)).start()
        with contextlib.suppress(GivenUp):
            one.collect(np.ones(1 << 20, np.uint8))
        assert one.next() == b"two"
        one.collect(np.full(1 << 20, 2, np.uint8))

    with ThreadPoolExecutor(ranks) as threads:
        acts = [threads.submit(first), *(threads.submit(spoke, one) for one in spokes)]
        for act in acts:
            act.result(PATIENCE_S)
    assert all((part == 2).all() for part in into)


def test_rows_of_rank_0_arrive_exactly_whatever_the_wire_rounds() -> None:
    star = Star(2, "int8")
    (rows,) = partials(1, (3, 40))

    def hub() -> Any:
        star.hub.begin(b"x")
        return star.hub.broadcast(rows, rows.shape)

    def spoke(one: Spoke) -> Any:
        one.next()
        return one.broadcast(None, rows.shape)

    found = star.together(hub, *(lambda one=one: spoke(one) for one in star.spokes))
    assert all(it.tobytes() == rows.tobytes() for it in found)


def test_columns_are_put_side_by_side_in_the_order_of_ranks() -> None:
    star = Star(2)
    columns = [part[:, : 3 + rank] for rank, part in enumerate(partials(3, (4, 5)))]

    def hub() -> Any:
        star.hub.begin(b"x")
        return star.hub.gather(np.ascontiguousarray(columns[0]))

    def spoke(rank: int) -> Any:
        star.spokes[rank - 1].next()
        return star.spokes[rank - 1].gather(columns[rank])

    whole, *others = star.together(hub, lambda: spoke(1), lambda: spoke(2))
    assert np.array_equal(whole, np.concatenate(columns, axis=1))
    assert all(it.shape == (4, 0) for it in others)


@pytest.mark.parametrize(("own", "brought", "due"), [(5, 4, 3), (5, 0, 3), (5, 2**10, 3), (1, 3, 1)])
def test_no_number_of_columns_is_believed(own: int, brought: int, due: int) -> None:
    star = Star(1)
    hub = Hub(star.near, EPOCH, columns=[3])

    def gather() -> Any:
        hub.begin(b"x")
        with pytest.raises(Departed, match=f"{brought} columns: {due} were to come"):
            hub.gather(np.zeros((2, own), np.float32))
        hub.give_up()

    def spoke() -> Any:
        star.spokes[0].next()
        with pytest.raises(GivenUp):  # noqa: PT012
            star.spokes[0].gather(np.zeros((2, brought), np.float32))
            star.spokes[0].broadcast(None, (1, 1))

    star.together(gather, spoke)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_order_is_given_up_in_the_middle_and_the_next_is_sound(before: int) -> None:
    """Parts of the old order that are still on their way are passed over."""
    star = Star(2)
    parts = partials(3, (2, 16))

    def hub() -> Any:
        star.hub.begin(b"first")
        for _ in range(before):
            star.hub.allreduce(parts[0])
        star.hub.give_up()
        star.hub.give_up()
        star.hub.begin(b"second")
        total = star.hub.allreduce(parts[0])
        star.hub.end()
        star.hub.give_up()  # nothing is under way
        return total

    def spoke(rank: int) -> Any:
        one = star.spokes[rank - 1]
        assert one.next() == b"first"
        with pytest.raises(GivenUp):  # noqa: PT012
            while True:
                one.allreduce(parts[rank])
        assert one.next() == b"second"
        return one.allreduce(parts[rank])

    first, *others = star.together(hub, lambda: spoke(1), lambda: spoke(2))
    assert all(it.tobytes() == first.tobytes() for it in others)


def test_giving_up_after_a_spoke_is_done_is_ignored_by_it() -> None:
    star = Star(1)
    parts = partials(2, (1, 8))

    def hub() -> None:
        star.hub.begin(b"first")
        star.hub.allreduce(parts[0])
        star.hub.give_up()
        star.hub.begin(b"second")

    def spoke() -> None:
        one = star.spokes[0]
        one.next()
        one.allreduce(parts[1])
        assert one.next() == b"second"

    star.together(hub, spoke)


def test_a_spoke_that_fails_says_why() -> None:
    star = Star(2)
    parts = partials(3, (1, 8))

    def hub() -> None:
        star.hub.begin(b"x")
        with pytest.raises(Departed, match="rank 2: the disk is on fire") as caught:
            star.hub.allreduce(parts[0])
        assert (caught.value.rank, caught.value.failed) == (2, True)
        star.hub.give_up()

    def sound() -> None:
        star.spokes[0].next()
        with pytest.raises(GivenUp):
            star.spokes[0].allreduce(parts[1])

    def failing() -> None:
        star.spokes[1].next()
        star.spokes[1].fail("the disk is on fire")

    star.together(hub, sound, failing)


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_spoke_that_is_gone_is_named(moment: str) -> None:
    star = Star(2)
    parts = partials(3, (1, 8))
    if moment == "before":
        star.far[1].close()

    def hub() -> None:
        with pytest.raises(Departed, match="rank 2"):  # noqa: PT012
            star.hub.begin(b"x")
            star.hub.allreduce(parts[0])
        star.hub.give_up()

    def sound() -> None:
        star.spokes[0].next()
        with pytest.raises(GivenUp):
            star.spokes[0].allreduce(parts[1])

    threading.Timer(0.1, star.far[1].close).start()
    star.together(hub, sound)


def test_whoever_says_nothing_is_waited_for_only_so_long() -> None:
    star = Star(1, patience_s=0.1)
    star.hub.begin(b"x")
    with pytest.raises(Departed):
        star.hub.allreduce(np.ones((1, 4), np.float32))
    with pytest.raises(Departed):
        star.spokes[0].next() and star.spokes[0].allreduce(np.ones((1, 4), np.float32))


LIES = {
    "another epoch": Header(FrameKind.SUM, EPOCH + 1, 1, 0, 32),
    "another order": Header(FrameKind.SUM, EPOCH, 2, 0, 32),
    "another place": Header(FrameKind.SUM, EPOCH, 1, 1, 32),
    "too large": Header(FrameKind.SUM, EPOCH, 1, 0, 1 << 31),
    "another kind": Header(FrameKind.ROWS, EPOCH, 1, 0, 32),
    "no kind": Header(99, EPOCH, 1, 0, 32),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_spoke_believes_no_size_and_no_epoch(lie: str) -> None:
    near, far = stream_pair()
    spoke = Spoke(far, EPOCH, patience_s=1.0)
    near.send(Header(FrameKind.ORDER, EPOCH, 1, 0, 1).packed(), b"x")
    spoke.next()
    near.send(LIES[lie].packed(), bytes(32))
    with pytest.raises(Departed):
        spoke.allreduce(np.ones((1, 8), np.float32))


@pytest.mark.parametrize(
    "header",
    [
        Header(FrameKind.ORDER, EPOCH, 1, 0, 1 << 30),
        Header(FrameKind.ORDER, EPOCH - 1, 1, 0, 1),
        Header(FrameKind.SUM, EPOCH, 0, 0, 1),
        Header(FrameKind.GIVE_UP, EPOCH, 0, 0, 4),
    ],
)
def test_a_spoke_takes_orders_only(header: Header) -> None:
    near, far = stream_pair()
    near.send(header.packed(), b"x" * 8)
    with pytest.raises(Departed):
        Spoke(far, EPOCH, patience_s=1.0).next()


@pytest.mark.parametrize(
    "header",
    [
        Header(FrameKind.PART, EPOCH, 1, 0, 1 << 31),
        Header(FrameKind.PART, EPOCH, 1, 5, 32),
        Header(
            FrameKind.PART, EPOCH, 9, 0, 1 << 20
        ),  # of no order that was: larger than anything that was to come
        Header(FrameKind.FAILED, EPOCH, 1, 0, 1 << 31),
        Header(0, 0, 0, 0, 0xFFFFFFFF),
    ],
)
def test_a_hub_believes_no_size(header: Header) -> None:
    star = Star(1, patience_s=0.5)
    star.hub.begin(b"x")
    star.far[0].send(header.packed(), bytes(32))
    with pytest.raises(Departed):
        star.hub.allreduce(np.ones((1, 8), np.float32))


@pytest.mark.parametrize("kind", [0, FrameKind.ORDER, FrameKind.SUM, FrameKind.GIVE_UP, 99])
def test_a_hub_takes_no_other_frame_from_a_spoke(kind: int) -> None:
    star = Star(1)
    star.hub.begin(b"x")
    star.far[0].send(Header(kind, EPOCH, 1, 0, 0).packed())
    with pytest.raises(Departed, match="a part was to come"):
        star.hub.allreduce(np.ones((1, 8), np.float32))


def test_a_hub_takes_no_frame_of_another_epoch() -> None:
    star = Star(1)
    star.hub.begin(b"x")
    star.far[0].send(Header(FrameKind.PART, EPOCH + 1, 1, 0, 32).packed(), bytes(32))
    with pytest.raises(Departed, match="epoch"):
        star.hub.allreduce(np.ones((1, 8), np.float32))


def test_a_spoke_that_only_sends_parts_of_older_orders_is_given_up() -> None:
    star = Star(1, patience_s=0.3)
    star.hub.begin(b"x")
    ended = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError):
            while not ended.is_set():
                star.far[0].send(Header(FrameKind.PART, EPOCH, 0, 0, 0).packed())

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        with pytest.raises(Departed, match="older orders"):
            star.hub.allreduce(np.ones((1, 8), np.float32))
    finally:
        ended.set()
        star.near[0].close()
        flooding.join()


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 31), (3, 32), (2, 65)])
def test_wire_types_keep_their_bounds(kind: WireType, shape: tuple[int, int]) -> None:
    (values,) = partials(1, shape, seed=shape[1])
    values *= np.float32(10.0) ** np.arange(shape[1], dtype=np.float32).clip(0, 6)
    data = np.empty(wire_bytes(kind, shape), np.uint8)
    encode(kind, values, data)
    back = np.empty(shape, np.float32)
    decode(kind, data, back)
    if kind == "f32":
        assert back.tobytes() == values.tobytes()
    elif kind == "bf16":
        assert (np.abs(back - values) <= np.abs(values) * 2.0**-8).all()
    else:
        for start in range(0, shape[1], 32):
            part = slice(start, start + 32)
            bound = np.abs(values[:, part]).max(axis=1, keepdims=True) / 254 * (1 + 1e-5)
            assert (np.abs(back[:, part] - values[:, part]) <= bound).all()


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8"])
def test_nan_and_infinity_do_not_become_numbers(kind: WireType) -> None:
    values = np.array([[np.nan, 1.0, np.inf, -np.inf]], np.float32)
    data = np.empty(wire_bytes(kind, values.shape), np.uint8)
    encode(kind, values, data)
    back = np.empty(values.shape, np.float32)
    decode(kind, data, back)
    assert np.isnan(back[0, 0])
    assert not np.isfinite(back[0, 2:]).any()
