"""Where other nodes come in: sockets, TLS, first words, pairing; what is left is a channel to a paired node.

Whoever connects has five seconds to be known, and as long again to be paired. At most 32 do so at a time. One more
takes the place of the one that has waited longest, of the address that has most: so nobody who opens connections and
says nothing keeps others out.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import selectors
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence

from ..errors import AddressError, CommError, KeyFileError, cannot_listen
from ..log_rate import SeldomLog
from .channel import Channel
from .errors import ChannelError, NotPaired, PairingRefused
from .greeting import welcome
from .group_protocol import OURS, Speaks
from .join_code import Codes
from .node_identity import NodeIdentity, fingerprint
from .pairing import admit
from .peers import KnownNodes, PairedNode, Peers
from .streams import Address, SocketStream, TlsStream
from .tls import server_context

HANDSHAKE_S = 5.0
MAX_NEWCOMERS = 32
BACKLOG = 128  # connections that the system keeps until they are looked at
MAX_WAITING = 64  # channels that nobody has taken yet
CHECK_S = 1.0  # how soon a change of the peers' file by another process is seen
REST_S = 0.1  # when there are no descriptors

log = logging.getLogger("shoal.group")


class GroupListener:
    """Listens at `addresses` as long as it is open, and at those of `also_at`. A port 0 is any free one, the same at
    all of them.

    AddressError if one cannot be had. Nobody can be paired without `codes`, nor where nodes are
    only introduced.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        peers: KnownNodes,
        addresses: Sequence[Address],
        codes: Codes | None = None,
        speaks: Speaks = OURS,
    ) -> None:
        self._identity, self._peers, self._codes, self._speaks = identity, peers, codes, speaks
        self._sockets = _listening(addresses)
        self._fixed: tuple[Address, ...] = tuple(one.getsockname()[:2] for one in self._sockets)
        self._also: dict[Address, socket.socket] = {}
        self._going: list[socket.socket] = []  # sockets that the thread is to close
        # In the order in which they came.
        self._newcomers: dict[SocketStream, tuple[str, threading.Thread]] = {}
        self._lock = threading.Lock()  # for the newcomers, and for what `also_at` changes
        self._ready: queue.Queue[Channel] = queue.Queue(MAX_WAITING)
        self._context: tuple[tuple[PairedNode, ...], ssl.SSLContext] | None = None
        # Anybody can cause what is logged of newcomers. What nobody should cause is not lost among it.
        self._refusals, self._faults = SeldomLog(log), SeldomLog(log)
        self._wake, self._woken = socket.socketpair()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-group-listener", daemon=True)
        self._thread.start()

    @property
    def addresses(self) -> tuple[Address, ...]:
        with self._lock:
            return *self._fixed, *self._also

    def also_at(self, addresses: Sequence[Address]) -> dict[Address, AddressError]:
        """Listen at these from now on, and no more at those of an earlier call; who has come in there stays. → those
        that cannot be had. One thread calls it at a time."""
        failed: dict[Address, AddressError] = {}
        fresh: dict[Address, socket.socket] = {}
        for address in dict.fromkeys(addresses):
            if address not in self._also and address not in self._fixed:
                try:
                    (fresh[address],) = _listening([address])
                except AddressError as error:
                    failed[address] = error
        with self._lock:
            gone = [address for address in self._also if address not in addresses]
            self._going += map(self._also.pop, gone)
            self._also |= fresh
        if gone or fresh:
            self._nudge()
        return failed

    def accept(self, timeout_s: float) -> Channel | None:
        """The next channel of a paired node; its `purpose` and `peer` are known. None if none came in time."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                channel = self._ready.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return None
            if not channel.closed:  # forgotten while it waited
                return channel
            channel.close()

    def close(self) -> None:
        """Listen no more, and turn away who is not known yet. Channels that were taken stay open."""
        self._closing.set()
        self._nudge()
        self._thread.join(HANDSHAKE_S)
        with self._lock:
            newcomers = dict(self._newcomers)
        for stream in newcomers:
            stream.abort()
        for _, thread in newcomers.values():
            thread.join(HANDSHAKE_S)
        for one in (*self._sockets, *self._also.values(), *self._going, self._wake, self._woken):
            one.close()
        while (channel := self.accept(0)) is not None:
            channel.close()

    def __enter__(self) -> GroupListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _run(self) -> None:
        complained = ""
        with selectors.DefaultSelector() as selector:
            for one in (*self._sockets, self._woken):
                selector.register(one, selectors.EVENT_READ, one)
            while not self._closing.is_set():
                self._take_over(selector)
                ready = [key.data for key, _ in selector.select(CHECK_S)]
                try:
                    self._peers.listed()  # closes the channels of those who are gone
                    complained = ""
                except KeyFileError as error:
                    if str(error) != complained:
                        log.error("no node can connect: %s", error)
                    complained = str(error)
                for one in ready:
                    if one is self._woken:
                        one.recv(BACKLOG)
                    else:
                        self._take(one)

    def _take_over(self, selector: selectors.BaseSelector) -> None:
        """What `also_at` has changed."""
        with self._lock:
            going, self._going = self._going, []
            fresh = [one for one in self._also.values() if one not in selector.get_map()]
        for one in going:
            with contextlib.suppress(KeyError):  # it came and went at once
                selector.unregister(one)
            one.close()
        for one in fresh:
            selector.register(one, selectors.EVENT_READ, one)

    def _take(self, listening: socket.socket) -> None:
        try:
            connected, address = listening.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptors, or the other side has gone already
            log.debug("cannot accept a connection: %s", error.strerror)
            self._closing.wait(REST_S)
            return
        try:
            self._make_room()
            stream = SocketStream(connected)
            thread = threading.Thread(
                target=self._meet, args=(stream, address[0]), name="shoal-newcomer", daemon=True
            )
            with self._lock:
                self._newcomers[stream] = address[0], thread
                thread.start()
        except (OSError, RuntimeError, ChannelError) as error:  # it has gone, or there are no threads
            log.debug("cannot accept a connection: %s", error)
            with self._lock:
                self._newcomers.pop(stream, None)
            connected.close()

    def _make_room(self) -> None:
        """End the one of whom the module's text speaks. ChannelError if those who were ended have not gone yet."""
        with self._lock:
            waiting = {
                stream: address for stream, (address, _) in self._newcomers.items() if not stream.closed
            }
            if len(self._newcomers) >= 2 * MAX_NEWCOMERS:
                raise ChannelError("too many newcomers")
            if len(waiting) >= MAX_NEWCOMERS:
                most = Counter(waiting.values()).most_common(1)[0][0]
                next(stream for stream, address in waiting.items() if address == most).abort()

    def _meet(self, stream: SocketStream, address: str) -> None:
        """A newcomer, from the first byte until it is known or gone."""
        kept = False
        try:
            channel = self._known(stream)
            if channel.purpose == "pair":
                self._pair(channel)
            else:
                with self._lock:  # whoever is let in is no newcomer: it cannot lose its place any more
                    if not self._closing.is_set():
                        self._ready.put_nowait(channel)
                        del self._newcomers[stream]
                        kept = True
        except queue.Full:
            self._faults.warning("%s: channels come faster than they are taken", address)
        except (CommError, OSError) as error:
            log.debug("turned away %s: %s", address, error)
        except Exception as error:
            self._faults.warning("%s: bug in Shoal", address, error=error)
        finally:
            if not kept:
                stream.part()
            with self._lock:
                self._newcomers.pop(stream, None)

    def _known(self, below: SocketStream) -> Channel:
        """The channel of a paired node, or of one that may be paired and no more."""
        deadline = time.monotonic() + HANDSHAKE_S
        stream = TlsStream(below, self._server_context(), server_side=True)
        shown = stream.handshake(deadline)
        channel = Channel(stream, fingerprint(shown) if shown else None)
        refusal = ""
        try:
            if channel.peer:
                self._peers.hold(channel.peer, channel)
        except NotPaired:  # signed by one that is paired, or forgotten just now
            refusal = "unpaired"
        except ChannelError:
            refusal = "full"
        welcome(channel, self._speaks, deadline, refusal)
        return channel

    def _pair(self, channel: Channel) -> None:
        if self._codes is None or not isinstance(self._peers, Peers):
            raise ChannelError("a node wants to be paired, and this one pairs with nobody")
        try:
            peer = admit(channel, self._identity, self._peers, self._codes)
        except PairingRefused as error:
            self._refusals.warning("%s was not paired: %s", channel.remote[0], error)
            raise
        log.info("paired with %s at %s", peer.name, channel.remote[0])

    def _server_context(self) -> ssl.SSLContext:
        peers = self._peers.listed()
        if self._context is None or self._context[0] is not peers:
            self._context = peers, server_context(self._identity, [peer.certificate for peer in peers])
        return self._context[1]


def _listening(addresses: Sequence[Address]) -> list[socket.socket]:
    """A socket for each address that a host's name stands for; "" is every IPv4 and IPv6 address there is."""
    sockets: list[socket.socket] = []
    free = 0
    try:
        for host, port in addresses:
            found = socket.getaddrinfo(
                host or None, port or free, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, kind, protocol, _, address in dict.fromkeys(found):
                one = socket.socket(family, kind, protocol)
                sockets.append(one)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((address[0], port or free, *address[2:]))
                one.listen(BACKLOG)
                one.setblocking(False)
                free = free or one.getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        raise cannot_listen(f"{host}:{port}", error) from error
    return sockets
