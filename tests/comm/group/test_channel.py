"""Channels, in the clear and over TLS: messages, raw bytes, times, ends."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from fakes.group.nodes import joined
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.group.channel import JOIN_BYTES, SEND_S, Channel, channel_pair
from shoal.comm.group.errors import ChannelError, ChannelTimeout
from shoal.comm.group.group_protocol import OURS, Speaks
from shoal.comm.group.shared_stream import can_share
from shoal.comm.group.streams import SEAL_BYTES, _address


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    number: int


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    text: str
    data: bytes = b""


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory):
    with joined(tmp_path_factory.mktemp("nodes")) as ends:
        yield ends


@pytest.fixture(params=["clear", "tls", "memory"])
def ends(request, tmp_path):
    """Two ends that the test may break."""
    if request.param == "memory" and not can_share():
        pytest.skip("the native part is not there")
    with (
        twin()
        if request.param == "clear"
        else joined(tmp_path, OURS if request.param == "memory" else Speaks()) as found
    ):
        yield found


@contextmanager
def twin():
    one, other = channel_pair()
    with one, other:
        yield one, other


def fill(channel):
    """Send what nobody reads, until the channel is closed."""
    with pytest.raises(ChannelError):
        channel.send(bytes(64 << 20))


def test_a_last_word_is_said_soon_or_not_at_all(ends):
    one, other = ends
    one.send_last(Ping(1), 1.0)
    assert other.receive_message(Ping, 1.0) == Ping(1)

    filling = threading.Thread(target=fill, args=(one,))
    filling.start()
    time.sleep(0.2)
    began_s = time.monotonic()
    one.send_last(Ping(2), 0.1)
    one.close()
    assert time.monotonic() - began_s < SEND_S / 2
    one.send_last(Ping(3), 0.1)  # too late
    filling.join(5)
    assert not filling.is_alive()


def test_a_last_word_that_does_not_go_closes_the_channel(ends):
    one, _ = ends
    while one.send_some(memoryview(bytes(1 << 20))):
        pass
    assert not one.closed
    one.send_last(Ping(1), 0.1)
    assert one.closed


def test_messages_go_both_ways(ends):
    one, other = ends
    for number in range(3):
        one.send_message(Ping(number))
    other.send_message(Pong("héllo", b"\x00\xff"))
    assert [other.receive_message(Ping | Pong, 5) for _ in range(3)] == [Ping(0), Ping(1), Ping(2)]
    assert one.receive_message(Ping | Pong, 5) == Pong("héllo", b"\x00\xff")
    assert one.purpose == other.purpose == "data"
    assert one.peer != other.peer


SIZES = [
    0,
    1,
    16383,
    16384,
    16385,
    JOIN_BYTES - 1,
    JOIN_BYTES,
    JOIN_BYTES + 1,
    SEAL_BYTES + 1,
    3 * SEAL_BYTES + 7,
]


@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_any_size(ends, size):
    one, other = ends
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    sender = threading.Thread(target=one.send, args=(b"head", data, b"tail"))
    sender.start()
    received = other.receive_exactly(size + 8, 10)
    sender.join(10)
    assert received == b"head" + data.tobytes() + b"tail"


def test_arrays_of_any_type(ends):
    one, other = ends
    arrays = [np.arange(6, dtype=kind).reshape(2, 3) for kind in ("f4", "f2", "u2", "i1", "i8")]
    one.send(*arrays, np.zeros((0, 3), "f4"))
    for array in arrays:
        view = np.empty_like(array)
        other.receive_into(view, 5)
        assert np.array_equal(view, array)


@settings(max_examples=60)
@given(
    pieces=st.lists(st.binary(max_size=70_000), max_size=5), cuts=st.lists(st.integers(1, 80_000), max_size=6)
)
def test_the_bytes_are_those_that_were_sent_however_they_are_cut(over_tls, pieces, cuts):
    whole = b"".join(pieces)
    for (one, other), close in (((channel_pair()), True), (over_tls, False)):
        sender = threading.Thread(target=one.send, args=pieces)
        sender.start()
        received, left = b"", len(whole)
        for cut in [*cuts, len(whole)]:
            received += other.receive_exactly(min(cut, left), 10)
            left = len(whole) - len(received)
        sender.join(10)
        assert received == whole
        assert not other.buffered
        if close:
            one.close()
            other.close()


def test_one_thread_may_send_while_another_receives_and_several_send(ends):
    """Far more than buffers hold, so each direction has to wait for the other side all the time."""
    one, other = ends
    failed: list[BaseException] = []
    body = bytes(200_000)

    def run(act) -> threading.Thread:
        def guarded() -> None:
            try:
                act()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread

    def send(channel: Channel, start: int) -> None:
        for number in range(start, start + 20):
            channel.send_message(Pong(str(number), body))

    def receive(channel: Channel) -> None:
        got = {channel.receive_message(Pong, 10).text for _ in range(40)}
        assert got == {str(number) for number in range(40)}

    threads = [run(lambda c=c, s=s: send(c, s)) for c in ends for s in (0, 20)]
    threads += [run(lambda c=c: receive(c)) for c in ends]
    for thread in threads:
        thread.join(20)
    assert failed == []
    assert not one.closed
    assert not other.closed


def test_a_time_in_which_nothing_comes_costs_nothing(ends):
    one, other = ends
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(ChannelTimeout, match="sends nothing"):
            other.receive_exactly(1, 0.05)
        with pytest.raises(ChannelTimeout):
            other.receive_message(Ping, 0.05)
        assert time.monotonic() - started > 0.08
        with pytest.raises(ChannelTimeout):
            other.receive_message(Ping, 0)
    one.send_message(Ping(1))
    assert other.receive_message(Ping, 5) == Ping(1)


def test_half_of_what_was_awaited_closes_the_channel(ends):
    one, other = ends
    one.send(b"half")
    with pytest.raises(ChannelTimeout):
        other.receive_exactly(8, 0.05)
    assert other.closed
    with pytest.raises(ChannelError, match="closed here"):
        other.receive_exactly(4, 1)


def test_half_a_message_closes_the_channel(ends):
    one, other = ends
    one.send(b"\x09\x00\x00\x00half")
    with pytest.raises(ChannelTimeout):
        other.receive_message(Ping, 0.05, rest_s=0.05)
    assert other.closed


def test_a_message_that_has_begun_may_take_longer(ends):
    one, other = ends
    body = msgspec.msgpack.encode(Ping(7))
    one.send(len(body).to_bytes(4, "little"), body[:2])
    later = threading.Timer(0.15, one.send, args=(body[2:],))
    later.start()
    assert other.receive_message(Ping, 0.05) == Ping(7)


def test_who_takes_nothing_ends_the_senders_wait(ends):
    one, other = ends
    with pytest.raises(ChannelTimeout, match="takes no bytes"):
        one.send(bytes(64 << 20), timeout_s=0.2)
    assert one.closed
    assert not other.closed


def test_the_other_side_hears_of_a_close(ends):
    one, other = ends
    one.send(b"last")
    one.close()
    one.close()
    assert other.receive_exactly(4, 5) == b"last"
    with pytest.raises(ChannelError, match="other side closed") as caught:
        other.receive_exactly(1, 5)
    assert not isinstance(caught.value, ChannelTimeout)
    with pytest.raises(ChannelError):
        one.send(b"x")


@pytest.mark.parametrize("act", ["receive", "send"])
def test_a_close_wakes_who_waits(ends, act):
    one, _ = ends
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            if act == "receive":
                one.receive_exactly(1, 30)
            else:
                one.send(bytes(64 << 20), timeout_s=30)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    started = time.monotonic()
    one.close()
    thread.join(5)
    assert time.monotonic() - started < 2
    assert type(caught[0]) is ChannelError


def test_a_poller_sees_what_came(ends):
    one, other = ends
    assert select.select([other], [], [], 0)[0] == []
    one.send(b"abc")
    assert select.select([other], [], [], 5)[0] == [other]
    other.receive_exactly(1, 5)
    assert other.buffered or select.select([other], [], [], 0)[0]
    other.receive_exactly(2, 5)
    assert not other.buffered


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        (b"\xff\xff\xff\xff", "4294967295 bytes: must be at most 1048576"),
        (framed(b""), "not of this protocol"),
        (framed(b"\xc1"), "not of this protocol"),
        (framed(b"\x81\xa4type\xa4nope"), "not of this protocol"),
        (framed(b"\x82\xa4type\xa4ping\xa6number\xa1x"), "not of this protocol"),
        (framed(b"\x82\xa4type\xa4pong\xa4text\xa1\xff"), "not of this protocol"),
        (framed(b"\x91" * 100_000), "not of this protocol"),
        (framed(b"\x83\xa4type\xa4ping\xa6number\x01\xa1x" + b"\x91" * 100_000), "not of this protocol"),
    ],
)
def test_what_is_no_message_closes_the_channel(ends, frame, problem):
    one, other = ends
    one.send(frame)
    with pytest.raises(ChannelError, match=problem):
        other.receive_message(Ping | Pong, 5)
    assert other.closed


def test_who_sends_while_another_thread_cannot_waits_no_longer_than_he_says(ends):
    """Nothing of his has gone, so the channel is as it was."""
    one, other = ends
    body = bytes(12 << 20)  # more than buffers hold
    sender = threading.Thread(target=one.send, args=[body])
    sender.start()
    while not one._sending.locked():
        time.sleep(0.001)
    began_s = time.monotonic()
    for timeout_s in (0.1, 0.0, -1.0):
        with pytest.raises(ChannelTimeout):
            one.send_message(Pong("x"), timeout_s)
    assert time.monotonic() - began_s < SEND_S / 2
    assert not one.closed
    other.receive_exactly(len(body), 20)
    sender.join(10)
    one.send_message(Pong("x"))
    assert other.receive_message(Pong, 5) == Pong("x")


def test_a_message_is_as_long_as_its_reader_admits(ends):
    one, other = ends
    one.send_message(Pong("x" * 100))
    with pytest.raises(ChannelError, match="must be at most 50"):
        other.receive_message(Pong, 5, limit_bytes=50)


@settings(max_examples=300)
@given(st.binary(max_size=64), st.booleans())
def test_no_frame_raises_anything_else(body, whole):
    one, other = channel_pair()
    with one, other:
        one.send(framed(body) if whole else body)
        one.close()
        try:
            message = other.receive_message(Ping | Pong, 5, limit_bytes=256)
            assert isinstance(message, Ping | Pong)
        except ChannelError:
            pass


def test_a_link_local_address_is_kept_with_its_interface():
    index, name = socket.if_nameindex()[0]
    assert _address(lambda: ("fe80::1", 7000, 0, index)) == (f"fe80::1%{name}", 7000)
    assert _address(lambda: ("2001:db8::1", 7000, 0, 0)) == ("2001:db8::1", 7000)
    assert _address(lambda: ("10.0.0.1", 7000)) == ("10.0.0.1", 7000)
    assert _address(lambda: "") == ("", 0)


def test_who_watches_gets_what_comes_at_any_time(ends) -> None:
    """Before it looks, while it looks, and after it has gone to sleep; also when watching is of no use any more."""
    near, far = ends
    near.watch()
    for number in range(40):
        timer = threading.Timer(number % 4 * 0.0003, far.send, [bytes([number]) * 100])
        timer.start()
        assert near.receive_exactly(100, 5.0) == bytes([number]) * 100
        timer.join()
    for _ in range(30):
        with pytest.raises(ChannelTimeout):
            near.receive_exactly(1, 0.002)
    far.send(b"x")
    assert near.receive_exactly(1, 5.0) == b"x"


def test_who_watches_hears_of_the_end(ends) -> None:
    near, far = ends
    near.watch()
    for end in (far, near):  # the other side ends, then this one
        timer = threading.Timer(0.05, end.close)
        timer.start()
        began_s = time.monotonic()
        with pytest.raises(ChannelError):
            near.receive_exactly(1, 5.0)
        assert time.monotonic() - began_s < 2
        timer.join()
