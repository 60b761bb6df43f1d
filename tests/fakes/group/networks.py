"""A local network without multicast: whoever announces itself is found, and what others made up; and slow roads."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from shoal.comm.group.discovery import FINGERPRINT_DIGITS, MAX_HEADS, FoundHead
from shoal.comm.group.streams import Address
from shoal.daemon.cluster.routes.local_network import LocalNetwork


class FakeNetwork(LocalNetwork):
    """`trouble`: both methods raise it. Of all who are meant, only the first `MAX_HEADS` are found."""

    def __init__(self, *heads: FoundHead, trouble: str = "") -> None:
        self.heads = list(heads)
        self.trouble = trouble
        self.looked = 0

    def announce(self, head: FoundHead) -> Told:
        self._check()
        self.heads.append(head)
        return Told(self, head)

    def find(self, fingerprint: str = "") -> list[FoundHead]:
        self.looked += 1
        self._check()
        said = [replace(head, fingerprint=head.fingerprint[:FINGERPRINT_DIGITS]) for head in self.heads]
        digits = fingerprint[:FINGERPRINT_DIGITS]
        return [head for head in said if head.fingerprint.startswith(digits)][:MAX_HEADS]

    def _check(self) -> None:
        if self.trouble:
            raise OSError(self.trouble)


class Told:
    def __init__(self, network: FakeNetwork, head: FoundHead) -> None:
        self._network, self._head = network, head

    def close(self) -> None:
        self._network.heads.remove(self._head)


@contextmanager
def slow_road(target: Address, host: str = "127.0.0.2", delay_s: float = 0.005) -> Iterator[Address]:
    """An address of `host` that leads to `target`; whatever goes there or comes back takes `delay_s`."""
    ends: list[socket.socket] = []

    def carry(source: socket.socket, sink: socket.socket) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def deliver() -> None:
            with suppress(OSError):
                while True:
                    due_s, data = under_way.get()
                    time.sleep(max(0.0, due_s - time.monotonic()))
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)

        threading.Thread(target=deliver, daemon=True).start()
        data = b"-"
        while data:
            try:
                data = source.recv(16 << 10)
            except OSError:
                data = b""
            under_way.put((time.monotonic() + delay_s, data))

    def run(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection(target)
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    with socket.create_server((host, 0)) as server:
        threading.Thread(target=run, args=(server,), daemon=True).start()
        yield server.getsockname()
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
    for one in ends:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
