"""How long workers take to fetch their shards from a head, over TLS and links of a given speed.

    python bench/send_shards.py MODEL [--workers 3] [--channels 2] [--link MB/s] [--quant keep] [--cache DIR]

First one worker without a limit: what the head gives. Then one worker, and all at once, each over a link of its own
that carries its part of that (or `--link`). Then all start again, and nothing is sent. Head, workers and links are
processes of this machine and share its processors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

from round_trip import Nodes

from shoal.comm.group.dialing import dial
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.streams import Address
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import fetch_shard
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.manifest import Quant
from shoal.partition.slicing import Shard, divide

SPAWN = multiprocessing.get_context("spawn")
RELAYED_BYTES = 64 << 10
BURST_S = 0.02  # of a link's speed that it carries at once
WAIT_S = 600.0
CACHE_BYTES = 1 << 40


class Fetched(NamedTuple):
    """What one worker did. `grown_bytes`: the peak of its memory beyond the peak before."""

    nbytes: int
    seconds: float
    processor_s: float
    grown_bytes: int


class Link:
    """A relay to `target`, whose channels share a speed; 0: as fast as it can."""

    def __init__(self, target: Address, bytes_per_s: float) -> None:
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def run(self, listening: socket.socket) -> None:
        while True:
            near, _ = listening.accept()
            far = socket.create_connection(self._target)
            for ends in ((far, near), (near, far)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(RELAYED_BYTES):
                if self._bytes_per_s:
                    with self._lock:
                        begin = max(self._free_at, time.monotonic() - BURST_S)
                        self._free_at = begin + len(data) / self._bytes_per_s
                        wait_s = self._free_at - time.monotonic()
                    time.sleep(max(0.0, wait_s))
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()


@contextmanager
def linked(target: Address, bytes_per_s: float) -> Iterator[Address]:
    """An address from which a link leads to `target`; without a limit it is `target`."""
    if not bytes_per_s:
        yield target
        return
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = SPAWN.Process(target=relay, args=(listening, target, bytes_per_s), daemon=True)
        process.start()
        try:
            yield listening.getsockname()[:2]
        finally:
            process.kill()
            process.join()


def relay(listening: socket.socket, target: Address, bytes_per_s: float) -> None:
    Link(target, bytes_per_s).run(listening)


def work(directory: Path, address: Address, channels: int, cache: Path, begin: Any, results: Any) -> None:
    nodes = Nodes(directory)
    with ExitStack() as stack:
        opened = [
            stack.enter_context(
                dial(nodes.worker, nodes.known_to_worker, nodes.head.fingerprint, "weights", [address])
            )
            for _ in range(channels)
        ]
        begin.wait(WAIT_S)
        had = resource.getrusage(resource.RUSAGE_SELF)
        began_s = time.monotonic()
        with fetch_shard(opened, ShardCache(cache, CACHE_BYTES)) as weights:
            seconds = time.monotonic() - began_s
            now = resource.getrusage(resource.RUSAGE_SELF)
            nbytes = weights.pack.manifest.nbytes if weights.pack else 0
    used_s = now.ru_utime + now.ru_stime - had.ru_utime - had.ru_stime
    results.put(Fetched(nbytes, seconds, used_s, (now.ru_maxrss - had.ru_maxrss) << 10))


def fetch(
    nodes: Nodes,
    directory: Path,
    cache: Path,
    server: WeightServer,
    shards: Sequence[Shard],
    channels: int,
    link_bytes_per_s: float,
) -> list[Fetched]:
    """All these shards at once, each by a worker of its own behind a link of its own."""
    begin, results = SPAWN.Event(), SPAWN.Queue()
    workers = []
    with ExitStack() as stack:
        for shard in shards:
            listener = stack.enter_context(GroupListener(nodes.head, nodes.known, [("127.0.0.1", 0)]))
            address = stack.enter_context(linked(listener.addresses[0], link_bytes_per_s))
            own = cache / str(shard.rank)
            worker = SPAWN.Process(target=work, args=(directory, address, channels, own, begin, results))
            worker.start()
            workers.append(worker)
            for _ in range(channels):
                channel = listener.accept(WAIT_S)
                assert channel is not None
                threading.Thread(target=server.serve, args=(channel, shard), daemon=True).start()
        begin.set()
        found = [results.get(timeout=WAIT_S) for _ in shards]
        for worker in workers:
            worker.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--link", type=float, default=0.0)
    parser.add_argument("--quant", choices=get_args(Quant), default="keep")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    print("| what | MB | s | MB/s | processor s: head, workers | a worker's memory grew by, MB |")
    print("|---|---|---|---|---|---|")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.cache)))
        checkpoint = stack.enter_context(open_checkpoint(arguments.model))
        nodes = Nodes(directory)
        server = WeightServer(checkpoint, arguments.quant)
        shards = divide(checkpoint.spec, arguments.workers + 1, grains_of(checkpoint, arguments.quant))[1:]

        def row(what: str, cache: str, some: Sequence[Shard], link: float) -> float:
            had = time.process_time()
            found = fetch(nodes, directory, places / cache, server, some, arguments.channels, link)
            slowest, sent = max(it.seconds for it in found), sum(it.nbytes for it in found)
            used = ", ".join(
                f"{it:.1f}" for it in (time.process_time() - had, *(it.processor_s for it in found))
            )
            grown = max(it.grown_bytes for it in found) / 1e6
            print(
                f"| {what} | {sent / 1e6:,.0f} | {slowest:.2f} | {sent / slowest / 1e6:,.0f} | {used} | {grown:,.0f} |"
            )
            return sent / slowest

        gives = row("one, no limit", "free", shards[:1], 0)
        link = arguments.link * 1e6 or gives / arguments.workers
        one = row(f"one, {link / 1e6:,.0f} MB/s", "one", shards[:1], link)
        every = row(f"{len(shards)}, {link / 1e6:,.0f} MB/s each", "all", shards, link)
        row("started again", "all", shards, link)
        print(f"\nall took {one * len(shards) / every:.2f} times as long as one")


if __name__ == "__main__":
    main()
