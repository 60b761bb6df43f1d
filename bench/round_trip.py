"""A round between the ranks of a star: bare TCP, `ssl.SSLSocket`, Shoal's channel over TLS and through memory, in turn.

    python bench/round_trip.py [--ranks 2,4] [--bytes 16384,8388608] [--rounds 15] [--pin]

Rank 0 sends so many bytes to every other rank, and each sends as many back. All ranks are processes on this machine,
and there is nothing to compute. Bare sockets wait for ever and so need one call less; a channel has deadlines. With
--pin every rank has a processor of its own, as machines have: otherwise the system puts both ends of a bare socket on
one, where nobody has to be woken.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Protocol

from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import dial
from shoal.comm.group.group_protocol import OURS, Speaks
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import PairedNode, Peers
from shoal.comm.group.tls import client_context, server_context

HEADER = bytes(16)
PROCESSORS = sorted(os.sched_getaffinity(0))
WAIT_S = 60.0


class Link(Protocol):
    def send(self, payload: memoryview) -> None: ...
    def receive(self, view: memoryview) -> None: ...


class Bare:
    """A blocking socket, plain or of `ssl`; header and payload in one send."""

    def __init__(self, connected: socket.socket, size: int) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._message = bytearray(len(HEADER) + size)

    def send(self, payload: memoryview) -> None:
        self._message[len(HEADER) :] = payload
        self._socket.sendall(self._message)

    def receive(self, view: memoryview) -> None:
        filled = 0
        while filled < len(view):
            if not (count := self._socket.recv_into(view[filled:])):
                raise EOFError
            filled += count


class Ours:
    """A channel."""

    def __init__(self, channel: Channel) -> None:
        channel.watch()  # as groups do
        self._channel = channel

    def send(self, payload: memoryview) -> None:
        self._channel.send(HEADER, payload)

    def receive(self, view: memoryview) -> None:
        self._channel.receive_into(view, WAIT_S)


class Nodes:
    """Two paired nodes, of which all workers are the second."""

    def __init__(self, directory: Path) -> None:
        self.head, self.worker = (NodeIdentity.of(directory / name, name) for name in ("head", "worker"))
        self.known = Peers(directory / "head")
        self.known.add(PairedNode("worker", "worker", self.worker.certificate))
        self.known_to_worker = Peers(directory / "worker")
        self.known_to_worker.add(PairedNode("head", "head", self.head.certificate))


def pin(rank: int) -> None:
    """This process has one of the processors to itself, as far as there are enough."""
    os.sched_setaffinity(0, {PROCESSORS[rank % len(PROCESSORS)]})


def echo(connect: Callable[[], Link], size: int, rank: int) -> None:
    """A worker: what comes goes back, until the other side ends."""
    if rank:
        pin(rank)
    link = connect()
    view = memoryview(bytearray(len(HEADER) + size))
    try:
        while True:
            link.receive(view)
            link.send(view[len(HEADER) :])
    except Exception:  # whatever it is, rank 0 has gone
        return


def star(nodes: Nodes, kind: str, workers: int, size: int, pinned: bool) -> list[Link]:
    """Rank 0's links to so many new processes."""
    started = count(1)

    def start(connect: Callable[[], Link]) -> None:
        operands = (connect, size, next(started) if pinned else 0)
        multiprocessing.get_context("fork").Process(target=echo, args=operands, daemon=True).start()

    if kind in ("shoal", "memory"):
        speaks = OURS if kind == "memory" else Speaks()
        with GroupListener(nodes.head, nodes.known, [("127.0.0.1", 0)]) as listener:
            addresses, links = listener.addresses, list[Link]()
            for _ in range(workers):
                start(
                    lambda: Ours(
                        dial(
                            nodes.worker,
                            nodes.known_to_worker,
                            nodes.head.fingerprint,
                            "data",
                            addresses,
                            speaks=speaks,
                        )
                    )
                )
                channel = listener.accept(WAIT_S)
                assert channel is not None
                links.append(Ours(channel))
            return links
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def connected() -> socket.socket:
            plain = socket.create_connection(("127.0.0.1", port))
            return (
                client_context(nodes.worker, nodes.head.certificate).wrap_socket(plain)
                if kind == "ssl"
                else plain
            )

        links = []
        for _ in range(workers):
            start(lambda: Bare(connected(), size))
            plain, _ = server.accept()
            if kind == "ssl":
                context = server_context(nodes.head, [nodes.worker.certificate])
                plain = context.wrap_socket(plain, server_side=True)
            links.append(Bare(plain, size))
        return links


def measure(
    nodes: Nodes, ranks: int, size: int, rounds: int, repeats: int, pinned: bool
) -> dict[str, list[float]]:
    """Microseconds of every round trip, of each kind in turn."""
    links = {kind: star(nodes, kind, ranks - 1, size, pinned) for kind in ("tcp", "ssl", "shoal", "memory")}
    payload, view = memoryview(bytearray(size)), memoryview(bytearray(len(HEADER) + size))
    took_us: dict[str, list[float]] = {kind: [] for kind in links}
    for number in range(rounds + 1):
        for kind, star_links in links.items():
            for _ in range(repeats):
                start = time.perf_counter()
                for link in star_links:
                    link.send(payload)
                for link in star_links:
                    link.receive(view)
                if number:
                    took_us[kind].append((time.perf_counter() - start) * 1e6)
    return took_us


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--bytes", default="16384,8388608")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pin", action="store_true", help="each rank on a processor of its own")
    arguments = parser.parse_args()
    print(
        "| ranks | bytes | tcp, µs | ssl, µs | shoal, µs | memory, µs | ssl / tcp | shoal / tcp | memory / tcp"
        " | shoal, MB/s each way | memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    if arguments.pin:
        pin(0)
    with tempfile.TemporaryDirectory() as directory:
        nodes = Nodes(Path(directory))
        for size in map(int, arguments.bytes.split(",")):
            for ranks in map(int, arguments.ranks.split(",")):
                repeats = max(5, 200 * 16384 // max(size, 16384))
                took_us = measure(nodes, ranks, size, arguments.rounds, repeats, arguments.pin)
                tcp, tls, ours, memory = (median(took_us[kind]) for kind in took_us)
                moved = size * (ranks - 1)
                print(
                    f"| {ranks} | {size:,} | {tcp:,.0f} | {tls:,.0f} | {ours:,.0f} | {memory:,.0f} |"
                    f" {tls / tcp:.2f} | **{ours / tcp:.2f}** | {memory / tcp:.2f} |"
                    f" {moved / ours:,.0f} | {moved / memory:,.0f} |"
                )


if __name__ == "__main__":
    main()
