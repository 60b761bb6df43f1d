"""Streams through memory: what the other side may do to it, and how both nodes of one machine come to use it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from fakes.group.nodes import joined

from shoal.comm.group import same_host, shared_stream
from shoal.comm.group.channel import Channel, channel_pair
from shoal.comm.group.errors import ChannelError, ChannelTimeout
from shoal.comm.group.group_protocol import OURS
from shoal.comm.group.native_bytes import native_bytes
from shoal.comm.group.same_host import BESIDE_S, Beside, Changes
from shoal.comm.group.shared_stream import (
    RING_BYTES,
    SharedStream,
    can_share,
    check_memory,
    shared_memory,
    shared_pair,
)
from shoal.comm.group.streams import TlsStream

pytestmark = pytest.mark.skipif(not can_share(), reason="the native part is not there")


@pytest.fixture
def pair():
    near, far = shared_pair()
    yield near, far
    for one in (near, far):
        one.abort()
        one.close()


def soon() -> float:
    return time.monotonic() + 5


def test_a_frame_larger_than_the_ring_passes_when_neither_side_waits(pair) -> None:
    near, far = pair
    sent = memoryview(np.random.default_rng(0).bytes(5 * RING_BYTES // 2 + 13))
    got = memoryview(bytearray(len(sent)))
    out = done = 0
    while done < len(sent):
        out += near.send_some(sent[out:])
        assert out - done <= RING_BYTES
        done += far.receive(got[done:], soon())
    assert got == sent
    assert near.moved == far.moved == len(sent)


def test_who_is_full_is_woken_when_there_is_room(pair, monkeypatch) -> None:
    """It does not look by itself before it gives up."""
    monkeypatch.setattr(shared_stream, "BELL_LOOK_S", 60.0)
    near, far = pair
    taker = threading.Timer(0.05, lambda: far.receive(memoryview(bytearray(RING_BYTES)), soon()))
    near.send(memoryview(bytes(RING_BYTES)), soon())
    assert near.send_some(memoryview(b"more")) == 0
    with pytest.raises(ChannelTimeout):
        near.send(memoryview(b"more"), time.monotonic() + 0.01)
    taker.start()
    began_s = time.monotonic()
    near.send(memoryview(b"more"), began_s + 20)
    assert time.monotonic() - began_s < 10
    taker.join()


POSITIONS = [0, 64]  # of what the writer has written and the reader has taken: bytes into the ring


@pytest.mark.parametrize("value", [RING_BYTES + 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("ring", [0, 1])
def test_positions_that_cannot_be_end_the_stream(pair, ring, position, value) -> None:
    """Whoever scribbles over all of them: nothing is read or written beside the ring."""
    near, far = pair
    native = native_bytes()
    assert native is not None
    far.send(memoryview(b"x" * 100), soon())
    near.receive(memoryview(bytearray(50)), soon())
    base = ctypes.addressof(near._base) + ring * (native.ring_head + RING_BYTES)
    ctypes.c_uint64.from_address(base + position).value = value
    for one in (near, far):
        for act in (
            lambda one=one: one.send_some(memoryview(bytes(200))),
            lambda one=one: one.receive(memoryview(bytearray(RING_BYTES)), 0.0),
        ):
            with suppress(ChannelError):
                assert 0 <= act() <= RING_BYTES


def test_noise_everywhere_in_the_memory_ends_in_errors_only(pair) -> None:
    near, far = pair
    chance = np.random.default_rng(1)
    view = memoryview(bytearray(4096))
    errors = 0
    for _ in range(200):
        for at in chance.integers(0, 256, 3):  # the heads of both rings
            near._memory[at] = near._memory[at + RING_BYTES + 256] = int(chance.integers(256))
        for act in (
            lambda: near.send_some(view),
            lambda: near.receive(view, 0.0),
            lambda: far.receive(view, 0.0),
        ):
            try:
                assert 0 <= act() <= len(view)
            except ChannelError:
                errors += 1
    assert errors


def test_what_is_no_such_memory_is_refused() -> None:
    whole = shared_memory()
    size = os.fstat(whole).st_size
    check_memory(whole)
    with pytest.raises(OSError, match="permitted"):
        os.ftruncate(whole, 0)
    for seal, length in ((False, size), (True, size - 1), (True, 0)):
        other = os.memfd_create("other", os.MFD_ALLOW_SEALING)
        os.ftruncate(other, length)
        if seal:
            shared_stream.fcntl.fcntl(other, shared_stream.fcntl.F_ADD_SEALS, shared_stream._seals())
        with pytest.raises(ChannelError, match="memory"):
            check_memory(other)
        os.close(other)
    os.close(whole)
    plain = os.open(__file__, os.O_RDONLY)
    with pytest.raises((ChannelError, OSError)):
        check_memory(plain)
    os.close(plain)


def take_all(channel: Channel) -> None:
    while True:
        channel.receive_exactly(1000, 5)


@pytest.mark.parametrize("watches", [False, True])
@pytest.mark.parametrize("busy", [False, True])
def test_a_process_that_is_killed_is_missed_at_once(watches: bool, busy: bool) -> None:
    """While it says nothing, and in the middle of what it writes."""
    memory = shared_memory()
    near_bell, far_bell = socket.socketpair()
    if not (child := os.fork()):
        try:
            near_bell.close()
            far = SharedStream(memory, far_bell, False)
            far.send(memoryview(b"x"), soon())
            while True:
                if busy:
                    far.send(memoryview(bytes(100_000)), soon())
                else:
                    time.sleep(1)
        finally:
            os._exit(1)
    far_bell.close()
    near = Channel(SharedStream(memory, near_bell, True))
    os.close(memory)
    try:
        if watches:
            near.watch()
        near.receive_exactly(1, 5)
        timer = threading.Timer(0.05, os.kill, [child, signal.SIGKILL])
        timer.start()
        began_s = time.monotonic()
        with pytest.raises(ChannelError) as caught:
            take_all(near)
        assert not isinstance(caught.value, ChannelTimeout)
        assert time.monotonic() - began_s < 2
    finally:
        timer.join()
        os.waitpid(child, 0)
        near.close()


# --- changing over ----------------------------------------------------------------------------------------


def through_memory(*ends: Channel) -> list[bool]:
    return [isinstance(end._stream, SharedStream) for end in ends]


def test_channels_for_data_on_one_machine_change_over(tmp_path) -> None:
    with joined(tmp_path, OURS) as (near, far):
        assert through_memory(near, far) == [True, True]
        assert (near.remote, near.local) == (far.local, far.remote)
        near.close()
        with pytest.raises(ChannelError):
            far.receive_exactly(1, 5)


@pytest.mark.parametrize(
    "trouble",
    [
        "no memory",
        "other user",
        "no socket",
        "no connection",
        "wrong secret",
        "wrong memory",
        "other machine",
    ],
)
def test_if_anything_is_in_the_way_the_channel_stays(trouble, tmp_path, monkeypatch) -> None:
    def refused(*_: object, **__: object):
        raise OSError("refused")

    if trouble == "no memory":
        monkeypatch.setattr(same_host, "shared_memory", refused)
    elif trouble == "other user":
        monkeypatch.setattr(same_host.os, "geteuid", lambda: 4711)
    elif trouble == "no socket":
        monkeypatch.setattr(same_host, "_socket", refused)
    elif trouble == "no connection":
        monkeypatch.setattr(same_host.socket, "send_fds", refused)
    elif trouble == "wrong secret":
        monkeypatch.setattr(same_host, "BESIDE_S", 0.2)
        send = socket.send_fds
        monkeypatch.setattr(same_host.socket, "send_fds", lambda one, _, fds: send(one, [bytes(32)], fds))
    elif trouble == "wrong memory":
        monkeypatch.setattr(same_host, "check_memory", refused)
    else:
        monkeypatch.setattr(same_host, "_alike", lambda channel: False)
    with joined(tmp_path, OURS) as (near, far):
        assert [type(end._stream) for end in (near, far)] == [TlsStream, TlsStream]
        near.send(b"abc")
        assert far.receive_exactly(3, 5) == b"abc"


NOBODY = "shoal-" + 32 * "0"


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        (Beside(NOBODY, bytes(32)), False),
        (Beside(NOBODY, b"short"), False),
        (Beside(), False),
        (Beside("another-service-of-this-user", bytes(32)), True),
        (Beside(NOBODY + "\n", bytes(32)), True),
        (Beside("../x"), True),
    ],
)
def test_whoever_is_no_such_node_gets_no_memory(said, refused) -> None:
    """What it says, whatever it is, ends in an answer or in an error, in time."""
    near, far = channel_pair()
    near.local = near.remote = ("127.0.0.1", 1)
    with near, far:
        far.send_message(said)
        began_s = time.monotonic()
        if refused:
            with pytest.raises(ChannelError):
                same_host.answer(near, soon())
        else:
            same_host.answer(near, soon())
            assert far.receive_message(Changes, 5) == Changes(False)
        assert time.monotonic() - began_s < BESIDE_S
        assert not isinstance(near._stream, SharedStream)


def test_strangers_at_the_door_change_nothing(tmp_path, monkeypatch) -> None:
    """Others of the same user connect first, show a wrong secret or nothing, and are passed over."""
    monkeypatch.setattr(same_host, "BESIDE_S", 0.5)
    connect = socket.socket.connect
    strangers: list[socket.socket] = []

    class Late(socket.socket):
        def connect(self, address) -> None:
            stranger = socket.socket(socket.AF_UNIX)
            connect(stranger, address)
            stranger.send(bytes(32))
            strangers.append(stranger)
            connect(self, address)

    def door() -> socket.socket:
        one = Late(socket.AF_UNIX, socket.SOCK_STREAM)
        one.settimeout(5)
        return one

    monkeypatch.setattr(same_host, "_socket", door)
    with joined(tmp_path, OURS) as (near, far):
        assert through_memory(near, far) == [True, True]
    for one in strangers:
        one.close()


def test_what_came_before_the_end_is_received_whoever_heard_the_bell() -> None:
    near, far = shared_pair()
    sleep = near._sleep

    def beaten(deadline: float, problem: str) -> None:
        far.send(memoryview(b"last words"), soon())
        near.ready(True, False)  # another thread of this end hears the bell
        far.close()
        near._sleep = sleep
        raise ChannelError("the other side closed the channel")

    near._sleep = beaten
    view = memoryview(bytearray(64))
    assert bytes(view[: near.receive(view, soon())]) == b"last words"
    near.close()
