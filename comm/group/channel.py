"""A channel: one connection between two nodes of a group, for messages or for raw frames.

A message is msgpack behind its length (u32, little endian). What is raw, and how long, is agreed above. One thread
may send while another receives; several that send take turns. No wait is without a time.
"""

from __future__ import annotations

import socket
import threading
import time
from functools import lru_cache
from types import TracebackType
from typing import Any

import msgspec

from ..errors import CommError
from .errors import ChannelError, ChannelTimeout
from .group_protocol import Agreed, Purpose
from .streams import SocketStream, Stream

JOIN_BYTES = 64 << 10  # shorter buffers are copied into one, longer ones sent as they are
MESSAGE_BYTES = 1 << 20
SEND_S = 60.0  # the other side may be computing, and reads nothing meanwhile
REST_OF_MESSAGE_S = 10.0  # once it has begun to come

_ENCODER = msgspec.msgpack.Encoder()


class Channel:
    """See above. `peer` is the fingerprint of the other node, None while it is not paired.

    `purpose` and `agreed` are what the two said first. `remote` and `local` are the addresses of the connection.
    """

    def __init__(self, stream: Stream, peer: str | None = None) -> None:
        self.purpose: Purpose = "pair"
        self.agreed = Agreed()
        self.peer = peer
        self.remote, self.local = stream.ends()
        self._stream = stream
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._joined = memoryview(bytearray(JOIN_BYTES))

    @property
    def closed(self) -> bool:
        """Whether it was closed here, or has failed."""
        return self._stream.closed

    @property
    def moved(self) -> int:
        """How many bytes have gone and come so far, those of encryption included: whether it moves."""
        return self._stream.moved

    @property
    def buffered(self) -> bool:
        """Whether something has come that a `select` on this channel does not see."""
        return self.ready(True, False)

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def room_event(self) -> int:
        """What `poll` says of it when `send_some` may take more again."""
        return self._stream.room_event

    def send(self, *buffers: Any, timeout_s: float = SEND_S) -> None:
        """The bytes of `buffers` (contiguous, of any type and shape), one behind the other: if few, in one send.

        ChannelTimeout and ChannelError close the channel, since the other side has half of it; but not ChannelTimeout
        because another thread was sending all the time.
        """
        deadline = time.monotonic() + timeout_s
        if not self._sending.acquire(timeout=max(0.0, timeout_s)):
            raise ChannelTimeout("the other side takes no bytes")
        try:
            self._send(buffers, deadline)
        except BaseException:
            self._stream.abort()
            raise
        finally:
            self._sending.release()

    def receive_into(self, view: Any, timeout_s: float) -> None:
        """Fill `view` (writable, contiguous) within `timeout_s`.

        ChannelTimeout leaves the channel as it was if nothing had come. Otherwise it closes it, as ChannelError does.
        """
        with self._receiving:
            self._receive(_bytes(view), time.monotonic() + timeout_s)

    @property
    def unsent(self) -> bool:
        """Whether `send_some` has taken bytes that the other side may not have got yet."""
        return self._stream.unsent

    def send_some(self, data: memoryview) -> int:
        """What goes without waiting: how many bytes of `data` were taken. ChannelError closes the channel."""
        with self._sending:
            try:
                return self._stream.send_some(data)
            except BaseException:
                self._stream.abort()
                raise

    def receive_some(self, view: memoryview) -> int:
        """What has come, into `view` (of octets): how many bytes. Does not wait. ChannelError closes the channel."""
        with self._receiving:
            try:
                return self._stream.receive(view, 0.0)
            except ChannelTimeout:
                return 0
            except BaseException:
                self._stream.abort()
                raise

    def watch(self) -> None:
        """From now on, whoever waits for bytes looks for them for a while before it sleeps (`Stream.watch`)."""
        self._stream.watch()

    def receive_exactly(self, count: int, timeout_s: float) -> bytearray:
        """`count` bytes, as many as the caller knows to expect. Otherwise as `receive_into`."""
        data = bytearray(count)
        self.receive_into(data, timeout_s)
        return data

    def send_message(self, message: msgspec.Struct, timeout_s: float = SEND_S) -> None:
        """A struct that has a tag if the other side expects one of several. Otherwise as `send`."""
        body = _ENCODER.encode(message)
        self.send(len(body).to_bytes(4, "little"), body, timeout_s=timeout_s)

    def send_last(self, message: msgspec.Struct, timeout_s: float) -> None:
        """A message before the channel is closed, which goes within `timeout_s` or not at all: neither the other side
        that does not read nor a thread here that is sending holds it up longer. Never raises."""
        body = _ENCODER.encode(message)
        deadline = time.monotonic() + timeout_s
        if self._sending.acquire(timeout=timeout_s):
            try:
                self._send((len(body).to_bytes(4, "little"), body), deadline)
            except (OSError, CommError):
                self._stream.abort()
            finally:
                self._sending.release()

    def receive_message(
        self,
        types: Any,
        timeout_s: float,
        limit_bytes: int = MESSAGE_BYTES,
        rest_s: float = REST_OF_MESSAGE_S,
    ) -> Any:
        """The next message, which must be of `types`: a struct, or a union of tagged ones; and at most `limit_bytes`.

        ChannelTimeout when none has begun within `timeout_s`: then the channel is as it was. Once a message has begun,
        its rest may take `rest_s`, or what is left of `timeout_s`. All else is a ChannelError, and closes the channel.
        """
        head = memoryview(bytearray(4))
        deadline = time.monotonic() + timeout_s
        with self._receiving:
            self._receive(head[:1], deadline)
            try:
                return self._message(head, types, max(deadline, time.monotonic() + rest_s), limit_bytes)
            except BaseException:
                self._stream.abort()
                raise

    def close(self) -> None:
        """From any thread, and as often as one likes. Who waits in this channel gets ChannelError at once."""
        self._stream.abort()
        with self._sending, self._receiving:
            self._stream.abort()  # another one, if it has changed over
            self._stream.close()

    def ready(self, data: bool, room: bool) -> bool:
        """Whether what one wants is there, data or room, though a `poll` may not say so. Otherwise it will."""
        with self._receiving:
            return self._stream.ready(data, room)

    def change_over(self, stream: Stream) -> None:
        """Go on with another stream to the same node, which does so at the same point. This one is closed."""
        with self._sending, self._receiving:
            before, self._stream = self._stream, stream
            if before.closed:
                stream.abort()
            before.abort()
            before.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, buffers: tuple[Any, ...], deadline: float) -> None:
        used = 0
        for view in map(_bytes, buffers):
            if used and used + len(view) > JOIN_BYTES:
                taken = JOIN_BYTES - used
                self._joined[used:] = view[:taken]
                self._stream.send(self._joined, deadline)
                used, view = 0, view[taken:]
            if len(view) >= JOIN_BYTES:
                self._stream.send(view, deadline)
            else:
                self._joined[used : used + len(view)] = view
                used += len(view)
        if used:
            self._stream.send(self._joined[:used], deadline)

    def _receive(self, view: memoryview, deadline: float) -> None:
        filled = 0
        try:
            while filled < len(view):
                filled += self._stream.receive(view[filled:], deadline)
        except BaseException as error:
            if filled or not isinstance(error, ChannelTimeout):
                self._stream.abort()
            raise

    def _message(self, head: memoryview, types: Any, deadline: float, limit_bytes: int) -> Any:
        """The rest of a message whose first byte is in `head`."""
        self._receive(head[1:], deadline)
        count = int.from_bytes(head, "little")
        if count > limit_bytes:
            raise ChannelError(f"message of {count} bytes: must be at most {limit_bytes}")
        body = bytearray(count)
        self._receive(memoryview(body), deadline)
        try:
            return _decoder(types).decode(body)
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ChannelError(f"a message that is not of this protocol: {error}") from error


def channel_pair(purpose: Purpose = "data") -> tuple[Channel, Channel]:
    """Two ends within one process, in the clear: the same class over a pair of sockets, for tests."""
    ends = [Channel(SocketStream(end)) for end in socket.socketpair()]
    for end, peer in zip(ends, ("0" * 64, "1" * 64), strict=True):
        end.purpose, end.peer = purpose, peer
    return ends[0], ends[1]


@lru_cache(maxsize=256)
def _decoder(types: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(types)


def _bytes(buffer: Any) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")
