"""What is sent to whom: every client's requests in flight, and clients that read slowly or vanish.

Knows why a ROUTER socket refuses a message (the client's queue is full, or the client is gone), what is done about it,
and keepalives. Does not know what comes in. Only the server's thread uses it, except for `notify`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from shoal.comm import wire
from shoal.comm.errors import ProtocolError
from shoal.comm.log_rate import SeldomLog
from shoal.comm.messages import STREAMING, TYPE_NAMES, Error, Message
from shoal.comm.waker import Waker

from .front import Front
from .in_flight import Flight, Peer
from .limits import ServerLimits

MAX_REFUSALS = 10_000  # that wait for a client; what it had sent before reading stopped gives fewer
FULL_QUEUE_RETRY_S = 0.02  # between tries of a full queue: ZeroMQ does not tell which client can take more

log = logging.getLogger("shoal.server")


class Outbox:
    """All flights and the clients they belong to. A client is known only while something is still to be said to it."""

    def __init__(self, limits: ServerLimits, waker: Waker, front: Front) -> None:
        self.in_flight = 0
        self._limits = limits
        self._waker = waker
        self._front = front
        self._peers: dict[tuple[int, bytes], Peer] = {}
        self._ready: deque[Flight] = deque()  # flights whose mailbox holds something
        self._blocked: set[Peer] = set()
        self._next_keepalive_s = 0.0
        self._seldom = SeldomLog(log)

    def peer(self, router: zmq.Socket[Any], identity: bytes, frame: zmq.Frame) -> Peer:
        """The client of that connection, which has sent `frame`."""
        peer = self._peers.get((id(router), identity))
        if peer is None:
            link = self._front.link(int(frame.get("__fd")))
            peer = Peer(router, identity, _key(frame) or identity.hex(), link)
        return peer

    @property
    def clients(self) -> int:
        return len(self._peers)

    @property
    def patience_s(self) -> float:
        """How long the server may sleep when no message comes."""
        if self._blocked:
            return FULL_QUEUE_RETRY_S
        return self._limits.keepalive_s / 4 if self._peers else 1.0

    def open(self, peer: Peer, request_id: bytes, kind: str, now_s: float) -> Flight:
        """Begin a request. Its replies are sent as they are emitted."""
        flight = peer.flights[request_id] = Flight(peer, request_id, kind, now_s, self.notify)
        self._know(peer)
        self.in_flight += 1
        return flight

    def refuse(self, peer: Peer, request_id: bytes, error: Error) -> None:
        """Answer a request that gets no flight. Who does not read is not read from any more, so that few such answers
        wait; their order is kept."""
        if peer.refusals or not (self.send(peer, request_id, error) or peer.gone):
            peer.refusals.append((request_id, error))
            self._know(peer)
            if len(peer.refusals) > MAX_REFUSALS:
                self._seldom.warning("closing the connection of a client that sends and does not read")
                self._part(peer)

    def _know(self, peer: Peer) -> None:
        self._peers[id(peer.router), peer.identity] = peer
        if peer.link is not None:
            peer.link.busy = True

    def notify(self, flight: Flight) -> None:
        """The flight's mailbox holds something. Any thread may call this."""
        self._ready.append(flight)
        self._waker.wake()

    # --- sending -------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what has been emitted, except to clients whose queue is full: `tick` tries those again."""
        for _ in range(len(self._ready)):
            flight = self._ready.popleft()
            if flight.peer not in self._blocked:
                self._push(flight)

    def send(self, peer: Peer, request_id: bytes, message: Message) -> bool:
        """Try to send. False when the client's queue is full (then it is marked blocked), or the client is gone."""
        try:
            frames = wire.encode(message, request_id)
        except ProtocolError as error:
            self._seldom.warning("cannot send %s: %s", type(message).__name__, error)
            frames = wire.encode(Error(code="internal", message="the reply cannot be sent"), request_id)
        try:
            peer.router.send_multipart([peer.identity, *frames], zmq.NOBLOCK)
        except zmq.Again:
            if peer not in self._blocked:
                peer.blocked_since_s = time.monotonic()
                self._block(peer, True)
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                self._seldom.warning("cannot send to a client: %s", error)
            self._forget(peer)
            return False
        peer.sent += 1
        return True

    def _push(self, flight: Flight) -> None:
        """Send what the flight holds, until its client's queue is full."""
        # The first round sends what was taken before the queue filled up, the second what has come since.
        for _ in range(2):
            if not flight.outgoing:
                flight.take()
            while flight.outgoing:
                message = flight.outgoing[0]
                if not self.send(flight.peer, flight.request_id, message):
                    return
                flight.outgoing.popleft()
                flight.sent_s = time.monotonic()
                if TYPE_NAMES[type(message)] not in STREAMING:
                    self._end(flight)
                    return

    # --- time ----------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Retry full queues, drop clients that are gone or do not read, and send keepalives."""
        for peer in list(self._blocked):
            self._retry(peer, now_s)
        if now_s >= self._next_keepalive_s:
            self._next_keepalive_s = now_s + self._limits.keepalive_s / 4
            self._keep_alive(now_s)

    def _retry(self, peer: Peer, now_s: float) -> None:
        since_s, sent = peer.blocked_since_s, peer.sent
        self._blocked.discard(peer)
        self._push_all(peer)
        if peer not in self._blocked or peer.sent > sent:
            self._block(peer, peer in self._blocked)
            return
        peer.blocked_since_s = since_s
        unread_s = now_s - since_s
        if not peer.evicted and (
            unread_s > self._limits.outbox_s or peer.held_bytes > self._limits.outbox_bytes
        ):
            self._seldom.warning("ending the requests of a client that does not read")
            peer.evicted = True
            reason = f"reader too slow: nothing read for {unread_s:.1f} s, {peer.held_bytes} bytes held"
            for flight in peer.flights.values():
                self._fail(flight, Error(code="cancelled", message=reason, hint="read faster"))
        elif unread_s > 2 * self._limits.outbox_s:
            self._part(peer)

    def _push_all(self, peer: Peer) -> None:
        """Send what waits for a client, until its queue is full."""
        while peer.refusals:
            if not self.send(peer, *peer.refusals[0]):
                return
            peer.refusals.popleft()
        for flight in list(peer.flights.values()):
            self._push(flight)
            if peer in self._blocked or peer.gone:
                return
        self._leave(peer)

    def _block(self, peer: Peer, blocked: bool) -> None:
        """Note whether a client's queue is full. While it is, nothing more is read from the client."""
        if blocked:
            self._blocked.add(peer)
        else:
            self._blocked.discard(peer)
        if peer.link is not None:
            self._front.pause(peer.link, blocked)

    def _keep_alive(self, now_s: float) -> None:
        """Send `waiting` or `stage` for every silent request, which also shows whether its client is still there. End
        requests whose deadline has passed before they began."""
        for peer in list(self._peers.values()):
            for flight in list(peer.flights.values()):
                flight.expire(now_s)
                if peer in self._blocked or peer.gone:
                    break
                message = flight.sign_of_life(now_s, self._limits.keepalive_s)
                if message is not None and self.send(peer, flight.request_id, message):
                    flight.sent_s = now_s

    # --- ends ----------------------------------------------------------------------------------------------

    def cancel(self, flight: Flight) -> None:
        self._guard(flight.cancel)

    def fail_all(self, error: Error) -> None:
        """End every request in flight with `error`."""
        for peer in list(self._peers.values()):
            for flight in list(peer.flights.values()):
                self._fail(flight, error)

    def forget_all(self) -> None:
        for peer in list(self._peers.values()):
            self._forget(peer)

    def _end(self, flight: Flight) -> None:
        """Forget the flight: its terminal reply is sent, or its client is gone."""
        peer = flight.peer
        if peer.flights.pop(flight.request_id, None) is not None:
            self.in_flight -= 1
        self._leave(peer)

    def _leave(self, peer: Peer) -> None:
        """Forget a client that nothing waits for."""
        if not (peer.flights or peer.refusals):
            self._peers.pop((id(peer.router), peer.identity), None)
            self._block(peer, False)
            if peer.link is not None:
                peer.link.busy = False

    def _forget(self, peer: Peer) -> None:
        """The client is gone: end its requests and forget it."""
        peer.gone = True
        peer.refusals.clear()
        for flight in list(peer.flights.values()):
            self._guard(flight.abandon)
            self._end(flight)
        self._leave(peer)

    def _part(self, peer: Peer) -> None:
        """The client has to go."""
        self._forget(peer)
        if peer.link is not None:
            self._front.drop(peer.link)

    def _fail(self, flight: Flight, error: Error) -> None:
        self._guard(lambda: flight.fail(error))

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        # When the backend fails to cancel a request, the server must go on.
        except Exception as error:
            self._seldom.warning("cancelling failed: %r", error, error=error)


def _key(frame: zmq.Frame) -> str:
    """The public key of the client that sent the frame, "" without CURVE."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
