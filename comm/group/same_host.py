"""Two nodes on one machine go on through memory: how both ends of a new channel find out, and change over.

The node that dialled opens an abstract socket and says over TLS what it is called, with a secret. The other one
connects to it, shows the secret and passes memory on (`shared_stream`). Both look whose process is at the other end: it
has to be the same user's. If anything is in the way, both say so, and the channel stays as it is. Names of abstract
sockets belong to a network namespace: containers and hosts of a test have their own, and are other machines.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import msgspec

from .channel import Channel
from .errors import ChannelError
from .shared_stream import SharedStream, can_share, check_memory, shared_memory

SECRET_BYTES = 32
SAME_HOST_BYTES = 1024  # of one message
BESIDE_S = 2.0
_CREDENTIALS = struct.Struct("3i")  # process, user, group

log = logging.getLogger(__name__)


class Beside(msgspec.Struct, frozen=True):
    """By the node that dialled: where memory may be passed on; no name if it cannot be."""

    name: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^(shoal-[0-9a-f]{32})?\Z")] = ""
    secret: Annotated[bytes, msgspec.Meta(max_length=SECRET_BYTES)] = b""


class Changes(msgspec.Struct, frozen=True):
    """By the other node, whether it has passed memory on; and by the first, whether it has taken it."""

    over: bool


def offer(channel: Channel, deadline: float) -> None:
    """The part of the node that dialled. Raises as the channel does; it is closed then."""
    with ExitStack() as held:
        door: socket.socket | None = None
        offered = Beside()
        if _alike(channel):
            offered = Beside(f"shoal-{secrets.token_hex(16)}", secrets.token_bytes(SECRET_BYTES))
            try:
                door = held.enter_context(_socket())
                door.bind(f"\0{offered.name}")
                door.listen(1)
            except OSError as error:
                log.info("no memory is shared with another node of this machine: %s", error)
                offered, door = Beside(), None
        channel.send_message(offered, _left(deadline))
        heard: Changes = channel.receive_message(Changes, _left(deadline), SAME_HOST_BYTES)
        if not heard.over or door is None:
            return
        stream: SharedStream | None = None
        with _said():
            stream = _taken(door, offered.secret, channel, deadline)
        try:
            channel.send_message(Changes(stream is not None), _left(deadline))
        except BaseException:
            _give_up(stream)
            raise
        if stream is not None:
            channel.change_over(stream)


def answer(channel: Channel, deadline: float) -> None:
    """The part of the other node."""
    offered: Beside = channel.receive_message(Beside, _left(deadline), SAME_HOST_BYTES)
    stream: SharedStream | None = None
    if offered.name and len(offered.secret) == SECRET_BYTES and _alike(channel):
        with _said():
            stream = _passed(offered, channel, deadline)
    try:
        channel.send_message(Changes(stream is not None), _left(deadline))
        if stream is None:
            return
        heard: Changes = channel.receive_message(Changes, _left(deadline), SAME_HOST_BYTES)
        if heard.over:
            channel.change_over(stream)
            stream = None
    finally:
        _give_up(stream)


def _give_up(stream: SharedStream | None) -> None:
    if stream is not None:
        stream.abort()
        stream.close()


def _alike(channel: Channel) -> bool:
    """Whether the other node may be on this machine: both ends have one address."""
    return can_share() and bool(channel.local[0]) and channel.local[0] == channel.remote[0]


def _passed(offered: Beside, channel: Channel, deadline: float) -> SharedStream:
    """Memory for both, passed on. OSError, ChannelError."""
    with ExitStack() as held:
        memory = shared_memory()
        held.callback(os.close, memory)
        bell = held.enter_context(_socket())
        bell.settimeout(max(0.001, min(BESIDE_S, _left(deadline))))
        bell.connect(f"\0{offered.name}")
        _check_user(bell)
        socket.send_fds(bell, [offered.secret], [memory])
        return SharedStream(memory, bell.dup(), True, (channel.remote, channel.local))


def _taken(door: socket.socket, secret: bytes, channel: Channel, deadline: float) -> SharedStream:
    """The memory that was passed on to this node. OSError, ChannelError."""
    ends_s = min(deadline, time.monotonic() + BESIDE_S)
    while left_s := _left(ends_s):
        with ExitStack() as held:
            door.settimeout(left_s)
            bell = held.enter_context(door.accept()[0])
            bell.settimeout(max(0.001, _left(ends_s)))
            try:
                _check_user(bell)
            except ChannelError:
                continue
            shown, descriptors, _, _ = socket.recv_fds(bell, SECRET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            for descriptor in descriptors:
                held.callback(os.close, descriptor)
            if hmac.compare_digest(shown, secret) and len(descriptors) == 1:
                check_memory(descriptors[0])
                return SharedStream(descriptors[0], bell.dup(), False, (channel.remote, channel.local))
    raise ChannelError("no memory was passed on")


def _check_user(bell: socket.socket) -> None:
    """Whose process is at the other end, as the system says."""
    size = _CREDENTIALS.size
    _, user, _ = _CREDENTIALS.unpack(bell.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if user != os.geteuid():
        raise ChannelError("another user's process is there")


def _socket() -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.settimeout(BESIDE_S)
    return one


@contextmanager
def _said() -> Iterator[None]:
    """What goes wrong here, goes on without."""
    try:
        yield
    except (OSError, ChannelError) as error:
        log.info("no memory is shared with another node of this machine: %s", error)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
