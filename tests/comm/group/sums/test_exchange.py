"""Sums by exchange and in slices: the same bits on all ranks, whatever is split, large, given up, lost or made up."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.group.circles import CIRCLE_EPOCH, Circle
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.group.channel import channel_pair
from shoal.comm.group.errors import ChannelError
from shoal.comm.group.sums import one_swap, swapping
from shoal.comm.group.sums.frames import HEADER, FrameKind, Header
from shoal.comm.group.sums.manners import Manner, Manners, SumTopology
from shoal.comm.group.sums.star import Hub, Spoke
from shoal.comm.group.sums.star_errors import Departed, GivenUp
from shoal.comm.group.sums.wire_types import WireType, decode, encode, wire_bytes

F32 = npt.NDArray[np.float32]
TOPOLOGIES: list[SumTopology] = ["star", "exchange", "sliced"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_swap, "SWAP_LOOK_S", 0.05)
    monkeypatch.setattr(swapping, "TELL_S", 1.0)


def partials(ranks: int, shape: tuple[int, int], seed: int = 0) -> list[F32]:
    source = np.random.default_rng(seed)
    return [source.standard_normal(shape).astype(np.float32) for _ in range(ranks)]


def sums(circle: Circle, parts: list[F32], times: int = 1) -> list[list[F32]]:
    """Of each rank."""

    def hub() -> list[F32]:
        circle.hub.begin(b"order")
        found = [circle.hub.allreduce(parts[0]) for _ in range(times)]
        circle.hub.end()
        return found

    def spoke(rank: int) -> list[F32]:
        assert circle.spokes[rank - 1].next() == b"order"
        return [circle.spokes[rank - 1].allreduce(parts[rank]) for _ in range(times)]

    return circle.each([hub, *(lambda rank=rank: spoke(rank) for rank in range(1, len(parts)))])


def on_the_wire(wire: WireType, values: F32) -> F32:
    data = np.empty(wire_bytes(wire, values.shape), np.uint8)
    encode(wire, values, data)
    back = np.empty(values.shape, np.float32)
    decode(wire, data, back)
    return back


def in_rank_order(topology: SumTopology, wire: WireType, parts: list[F32]) -> F32:
    """What the sum must be, bit for bit."""
    if topology == "exchange":
        rounded = [on_the_wire(wire, part) for part in parts]
        total = rounded[0].copy()
        for part in rounded[1:]:
            total += part
        return total
    total = np.empty(parts[0].shape, np.float32)
    ranks, rows = len(parts), len(parts[0])
    owners = [(0, slice(None))]
    if topology == "sliced":
        owners = [(it, slice(rows * it // ranks, rows * (it + 1) // ranks)) for it in range(ranks)]
    for owner, some in owners:
        if not len(total[some]):
            continue
        first, *others = (
            part[some] if rank == owner else on_the_wire(wire, part[some]) for rank, part in enumerate(parts)
        )
        added = first.copy()
        for part in others:
            added += part
        total[some] = on_the_wire(wire, added)
    return total


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("wire", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 33), (40, 96)])
def test_all_ranks_have_the_bits_of_the_sum_in_rank_order(
    topology: SumTopology, wire: WireType, ranks: int, shape: tuple[int, int]
) -> None:
    """Also with fewer rows than ranks. Errors stay below what each rounding may do to each part, and to the sum."""
    circle = Circle(ranks, topology, wire)
    parts = partials(ranks, shape, seed=ranks)
    due = in_rank_order(topology, wire, parts)
    for found in sums(circle, parts, times=3):
        assert [it.tobytes() for it in found] == [due.tobytes()] * 3
    exact = np.sum(np.stack(parts).astype(np.float64), axis=0)
    largest = max(np.abs(np.stack(parts)).max(), np.abs(exact).max())
    bound = {"f32": 1e-6, "bf16": 2.0**-8, "int8": 1 / 254}[wire] * (ranks + 1) * largest
    assert np.abs(due - exact).max() <= bound


def test_narrow_sums_are_not_rounded() -> None:
    """Squares of norms decide about whole rows."""
    circle = Circle(3, "exchange", "int8")
    parts = partials(3, (4, 2))
    due = parts[0] + parts[1] + parts[2]
    assert [found[0].tobytes() for found in sums(circle, parts)] == [due.tobytes()] * 3


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_large_parts_pass_small_buffers(topology: SumTopology, ranks: int) -> None:
    """All send 8 MB at once, and no stream takes more than a little of it before somebody reads."""
    circle = Circle(ranks, topology, buffer_bytes=128 << 10)
    parts = partials(ranks, (512, 4096))
    due = in_rank_order(topology, "f32", parts)
    assert [found[0].tobytes() for found in sums(circle, parts)] == [due.tobytes()] * ranks


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(2, 4),
    topology=st.sampled_from(TOPOLOGIES),
    wire=st.sampled_from(["f32", "bf16", "int8"]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 130),
    seed=st.integers(0, 1 << 16),
)
def test_frames_may_be_split_anywhere(
    ranks: int, topology: SumTopology, wire: WireType, rows: int, columns: int, seed: int
) -> None:
    source = random.Random(seed)
    circle = Circle(ranks, topology, wire, most=lambda: source.choice([1, 3, 19, 20, 21, 100, 4096]))
    parts = partials(ranks, (rows, columns), seed)
    narrow = "f32" if columns < 32 else wire
    due = in_rank_order(topology, narrow, parts).tobytes()
    assert [[it.tobytes() for it in found] for found in sums(circle, parts, 2)] == [[due] * 2] * ranks


def test_few_and_many_rows_may_be_added_in_other_ways() -> None:
    circle = Circle(3)
    circle.hub.decide(Manners(Manner("exchange", "f32"), Manner("sliced", "bf16"), 8))
    for rows, topology, wire in ((7, "exchange", "f32"), (8, "sliced", "bf16")):
        parts = partials(3, (rows, 64))
        due = in_rank_order(topology, wire, parts)
        assert [found[0].tobytes() for found in sums(circle, parts)] == [due.tobytes()] * 3


def test_ranks_that_are_apart_hear_of_giving_up() -> None:
    """Rank 1 waits for rank 2, which has not sent its part, and rank 0 has gone on, or has not."""
    for ahead in (0, 1):
        circle = Circle(3)
        parts = partials(3, (2, 64))

        def hub(circle: Circle = circle, ahead: int = ahead, parts: list[F32] = parts) -> Any:
            circle.hub.begin(b"first")
            circle.hub.allreduce(parts[0])
            if ahead:  # as if it had got everything already
                part = parts[0].reshape(-1).view(np.uint8)
                for rank in (1, 2):
                    circle.hub._swapper.links[rank].send(FrameKind.PART, 1, 1, part)
                    circle.hub._swapper.links[rank].send(FrameKind.PART, 1, 2, part)
            circle.hub.give_up()
            circle.hub.begin(b"second")
            total = circle.hub.allreduce(parts[0])
            circle.hub.end()
            return total

        def waiting(circle: Circle = circle, parts: list[F32] = parts) -> Any:
            one = circle.spokes[0]
            one.next()
            with pytest.raises(GivenUp):  # noqa: PT012
                while True:
                    one.allreduce(parts[1])
            assert one.next() == b"second"
            return one.allreduce(parts[1])

        def absent(circle: Circle = circle, parts: list[F32] = parts) -> Any:
            two = circle.spokes[1]
            two.next()
            with pytest.raises(GivenUp):  # noqa: PT012
                while True:
                    two.allreduce(parts[2])
                    time.sleep(0.1)
            assert two.next() == b"second"
            return two.allreduce(parts[2])

        found = circle.each([hub, waiting, absent])
        assert [it.tobytes() for it in found] == [in_rank_order("exchange", "f32", parts).tobytes()] * 3


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.integers(2, 4),
    topology=st.sampled_from(TOPOLOGIES),
    before=st.integers(0, 3),
    large=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_an_order_may_be_given_up_anywhere(
    ranks: int, topology: SumTopology, before: int, large: bool, seed: int
) -> None:
    """Also with parts half sent; the next orders are sound."""
    source = random.Random(seed)
    shape = (16, 1024) if large else (3, 40)
    circle = Circle(ranks, topology, buffer_bytes=4096 if large else 0)
    parts = partials(ranks, shape, seed)
    due = in_rank_order(topology, "f32", parts).tobytes()

    def hub() -> Any:
        for _ in range(3):
            circle.hub.begin(b"first")
            for _ in range(before):
                circle.hub.allreduce(parts[0])
            if source.random() < 0.5:
                time.sleep(source.random() / 200)
            circle.hub.give_up()
        circle.hub.begin(b"last")
        total = circle.hub.allreduce(parts[0])
        circle.hub.end()
        return total.tobytes()

    def spoke(rank: int) -> Any:
        one = circle.spokes[rank - 1]
        while one.next() != b"last":
            try:
                while True:
                    one.allreduce(parts[rank])
                    if source.random() < 0.2:
                        time.sleep(source.random() / 200)
            except GivenUp:
                continue
        return one.allreduce(parts[rank]).tobytes()

    found = circle.each([hub, *(lambda rank=rank: spoke(rank) for rank in range(1, ranks))])
    assert found == [due] * ranks


def follow(circle: Circle, rank: int, part: F32) -> Any:
    """As a follower does: a failure of others ends it when the hub says so, or goes."""
    one = circle.spokes[rank - 1]
    try:
        while True:
            one.next()
            try:
                while True:
                    one.allreduce(part)
            except GivenUp:
                continue
    except Departed as error:
        return error


def lead(circle: Circle, part: F32) -> Any:
    """As a leader does: it gives up, and the group ends."""
    try:
        circle.hub.begin(b"x")
        while True:
            circle.hub.allreduce(part)
    except Departed as error:
        circle.hub.give_up()
        circle.close()
        return error


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("large", [False, True])
def test_the_loss_of_any_rank_ends_all_soon(topology: SumTopology, lost: int, large: bool) -> None:
    circle = Circle(4, topology, buffer_bytes=4096 if large else 0)
    parts = partials(4, (64, 1024) if large else (2, 40))
    threading.Timer(0.05, circle.close, args=(lost,)).start()
    found = circle.each(
        [
            lambda: lead(circle, parts[0]),
            *(lambda rank=rank: follow(circle, rank, parts[rank]) for rank in (1, 2, 3)),
        ],
        timeout_s=5.0,
    )
    assert all(isinstance(it, Departed) for it in found)
    if lost:
        assert found[0].rank == lost


@pytest.mark.parametrize("topology", ["exchange", "sliced"])
def test_two_ranks_that_lose_each_other_are_said(topology: SumTopology) -> None:
    """Both are well, and so is what leads to rank 0."""
    circle = Circle(4, topology)
    parts = partials(4, (8, 40))
    threading.Timer(0.05, circle.streams[1, 3].end).start()
    found = circle.each(
        [
            lambda: lead(circle, parts[0]),
            *(lambda rank=rank: follow(circle, rank, parts[rank]) for rank in (1, 2, 3)),
        ],
        timeout_s=5.0,
    )
    assert {found[0].rank, found[0].unheard_by} == {1, 3}


def test_a_stream_that_is_silent_while_rank_0_goes_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a cable between two workers were cut: nothing ends, nothing comes."""
    monkeypatch.setattr(one_swap, "STALLED_S", 0.3)
    circle = Circle(3)
    parts = partials(3, (2, 64))
    one = circle.spokes[0]
    silent, _ = channel_pair()
    assert one._fellows
    one._fellows[2] = silent
    found = circle.each(
        [
            lambda: lead(circle, parts[0]),
            lambda: follow(circle, 1, parts[1]),
            lambda: follow(circle, 2, parts[2]),
        ],
        timeout_s=5.0,
    )
    assert isinstance(found[0], Departed)
    assert {found[0].rank, found[0].unheard_by} == {1, 2}


def test_a_rank_that_fails_tells_all() -> None:
    circle = Circle(3)
    parts = partials(3, (2, 64))

    def failing() -> None:
        two = circle.spokes[1]
        two.next()
        two.allreduce(parts[2])
        two.fail("the disk is on fire")

    found = circle.each([lambda: lead(circle, parts[0]), lambda: follow(circle, 1, parts[1]), failing], 5.0)
    assert (found[0].rank, found[0].failed) == (2, True)
    assert found[0].reason == "the disk is on fire"


def test_streams_to_all_must_be_there() -> None:
    circle = Circle(3, "star")
    circle.spokes[0]._fellows = {}
    circle.hub.decide(Manners(Manner("exchange")))
    with pytest.raises(Departed, match="rank 2"):
        circle.spokes[0].next()


@pytest.mark.parametrize("data", [b"", bytes(8), b"\x09" * 8, bytes(7), b"\x00\x00\x03\x00" + bytes(4)])
def test_manners_that_are_none_are_refused(data: bytes) -> None:
    if data == bytes(8):
        assert Manners.of_bytes(data) == Manners(Manner(), Manner(), 0)
        return
    with pytest.raises(ChannelError):
        Manners.of_bytes(data)


LIES: dict[str, Callable[[Circle], bytes]] = {
    "another epoch": lambda _: HEADER.pack(FrameKind.PART, CIRCLE_EPOCH + 1, 1, 0, 512),
    "another place": lambda _: HEADER.pack(FrameKind.PART, CIRCLE_EPOCH, 1, 1, 512),
    "too large": lambda _: HEADER.pack(FrameKind.PART, CIRCLE_EPOCH, 1, 0, 1 << 31),
    "an old one, too large": lambda _: HEADER.pack(FrameKind.PART, CIRCLE_EPOCH, 0, 0, 1 << 31),
    "an order": lambda _: HEADER.pack(FrameKind.ORDER, CIRCLE_EPOCH, 1, 0, 1),
    "giving up": lambda _: HEADER.pack(FrameKind.GIVE_UP, CIRCLE_EPOCH, 1, 0, 0),
    "a long reason": lambda _: HEADER.pack(FrameKind.FAILED, CIRCLE_EPOCH, 1, 0, 1 << 20),
    "another rank's loss": lambda _: HEADER.pack(FrameKind.CUT_OFF, CIRCLE_EPOCH, 1, 1, 0),
    "noise": lambda _: random.Random(3).randbytes(400),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_fellow_is_believed_nothing(lie: str) -> None:
    """Rank 2 lies to rank 1, which tells rank 0 and gets no further."""
    circle = Circle(3)
    parts = partials(3, (2, 64))

    def liar() -> None:
        two = circle.spokes[1]
        two.next()
        circle.streams[2, 1].send(LIES[lie](circle))
        two._swapper.links[0].send(FrameKind.PART, 1, 0, parts[2].reshape(-1).view(np.uint8))

    found = circle.each([lambda: lead(circle, parts[0]), lambda: follow(circle, 1, parts[1]), liar], 5.0)
    assert (found[0].rank, found[0].unheard_by) == (2, 1)
    assert found[1].rank == 0


@pytest.mark.parametrize("seed", range(30))
def test_noise_between_ranks_ends_in_a_loss(seed: int) -> None:
    """Bytes of a frame changed anywhere: a wrong sum may come of it, never a hang or another error."""
    source = random.Random(seed)
    circle = Circle(3, source.choice(["exchange", "sliced"]))
    parts = partials(3, (4, 40))
    target = circle.streams[2, source.choice([0, 1])]
    sound = target.send_some

    def noisy(data: memoryview) -> int:
        if data and source.random() < 0.3:
            changed = bytearray(data)
            changed[source.randrange(min(len(changed), 24))] = source.randrange(256)
            return sound(memoryview(changed))
        return sound(data)

    target.send_some = noisy  # type: ignore[method-assign]
    threading.Timer(0.3, circle.close).start()
    found = circle.each(
        [
            lambda: lead(circle, parts[0]),
            *(lambda rank=rank: follow(circle, rank, parts[rank]) for rank in (1, 2)),
        ],
        timeout_s=5.0,
    )
    assert all(isinstance(it, Departed) for it in found)


def test_a_hub_may_have_sent_the_next_order_long_ago() -> None:
    """Rank 1 still waits for rank 2's last part of an order that rank 0 has ended."""
    circle = Circle(3)
    parts = partials(3, (2, 64))
    due = in_rank_order("exchange", "f32", parts).tobytes()

    def hub() -> Any:
        for order in (b"first", b"second"):
            circle.hub.begin(order)
            circle.hub.broadcast(parts[0], parts[0].shape)
            total = circle.hub.allreduce(parts[0])
            circle.hub.end()
        return total.tobytes()

    def late() -> Any:
        one = circle.spokes[0]
        found = b""
        for _ in range(2):
            one.next()
            one.broadcast(None, parts[0].shape)
            found = one.allreduce(parts[1]).tobytes()
        return found

    def slow_to_one() -> Any:
        """Its part reaches rank 0 well before rank 1."""
        two = circle.spokes[1]
        assert two.next() == b"first"
        two.broadcast(None, parts[0].shape)
        part = parts[2].reshape(-1).view(np.uint8)
        two._swapper.links[0].send(FrameKind.PART, 1, 1, part)
        time.sleep(0.15)
        two._swapper.swap(
            1, 1, {1: (FrameKind.PART, part)}, {it: (FrameKind.PART, part.copy()) for it in (0, 1)}
        )
        return _second(two, parts)

    assert circle.each([hub, late, slow_to_one]) == [due] * 3


def _second(two: Spoke, parts: list[F32]) -> bytes:
    assert two.next() == b"second"
    two.broadcast(None, parts[0].shape)
    return two.allreduce(parts[2]).tobytes()


def test_channels_carry_sums(tmp_path: Any) -> None:
    """The class that carries them between machines, at a pair of sockets."""
    ends = channel_pair()
    hub, spoke = Hub([ends[0]], CIRCLE_EPOCH), Spoke(ends[1], CIRCLE_EPOCH)
    hub.decide(Manners(Manner("exchange"), Manner("sliced"), 2))
    for shape in ((1, 64), (300, 4096)):
        one, other = partials(2, shape)
        hub.begin(b"x")
        found: list[bytes] = []

        def far(other: F32 = other, found: list[bytes] = found) -> None:
            spoke.next()
            found.append(spoke.allreduce(other).tobytes())

        thread = threading.Thread(target=far)
        thread.start()
        assert hub.allreduce(one).tobytes() == (one + other).tobytes()
        thread.join(5)
        hub.end()
        assert found == [(one + other).tobytes()]
    for end in ends:
        end.close()
    with pytest.raises(Departed):
        hub.begin(b"y")
    assert Header.of(HEADER.pack(1, 2, 3, 4, 5)).nbytes == 5
