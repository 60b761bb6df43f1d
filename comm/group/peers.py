"""The nodes that this one was paired with, kept in a private file; and the channels to them that are open.

    <directory>/peers.json    {"peers": [{"name", "role", "certificate" (DER in base64), "addresses"}, …]}

The file is read anew when it changed, so a node that another process forgets is forgotten here, too. A file that
cannot be read stops pairing and new channels and is never overwritten.
"""

from __future__ import annotations

import fcntl
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from .. import key_files
from ..errors import KeyFileError
from .errors import ChannelError, NotPaired
from .node_identity import check_readable, fingerprint, node_name
from .streams import Address

MAX_PEERS = 64
MAX_ADDRESSES = 16  # kept of each node
LOCK_S = 5.0
MAX_CHANNELS = 64  # open at a time with one node

Role = Literal["head", "worker"]


class PairedNode(msgspec.Struct, frozen=True):
    """A node that this one trusts, and what it is to this one."""

    name: str
    role: Role
    certificate: bytes
    addresses: tuple[Address, ...] = ()  # at which it was reached last, the best first

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate)


class Closable(Protocol):
    """A channel, as far as this module knows."""

    @property
    def closed(self) -> bool: ...

    def close(self) -> None: ...


class KnownNodes(Protocol):
    """Whom a listener lets in, or who is dialled: `Peers`, or `Introduced` for a while."""

    def listed(self) -> tuple[PairedNode, ...]:
        """All of them. The same object as long as nothing has changed."""
        ...

    def get(self, fingerprint: str) -> PairedNode:
        """NotPaired if there is none."""
        ...

    def hold(self, fingerprint: str, channel: Closable) -> None:
        """Close `channel` when its node is known no longer. NotPaired, or ChannelError at too many."""


class _PeersFile(msgspec.Struct):
    peers: list[PairedNode]


class Peers:
    """The paired nodes. All methods may be called from any thread, and raise KeyFileError."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "peers.json"
        self._lock = threading.RLock()
        self._peers: tuple[PairedNode, ...] = ()
        self._stamp: tuple[int, ...] = ()
        self._channels: dict[str, weakref.WeakSet[Closable]] = {}

    def listed(self) -> tuple[PairedNode, ...]:
        """All of them, in the order in which they were paired. The same object as long as nothing has changed."""
        with self._lock:
            if (stamp := self._stamp_now()) != self._stamp:
                self._take(self._read() if stamp else (), stamp)
            return self._peers

    def get(self, fingerprint: str) -> PairedNode:
        """NotPaired if there is none."""
        for peer in self.listed():
            if peer.fingerprint == fingerprint:
                return peer
        raise NotPaired("this node is not paired here, or no longer")

    def named(self, name: str) -> PairedNode:
        """The node with this name or fingerprint. NotPaired if there is none."""
        for peer in self.listed():
            if name in (peer.name, peer.fingerprint):
                return peer
        raise NotPaired(f"no node called {name[:80]!r} is paired here (see `nodes`)")

    def add(self, peer: PairedNode, own_name: str = "") -> PairedNode:
        """Remember `peer` and return it as it is known from now on: names, this node's too, are told apart by a number.

        A node that is known already is replaced. NotPaired if there are too many.
        """
        with self._changing() as peers:
            others = [other for other in peers if other.certificate != peer.certificate]
            if len(others) >= MAX_PEERS:
                raise NotPaired(f"{MAX_PEERS} nodes are paired, which is the most: forget one first")
            name = _free_name(node_name(peer.name), {own_name, *(other.name for other in others)})
            added = msgspec.structs.replace(peer, name=name, addresses=peer.addresses[:MAX_ADDRESSES])
            self._write([*others, added])
        return added

    def reached(self, fingerprint: str, addresses: tuple[Address, ...]) -> None:
        """Remember at which addresses a node was reached last."""
        if self.get(fingerprint).addresses == addresses:
            return
        with self._changing() as peers:
            self._write(
                [
                    msgspec.structs.replace(peer, addresses=addresses[:MAX_ADDRESSES])
                    if peer.fingerprint == fingerprint
                    else peer
                    for peer in peers
                ]
            )

    def forget(self, name: str) -> PairedNode:
        """Trust the node with this name or fingerprint no longer. Its channels are closed when this returns."""
        with self._changing() as peers:
            gone = self.named(name)
            self._write([peer for peer in peers if peer.certificate != gone.certificate])
        return gone

    def hold(self, fingerprint: str, channel: Closable) -> None:
        """Close `channel` when its peer is forgotten. NotPaired if that has happened; ChannelError at too many."""
        with self._lock:
            self.get(fingerprint)
            held = self._channels.setdefault(fingerprint, weakref.WeakSet())
            if sum(not other.closed for other in held) >= MAX_CHANNELS:
                raise ChannelError(f"{MAX_CHANNELS} channels are open with this node, which is the most")
            held.add(channel)

    @contextmanager
    def _changing(self) -> Iterator[list[PairedNode]]:
        """What is there; within the block no other thread or process changes it."""
        with self._lock:
            with _opened(self.file.with_suffix(".lock")):
                yield list(self.listed())
            self.listed()

    def _write(self, peers: list[PairedNode]) -> None:
        text = msgspec.json.format(msgspec.json.encode(_PeersFile(peers)), indent=1).decode("ascii")
        with key_files.written(self.file.parent, text + "\n") as fresh:
            fresh.replace(self.file)

    def _read(self) -> tuple[PairedNode, ...]:
        text = key_files.read(self.file)
        try:
            peers = msgspec.json.decode(text, type=_PeersFile).peers
            for peer in peers:
                check_readable(peer.certificate)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise self._unusable(str(error)) from error
        if len({peer.certificate for peer in peers}) < len(peers) or len({peer.name for peer in peers}) < len(
            peers
        ):
            raise self._unusable("a node is there twice")
        if len(peers) > MAX_PEERS:
            raise self._unusable(f"{len(peers)} nodes: must be at most {MAX_PEERS}")
        return tuple(peers)

    def _take(self, peers: tuple[PairedNode, ...], stamp: tuple[int, ...]) -> None:
        gone = {peer.fingerprint for peer in self._peers} - {peer.fingerprint for peer in peers}
        self._peers, self._stamp = peers, stamp
        for channel in [channel for one in gone for channel in self._channels.pop(one, ())]:
            channel.close()

    def _stamp_now(self) -> tuple[int, ...]:
        try:
            found = self.file.stat()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise KeyFileError(f"cannot read {self.file}: {error.strerror}") from error
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode

    def _unusable(self, why: str) -> KeyFileError:
        return KeyFileError(
            f"{self.file}: {why}: restore it from a copy, or remove it and pair all nodes again"
        )


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, with the first number behind it that makes it one of a kind."""
    number = 2
    free = name
    while free in taken:
        free, number = f"{name[:60]}-{number}", number + 1
    return free


@contextmanager
def _opened(lock: Path) -> Iterator[None]:
    """Within the block no other process has `lock`. A change takes a moment, unless a process is stopped in it."""
    try:
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise KeyFileError(f"cannot write into {lock.parent}: {error.strerror}") from error
    with file:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise KeyFileError(f"{lock}: another process does not let go of it") from error
                time.sleep(0.01)
        yield
