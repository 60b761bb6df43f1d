"""Machines of a group in one process, each with a directory of its own; and what goes wrong between them."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import dial
from shoal.comm.group.errors import GroupError
from shoal.comm.group.group_protocol import Speaks
from shoal.comm.group.join_code import Codes
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import PairedNode, Peers
from shoal.comm.group.streams import Address, SocketStream, TlsStream
from shoal.comm.group.tls import server_context

BARE = Speaks()  # no feature
LOOPBACK = [("127.0.0.1", 0)]


@dataclass
class Machine:
    identity: NodeIdentity
    peers: Peers
    codes: Codes

    @classmethod
    def at(cls, directory: Path, name: str) -> Machine:
        return cls(NodeIdentity.of(directory / name, name), Peers(directory / name), Codes())

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    def trust(self, other: Machine, role: str) -> None:
        self.peers.add(PairedNode(other.identity.name, role, other.identity.certificate))

    def listening(self, **options: object) -> GroupListener:
        return GroupListener(self.identity, self.peers, LOOPBACK, self.codes, **options)

    def dial(
        self, other: Machine, addresses: tuple[Address, ...], purpose: str = "control", **options
    ) -> Channel:
        return dial(self.identity, self.peers, other.fingerprint, purpose, addresses, **options)


def paired(directory: Path) -> tuple[Machine, Machine]:
    """A head and a worker."""
    head, worker = Machine.at(directory, "head"), Machine.at(directory, "worker")
    head.trust(worker, "worker")
    worker.trust(head, "head")
    return head, worker


@contextmanager
def joined(directory: Path, speaks: Speaks = BARE) -> Iterator[tuple[Channel, Channel]]:
    """The two ends, head's first, of an open channel over TLS; or through memory, if they speak of that."""
    head, worker = paired(directory)
    with (
        head.listening() as listener,
        worker.dial(head, listener.addresses, "data", speaks=speaks) as at_worker,
    ):
        at_head = listener.accept(5)
        assert at_head is not None
        with at_head:
            yield at_head, at_worker


def footprint() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return threading.active_count(), psutil.Process().num_fds()


def begun_threads() -> Callable[[], list[str]]:
    """→ what tells the names of the threads that have begun since now and are still there. Those of an earlier test may
    end meanwhile, so numbers say little."""
    before = threading.enumerate()
    return lambda: [it.name for it in threading.enumerate() if it not in before]


def back_to(before: tuple[int, int]) -> bool:
    """Whether there are soon no more threads and descriptors than `before`. Those of an earlier test may have gone."""
    deadline = time.monotonic() + 5
    while any(now > then for now, then in zip(footprint(), before, strict=True)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def tls(address: Address, context: ssl.SSLContext) -> Channel:
    """A channel without a word said, by any context."""
    below = SocketStream(socket.create_connection(address, timeout=5))
    stream = TlsStream(below, context, server_side=False)
    try:
        stream.handshake(time.monotonic() + 5)
    except BaseException:
        below.abort()
        below.close()
        raise
    return Channel(stream)


@contextmanager
def relay(target: Address) -> Iterator[tuple[Address, bytearray]]:
    """An address that passes bytes on, and what the dialling side sent so far."""
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            near, _ = server.accept()
            far = socket.create_connection(target)

            def carry(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
                with suppress(OSError):
                    while data := source.recv(65536):
                        kept += data
                        sink.sendall(data)
                    sink.shutdown(socket.SHUT_WR)

            with near, far:
                back = threading.Thread(target=carry, args=(far, near, bytearray()), daemon=True)
                back.start()
                carry(near, far, sent)
                back.join(5)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield server.getsockname(), sent
        thread.join(5)


@contextmanager
def mute(machine: Machine) -> Iterator[Address]:
    """The address of a server of TLS that then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            near = TlsStream(
                SocketStream(server.accept()[0]), server_context(machine.identity, []), server_side=True
            )
            with suppress(GroupError):
                near.handshake(time.monotonic() + 5)
                while True:
                    near.receive(memoryview(bytearray(100)), time.monotonic() + 5)
            near.abort()
            near.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()
        thread.join(5)


@contextmanager
def stalled(target: Address) -> Iterator[Address]:
    """An address that shows the certificate of `target`, as it passes on what that says first, and no more."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            near, _ = server.accept()
            with near, socket.create_connection(target) as far:
                back = threading.Thread(target=first_only, args=(far, near))
                back.start()
                with suppress(OSError):
                    while data := near.recv(65536):
                        far.sendall(data)
                with suppress(OSError):
                    far.shutdown(socket.SHUT_RDWR)
                back.join(10)

        def first_only(far: socket.socket, near: socket.socket) -> None:
            with suppress(OSError):
                near.sendall(far.recv(65536))
                while far.recv(65536):
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        yield server.getsockname()
        thread.join(10)
