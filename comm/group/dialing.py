"""Going to another node: all of its addresses at once, and the first that turns out to be the node is used.

An address may lead nowhere, to another machine, or to something that accepts and then says nothing. None of them holds
up the others: an address counts when TLS has shown the pinned certificate there, or, in pairing, when who is there has
proved that it knows the code.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ..errors import CommError
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
GREET_S = 3.0  # for the first words of one that may not be the node
ASKED_S = 1.0  # then a head that is asked and says nothing is asked at its other addresses, too
MAX_ASKED = 64  # addresses at which somebody may be who gave a code
TOLD = 3  # failures that are named

T = TypeVar("T")
_Answer = tuple[PairedNode, str] | GroupError


class _Reached(NamedTuple):
    stream: TlsStream
    shown: bytes  # the certificate


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
    with _Race(addresses or known.addresses, context, deadline, _Reached) as race:
        for stream, shown in race.found():
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
    refusal: CommError | None = None

    def greeted(stream: TlsStream, shown: bytes) -> Channel | CommError:
        ends_s = min(deadline, time.monotonic() + GREET_S)
        try:
            return _greeted(stream, shown, peers, known, purpose, speaks, ends_s)
        except CommError as error:
            return error

    context = client_context(identity, known.certificate)
    with _Race[Channel | CommError](addresses, context, deadline, greeted) as race:
        for found in race.found():
            if isinstance(found, Channel):
                opened.append(found)
                race.deadline = min(race.deadline, time.monotonic() + OTHERS_S)
            else:
                refusal = refusal or found
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

    What answers need not be the head: so each node that does is asked, all at the same time, and who proves that it
    has the code is the head. PairingRefused, VersionMismatch, ChannelTimeout, ChannelError, KeyFileError; then nothing
    was remembered.
    """
    read_code(code)  # before anybody is bothered
    deadline = time.monotonic() + timeout_s
    refusal: GroupError | None = None
    asking = _Asking(identity, code, speaks, deadline)
    with _Race[_Answer](addresses, stranger_context(), deadline, asking.ask, MAX_ASKED) as race:
        for answer in race.found():
            if not isinstance(answer, GroupError):
                head, known_as = answer
                return peers.add(head), known_as
            refusal = _clearer(refusal, answer)
            if isinstance(refusal, PairingRefused):  # anybody can refuse
                race.deadline = min(race.deadline, time.monotonic() + GREET_S)
    raise refusal or race.failure()


class _Asking:
    """Asks whoever is reached whether it is the head that gave `code`; any number of threads at once."""

    def __init__(self, identity: NodeIdentity, code: str, speaks: Speaks, deadline: float) -> None:
        self._identity, self._code, self._speaks, self._deadline = identity, code, speaks, deadline
        self._lock = threading.Lock()
        self._answered: dict[bytes, threading.Event] = {}  # by certificate

    def ask(self, stream: TlsStream, shown: bytes) -> _Answer | None:
        """What `join` returns or raises; None if the same node has answered at another address. Who stands at one of
        these, passes on its certificate and then nothing more, does not hide it."""
        with Channel(stream) as channel:
            with self._lock:
                first = shown not in self._answered
                answered = self._answered.setdefault(shown, threading.Event())
            if not first and answered.wait(ASKED_S):
                return None
            try:
                greet(channel, "pair", self._speaks, min(self._deadline, time.monotonic() + GREET_S))
                found: _Answer = join(channel, shown, self._identity, self._code)
            except ChannelError as error:
                return error
            except GroupError as error:
                if isinstance(error, PairingRefused) and error.reason == "often":
                    return error  # it is about the address from which it was asked: somebody may pass on all bytes
                found = error
            answered.set()
            return found


def _clearer(one: GroupError | None, other: GroupError) -> GroupError:
    """Of what two nodes said the one that is about pairing."""
    return one if isinstance(one, PairingRefused) and one.reason != "peer" else other


@dataclass(frozen=True)
class _Ended(Generic[T]):
    """How an attempt has ended. `below`: to be closed if nobody takes `value`."""

    address: Address
    value: T | None = None
    failure: Exception | None = None
    below: SocketStream | None = None


class _Race(Generic[T]):
    """Attempts at all addresses at once, each in a thread, none of which outlives the deadline. What `reached` makes of
    a connection and the certificate that was shown there, in that thread, is what is found, unless it is None."""

    def __init__(
        self,
        addresses: Sequence[Address],
        context: ssl.SSLContext,
        deadline: float,
        reached: Callable[[TlsStream, bytes], T | None],
        most: int = MAX_ADDRESSES,
    ) -> None:
        self._context, self.deadline, self._reached, self._most = context, deadline, reached, most
        self._lock = threading.Lock()
        self._over = False
        self._running = self._started = 0
        self._under_way: set[SocketStream] = set()
        self._ended: queue.SimpleQueue[_Ended[T] | None] = queue.SimpleQueue()
        self._failures: list[tuple[Address, Exception]] = []
        for address in addresses[:most]:
            self._start(lambda address=address: self._resolve(address))  # type: ignore[misc]

    def __enter__(self) -> _Race[T]:
        return self

    def __exit__(self, *_: object) -> None:
        """End the attempts that are under way and close what nobody took."""
        with self._lock:
            self._over = True
            for stream in self._under_way:
                stream.abort()
        with contextlib.suppress(queue.Empty):
            while True:
                _dispose(self._ended.get_nowait())

    def found(self) -> Iterator[T]:
        """What attempts come to, as they do, until there are no more of them, or no more time."""
        while self._running:
            try:
                ended = self._ended.get(timeout=max(0.0, self.deadline - time.monotonic()))
            except queue.Empty:
                return
            with self._lock:
                self._running -= 1
            if ended is None:
                continue
            if ended.failure is not None:
                self._failures.append((ended.address, ended.failure))
            elif ended.value is not None:
                yield ended.value

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

    def _start(self, act: Callable[[], _Ended[T] | None]) -> None:
        def run() -> None:
            ended = act()
            with self._lock:
                if self._over:
                    _dispose(ended)
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
            self._ended.put(_Ended(("", 0), failure=error))

    def _resolve(self, address: Address) -> _Ended[T] | None:
        """Start an attempt at each address that a name stands for."""
        if not 0 < address[1] < 1 << 16:
            return _Ended(address, failure=ChannelError("no such port"))
        try:
            found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return _Ended(address, failure=ChannelError(f"no such host: {error}"))
        for family, _, _, _, target in dict.fromkeys(found):
            self._start(lambda family=family, target=target: self._attempt(family, target))  # type: ignore[misc]
        return None

    def _attempt(self, family: int, target: tuple[str, int]) -> _Ended[T]:
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
            return _Ended(address, self._reached(stream, shown), below=below)
        except (GroupError, OSError) as error:
            failed = _Ended[T](address, failure=error, below=below)
            _dispose(failed)
            return failed
        finally:
            with self._lock:
                self._under_way.discard(below)


def _dispose(ended: _Ended[T] | None) -> None:
    if ended is not None and ended.below is not None:
        ended.below.abort()
        ended.below.close()


def _written(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
