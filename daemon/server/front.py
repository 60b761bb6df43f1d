"""The front: accepts connections, bounds them, and passes their bytes between clients and ZeroMQ.

libzmq accepts whoever comes until there are no descriptors left, and then ends the process. It cannot close one
connection, nor stop reading from one. So its sockets listen at a private address, where this thread is the only caller.
Needs Linux (epoll, addresses that are no files); elsewhere `no_front` stands in.
Knows descriptors, hosts and bytes. Does not know messages (`zmtp_meter` knows their lengths), keys or requests.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import zmq

from shoal.comm.log_rate import SeldomLog
from shoal.comm.waker import Waker

from .descriptors import SHORTAGES, Reserve, margin, soft_limit
from .front_link import Link
from .limits import ServerLimits
from .zmtp_meter import ZmtpMeter, weight

PASSED_BYTES = 1 << 16
UNKNOWN_BYTES = 1 << 12  # read at once where many frames may begin: each takes time, and others wait
ACCEPTS = 16  # in a row, before bytes are passed on again
PAUSE_S = 0.1  # in which nobody is accepted, when a descriptor was missing
FAREWELL_S = 0.5  # that the last bytes have to reach clients
NAP_S = 10.0
TAKEN_S = 1.0  # without a byte from a client, after which the server has surely taken all that it sent
AHEAD_BYTES = 1 << 16  # weight of the messages that libzmq holds for a client, besides one that is larger
if sys.platform == "linux":
    READ, WRITE, GONE = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR
    ONCE = select.EPOLLET  # an end that is not read and has gone is reported once, not without end

log = logging.getLogger("shoal.server")


@dataclass(frozen=True)
class Listener:
    """A public socket, and the private address of the ZeroMQ socket behind it."""

    public: socket.socket
    inner: str


class Front:
    """Listens for the server, from `start` to `close`. Thread-safe except for these two and `add`."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._share = max(1, limits.connections * 3 // 4)  # of one host, so that others can come in
        self._links: dict[bytes, Link] = {}  # by the name that our end has for libzmq
        self._hosts: Counter[str] = Counter()
        self._strangers = 0  # connections that libzmq has not accepted yet
        self._unfinished_bytes = 0
        self._listeners: dict[int, Listener] = {}
        self._resting_s = 0.0  # until then nobody is accepted; 0 = they are
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._changed: deque[Link] = deque()
        self._epoll = select.epoll()
        self._waker = Waker()
        self._reserve = Reserve(4)
        self._margin = margin(soft_limit())
        self._closing_s = 0.0  # when to end at the latest
        self._admits = True
        self._seldom = SeldomLog(log)
        self._watch(self._waker.fileno(), READ, lambda events: self._waker.clear())
        self._thread = threading.Thread(target=self._run, name="shoal-front", daemon=True)

    # --- the server's side ---------------------------------------------------------------------------------

    def add(self, public: socket.socket, router: zmq.Socket[Any]) -> None:
        """Listen at a public socket, which is then the front's, and have `router` listen behind it."""
        inner = f"ipc://@shoal-{secrets.token_hex(16)}"  # no file, so a dead daemon leaves nothing
        router.ipc_filter_pid = os.getpid()  # others can see the address
        router.rcvhwm = 0  # it is given little more than was taken
        router.bind(inner)
        public.setblocking(False)
        self._listeners[public.fileno()] = Listener(public, inner)
        self._watch(public.fileno(), READ, lambda events: self._accept(public.fileno()))

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Accept nobody, pass on what ZeroMQ has sent before its sockets were closed, and close all connections.
        Idempotent."""
        if self._epoll.closed:
            return
        self._closing_s = time.monotonic() + FAREWELL_S
        self._waker.wake()
        if self._thread.is_alive():
            self._thread.join()
        for listener in self._listeners.values():
            listener.public.close()
        for link in list(self._links.values()):
            self._close(link)
        self._epoll.close()
        self._waker.close()
        self._reserve.close()

    def admit_no_more(self) -> None:
        """Newcomers find nobody; who is connected stays."""
        self._admits = False
        self._waker.wake()

    def link(self, descriptor: int) -> Link | None:
        """The connection behind the descriptor that libzmq names in a message; None when it is gone."""
        end = None
        try:
            end = socket.socket(fileno=descriptor)
            link = self._links.get(end.getpeername())
        except OSError:
            return None
        finally:
            if end is not None:
                end.detach()  # it is libzmq's
        # The descriptor may be a new connection's by now. That has sent nothing, or nothing that was not taken.
        return link if link is not None and link.meter.weight > link.heard else None

    def heard(self, link: Link, frames: int, content_bytes: int, now_s: float) -> None:
        """The server has taken a message of a client."""
        link.used_s = now_s
        link.heard += weight(frames, content_bytes)
        if link.ahead:
            self._tell(link)

    def pause(self, link: Link, paused: bool) -> None:
        """Whether to stop reading from a client."""
        if link.paused != paused:
            link.paused = paused
            self._tell(link)

    def drop(self, link: Link) -> None:
        """Close a connection."""
        link.dropped = True
        self._tell(link)

    def _tell(self, link: Link) -> None:
        self._changed.append(link)
        self._waker.wake()

    # --- the loop ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing_s or (self._links and time.monotonic() < self._closing_s):
            ready = self._epoll.poll(self._patience_s())
            # All at once: while they are handled, another connection may get the descriptor of one that is closed.
            acts: list[Callable[[], None]] = [partial(self._handlers[end], events) for end, events in ready]
            for act in (*acts, self._heed, self._resume):
                try:
                    act()
                except Exception as error:  # the others go on being served
                    self._seldom.warning("a connection failed: %r", error, error=error)

    def _heed(self) -> None:
        """Do what the server has said."""
        if not self._admits:
            for descriptor, listener in self._listeners.items():
                del self._handlers[descriptor]
                self._epoll.unregister(descriptor)
                listener.public.close()
            self._listeners.clear()
        while self._changed:
            link = self._changed.popleft()
            if link.dropped:
                self._close(link)
            else:
                self._arm(link)

    def _resume(self) -> None:
        if self._resting_s and time.monotonic() >= self._resting_s:
            self._rest(0.0)

    def _patience_s(self) -> float:
        if self._closing_s:
            return 0.02
        return PAUSE_S if self._resting_s else NAP_S

    def _watch(self, descriptor: int, events: int, handler: Callable[[int], None]) -> None:
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def _arm(self, link: Link) -> None:
        """Wait for what a connection can do next: each side is read only while the other side takes it."""
        if link.inner.fileno() < 0:
            return
        link.ahead = True  # before looking, or the server could hear the last of it in between and not say so
        link.ahead = link.meter.weight - link.heard > AHEAD_BYTES
        reads_client = not (link.to_server or link.paused or link.ahead)
        for end, events in (
            (link.client, (READ if reads_client else ONCE) | (WRITE if link.to_client else 0)),
            (link.inner, (ONCE if link.to_client else READ) | (WRITE if link.to_server else 0)),
        ):
            if link.armed[end.fileno()] != events:
                link.armed[end.fileno()] = events
                self._epoll.modify(end.fileno(), events)

    # --- connections ---------------------------------------------------------------------------------------

    def _accept(self, descriptor: int) -> None:
        listener = self._listeners[descriptor]
        for _ in range(ACCEPTS):
            try:
                with self._reserve.lent():
                    client, address = listener.public.accept()
            except OSError as error:
                if error.errno in SHORTAGES:  # else there is nobody, or he has gone
                    self._want(error)
                return
            if not self._admit(listener, client, address):
                client.close()

    def _rest(self, pause_s: float) -> None:
        """Accept nobody for a while: what cannot be accepted would be reported without end."""
        self._resting_s = time.monotonic() + pause_s if pause_s else 0.0
        for descriptor in self._listeners:
            self._epoll.modify(descriptor, 0 if pause_s else READ)

    def _admit(self, listener: Listener, client: socket.socket, address: object) -> bool:
        """Make a connection of an accepted socket, if need be in place of another. Whether there was room."""
        host = str(address[0]) if isinstance(address, tuple) else listener.inner
        crowded = self._hosts[host] >= self._share
        if crowded or len(self._links) >= self._limits.connections:
            idle = self._idlest(host if crowded else None)
            if idle is None:
                self._seldom.warning("refusing a connection: %d are open and busy", len(self._links))
                return False
            self._seldom.warning("%d connections are open: closing an idle one", len(self._links))
            self._close(idle)
        client.setblocking(False)
        if client.family != socket.AF_UNIX:
            self._tune(client)
        try:
            # libzmq needs one, too, for each that it has not accepted yet, and does not survive without.
            self._reserve.check(self._margin + self._strangers)
            inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._want(error)
            return False
        try:
            inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PASSED_BYTES // 2)
            inner.bind("")  # the kernel finds a name
            inner.connect("\0" + listener.inner.removeprefix("ipc://@"))
        except OSError:  # the server is closing, or libzmq has too many to accept
            inner.close()
            return False
        self._strangers += 1
        link = Link(client, inner, host, time.monotonic(), ZmtpMeter(self._limits.message_bytes))
        self._links[inner.getsockname()] = link
        self._hosts[host] += 1
        link.armed = {client.fileno(): READ, inner.fileno(): READ}
        self._watch(client.fileno(), READ, lambda events: self._on_client(link, events))
        self._watch(inner.fileno(), READ, lambda events: self._on_inner(link, events))
        return True

    def _tune(self, client: socket.socket) -> None:
        """Small messages go at once; a host that vanished without closing is noticed."""
        beat_s = max(1, round(self._limits.heartbeat_s))
        for option, value in (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_KEEPIDLE, beat_s),
            (socket.TCP_KEEPINTVL, beat_s),
            (socket.TCP_KEEPCNT, 2),
        ):
            client.setsockopt(socket.IPPROTO_TCP, option, value)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _want(self, error: OSError) -> None:
        """The rest of the daemon has all descriptors. Give it those of an idle connection."""
        self._seldom.warning("cannot accept a connection: %s", error)
        self._rest(PAUSE_S)
        if (idle := self._idlest(None)) is not None:
            self._close(idle)

    def _idlest(self, host: str | None) -> Link | None:
        """Whose place a newcomer may have (only one of `host`, unless None): first those who have never asked anything,
        of them those whose host has most connections, then the oldest. None when all have requests in flight."""
        idle = [link for link in self._links.values() if not link.busy and host in (None, link.host)]
        return min(
            idle,
            key=lambda link: (link.used_s > 0, -self._hosts[link.host], link.used_s or link.opened_s),
            default=None,
        )

    def _close(self, link: Link) -> None:
        if link.inner.fileno() < 0:
            return
        self._links.pop(link.inner.getsockname(), None)
        self._hosts[link.host] -= 1
        if not self._hosts[link.host]:
            del self._hosts[link.host]
        self._unfinished_bytes -= link.meter.unfinished_bytes
        self._meet(link)
        for end in (link.client, link.inner):
            del self._handlers[end.fileno()]
            self._epoll.unregister(end.fileno())
            end.close()

    def _meet(self, link: Link) -> None:
        """libzmq has accepted the connection, as it has sent something, or it never will."""
        self._strangers -= not link.met
        link.met = True

    # --- bytes ---------------------------------------------------------------------------------------------

    def _on_client(self, link: Link, events: int) -> None:
        if link.inner.fileno() < 0:
            return
        try:
            if events & WRITE:
                link.to_client = link.to_client[link.client.send(link.to_client) :]
            if events & READ and not (link.to_server or link.paused or link.ahead):
                size = min(PASSED_BYTES, max(UNKNOWN_BYTES, link.meter.expected_bytes))
                self._forward(link, link.client.recv(size))
            elif events & GONE:
                self._close(link)
        except BlockingIOError:
            pass
        except OSError:
            self._close(link)
        self._arm(link)

    def _forward(self, link: Link, data: bytes) -> None:
        """Give bytes of a client to libzmq, if they are not too many."""
        before, weight_before = link.meter.unfinished_bytes, link.meter.weight
        problem = link.meter.take(data)
        unfinished = link.meter.unfinished_bytes
        self._unfinished_bytes += unfinished - before
        if problem is not None:
            self._seldom.warning("closing a connection that sends %s", problem)
        if problem is not None or not data:
            self._close(link)
            return
        now_s = time.monotonic()
        if unfinished <= before:
            link.begun_s = now_s
        if link.meter.encrypted and now_s > link.forwarded_s + TAKEN_S:
            link.heard = weight_before  # else the pings of all its days would count as messages not read yet
        link.forwarded_s = now_s
        link.to_server = _rest_of(link.inner, data)
        if self._unfinished_bytes > self._limits.unfinished_bytes:
            slowest = min(
                (one for one in self._links.values() if one.meter.unfinished_bytes),
                key=lambda one: one.begun_s,
            )
            self._seldom.warning("closing a connection that sends too slowly: many large messages are begun")
            self._close(slowest)

    def _on_inner(self, link: Link, events: int) -> None:
        if link.inner.fileno() < 0:
            return
        try:
            if events & WRITE:
                link.to_server = link.to_server[link.inner.send(link.to_server) :]
            if events & READ and not link.to_client:
                data = link.inner.recv(PASSED_BYTES)
                self._meet(link)
                if data:
                    link.to_client = _rest_of(link.client, data)
                else:
                    self._close(link)
            elif events & GONE and not link.to_client:
                self._close(link)
        except BlockingIOError:
            pass
        except OSError:
            self._close(link)
        self._arm(link)


def _rest_of(end: socket.socket, data: bytes) -> bytes:
    """Send, and return what could not be sent yet."""
    try:
        return data[end.send(data) :]
    except BlockingIOError:
        return data
