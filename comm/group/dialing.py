"""Going to another node: all of its addresses at once, and the first that turns out to be the node is used.

An address may lead nowhere, to another machine, or to something that accepts and then says nothing. None of them holds
up the others: an address counts when TLS has shown the pinned certificate there.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from .channel import Channel
from .errors import ChannelError, ChannelTimeout, GroupError, NotPaired, PairingRefused
from .greeting import greet
from .group_protocol import OURS, Purpose, Speaks
from .join_code import read_code
from .node_identity import NodeIdentity
from .pairing import join
from .peers import MAX_ADDRESSES, KnownNodes, PairedNode, Peers
from .streams import Address, SocketStream, TlsStream
from .tls import client_context, stranger_context

DIAL_S = 10.0
OTHERS_S = 1.0  # for those who have not answered yet when one has
GREET_S = 3.0  # for one that may not be the head, so that others get their turn
MAX_ASKED = 64  # addresses at which somebody may be who gave a code
TOLD = 3  # failures that are named

Reached = tuple[Address, TlsStream, bytes]  # where, and the certificate that was shown


def dial(
    identity: NodeIdentity,
    peers: KnownNodes,
    peer: str,
    purpose: Purpose,
    addresses: Sequence[Address] = (),
    timeout_s: float = DIAL_S,
    speaks: Speaks = OURS,
) -> Channel:
    """A channel to the paired node whose fingerprint is `peer`, at one of `addresses`, or where it was reached last.

    NotPaired (Forgotten if that node itself said it), VersionMismatch, ChannelTimeout, ChannelError. The channel is
    closed when the node is forgotten.
    """
    known = peers.get(peer)
    deadline = time.monotonic() + timeout_s
    context = client_context(identity, known.certificate)
    with _Race(addresses or known.addresses, context, deadline) as race:
        for _, stream, shown in race.found():
            return _greeted(stream, shown, peers, known, purpose, speaks, deadline)
    raise race.failure()


def dial_all(
    identity: NodeIdentity,
    peers: KnownNodes,
    peer: str,
    purpose: Purpose,
    addresses: Sequence[Address],
    timeout_s: float = DIAL_S,
    speaks: Speaks = OURS,
) -> list[Channel]:
    """A channel to the paired node at each of `addresses` where it is, those that answered first before the others,
    which have a moment more. The caller closes them. Raises as `dial` if it is at none of them."""
    known = peers.get(peer)
    deadline = time.monotonic() + timeout_s
    opened: list[Channel] = []
    refusal: GroupError | None = None
    with _Race(addresses, client_context(identity, known.certificate), deadline) as race:
        for _, stream, shown in race.found():
            ends_s = min(deadline, time.monotonic() + GREET_S)
            try:
                opened.append(_greeted(stream, shown, peers, known, purpose, speaks, ends_s))
                race.deadline = min(race.deadline, time.monotonic() + OTHERS_S)
            except GroupError as error:
                refusal = refusal or error
    if not opened:
        raise refusal or race.failure()
    return opened


def _greeted(
    stream: TlsStream,
    shown: bytes,
    peers: KnownNodes,
    known: PairedNode,
    purpose: Purpose,
    speaks: Speaks,
    deadline: float,
) -> Channel:
    """The channel to a paired node that shows this certificate. Raises as `dial`; then nothing stays open."""
    channel = Channel(stream, known.fingerprint)
    try:
        if shown != known.certificate:
            raise NotPaired("the other node shows a certificate that is not the paired one")
        peers.hold(known.fingerprint, channel)
        greet(channel, purpose, speaks, deadline)
    except BaseException:
        channel.close()
        raise
    return channel


def pair(
    identity: NodeIdentity,
    peers: Peers,
    code: str,
    addresses: Sequence[Address],
    timeout_s: float = DIAL_S,
    speaks: Speaks = OURS,
) -> tuple[PairedNode, str]:
    """Join the group of the head at one of `addresses`: the head as it is remembered, and this node's name there.

    What answers need not be the head: so each node that does is asked, once. PairingRefused, VersionMismatch,
    ChannelTimeout, ChannelError, KeyFileError; then nothing was remembered.
    """
    read_code(code)  # before anybody is bothered
    deadline = time.monotonic() + timeout_s
    refusal: GroupError | None = None
    asked: set[bytes] = set()
    with _Race(addresses, stranger_context(), deadline, MAX_ASKED) as race:
        for _, stream, shown in race.found():
            try:
                with Channel(stream) as channel:
                    if shown not in asked:
                        asked.add(shown)
                        greet(channel, "pair", speaks, min(deadline, time.monotonic() + GREET_S))
                        return join(channel, shown, identity, peers, code)
            except GroupError as error:
                refusal = _clearer(refusal, error)
                if isinstance(refusal, PairingRefused):
                    race.deadline = min(race.deadline, time.monotonic() + OTHERS_S)
    raise refusal or race.failure()


def _clearer(one: GroupError | None, other: GroupError) -> GroupError:
    """Of what two nodes said the one that is about pairing."""
    return one if isinstance(one, PairingRefused) and one.reason != "peer" else other


class _Race:
    """Attempts at all addresses at once, each in a thread, none of which outlives the deadline."""

    def __init__(
        self,
        addresses: Sequence[Address],
        context: ssl.SSLContext,
        deadline: float,
        most: int = MAX_ADDRESSES,
    ) -> None:
        self._context, self.deadline, self._most = context, deadline, most
        self._lock = threading.Lock()
        self._over = False
        self._running = self._started = 0
        self._under_way: set[SocketStream] = set()
        self._ended: queue.SimpleQueue[Reached | tuple[Address, Exception] | None] = queue.SimpleQueue()
        self._failures: list[tuple[Address, Exception]] = []
        for address in addresses[:most]:
            self._start(lambda address=address: self._resolve(address))  # type: ignore[misc]

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, *_: object) -> None:
        """End the attempts that are under way and close what nobody took."""
        with self._lock:
            self._over = True
            for stream in self._under_way:
                stream.abort()
        with contextlib.suppress(queue.Empty):
            while True:
                ended = self._ended.get_nowait()
                if ended is not None and len(ended) == 3:
                    _dispose(ended[1])

    def found(self) -> Iterator[Reached]:
        """Connections as they come to be, until there are no more attempts, or no more time."""
        while self._running:
            try:
                ended = self._ended.get(timeout=max(0.0, self.deadline - time.monotonic()))
            except queue.Empty:
                return
            with self._lock:
                self._running -= 1
            if ended is None:
                continue
            if len(ended) == 3:
                yield ended
            else:
                self._failures.append(ended)

    def failure(self) -> GroupError:
        """Why nothing was found."""
        if not self._started:
            return ChannelError("no address of this node is known")
        errors = [error for _, error in self._failures]
        if errors and all(isinstance(error, NotPaired) for error in errors):
            # Of one of them, always the same: they fail in another order each time, and each text is logged once.
            address, error = min(self._failures, key=lambda failure: failure[0])
            return NotPaired(f"{_written(address)}: {error}")
        told = [f"{_written(address)}: {error}" for address, error in self._failures[:TOLD]]
        if (more := len(self._failures) - len(told)) > 0:
            told.append(f"and {more} more")
        late = self._running or any(isinstance(error, ChannelTimeout) for error in errors)
        kind = ChannelTimeout if late else ChannelError
        return kind(f"the node cannot be reached ({'; '.join(told) or 'no answer in time'})")

    def _start(self, act: Callable[[], Reached | tuple[Address, Exception] | None]) -> None:
        def run() -> None:
            ended = act()
            with self._lock:
                if ended is not None and len(ended) == 3 and self._over:
                    _dispose(ended[1])
                else:
                    self._ended.put(ended)

        with self._lock:
            if self._over or self._started >= 2 * self._most:
                return
            self._running += 1
            self._started += 1
        try:
            threading.Thread(target=run, name="shoal-dial", daemon=True).start()
        except RuntimeError as error:  # the system has no more
            self._ended.put((("", 0), error))

    def _resolve(self, address: Address) -> tuple[Address, Exception] | None:
        """Start an attempt at each address that a name stands for."""
        if not 0 < address[1] < 1 << 16:
            return address, ChannelError("no such port")
        try:
            found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return address, ChannelError(f"no such host: {error}")
        for family, _, _, _, target in dict.fromkeys(found):
            self._start(lambda family=family, target=target: self._attempt(family, target))  # type: ignore[misc]
        return None

    def _attempt(self, family: int, target: tuple[str, int]) -> Reached | tuple[Address, Exception]:
        address = target[0], target[1]
        below: SocketStream | None = None
        try:
            below = SocketStream(socket.socket(family, socket.SOCK_STREAM))
            with self._lock:
                self._under_way.add(below)
                if self._over:
                    below.abort()
            below.connect(target, self.deadline)
            stream = TlsStream(below, self._context, server_side=False)
            if (shown := stream.handshake(self.deadline)) is None:
                raise ChannelError("the other side shows no certificate")
            return address, stream, shown
        except (GroupError, OSError) as error:
            if below:
                _dispose(below)
            return address, error
        finally:
            with self._lock:
                self._under_way.discard(below)


def _dispose(stream: SocketStream | TlsStream) -> None:
    stream.abort()
    stream.close()


def _written(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
