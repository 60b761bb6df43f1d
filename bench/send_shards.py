"""How long workers take to fetch their shards from a head, over TLS and links of a given speed.

    python bench/send_shards.py MODEL [--workers 3] [--channels 2] [--link MB/s] [--quant keep] [--cache DIR] [--recut]

First one worker without a limit: what the head gives. Then one worker, and all at once, each over a link of its own
that carries its part of that (or `--link`). Then all start again, and nothing is sent. Head, workers and links are
processes of this machine and share its processors.

With --recut instead: the last worker was lost, the others took its part, and it comes back with nothing; then it is
lost for good, and the others fetch its part. From the head alone, over an uplink of that speed, and with what the other
workers lend, each over a link as fast.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, get_args

from round_trip import Nodes

from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import dial
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.streams import Address
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import OtherWorkers, fetch_shard
from shoal.daemon.cluster.weights.shard_lender import ShardLender
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
    """What one worker did. `grown_bytes`: the peak of its memory beyond the peak before. `kept_bytes` it had in other
    shards, `lent_bytes` came from other workers."""

    nbytes: int
    seconds: float
    processor_s: float
    grown_bytes: int
    kept_bytes: int
    lent_bytes: int


class Link:
    """A relay to `target`, whose channels share a speed, with other links that have the same `free_at`."""

    def __init__(self, target: Address, bytes_per_s: float, free_at: Any) -> None:
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._free_at = free_at

    def run(self, listening: socket.socket) -> None:
        while True:
            near, _ = listening.accept()
            far = socket.create_connection(self._target)
            for ends in ((far, near), (near, far)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(RELAYED_BYTES):
                with self._free_at.get_lock():
                    begin = max(self._free_at.value, time.monotonic() - BURST_S)
                    self._free_at.value = begin + len(data) / self._bytes_per_s
                    wait_s = self._free_at.value - time.monotonic()
                time.sleep(max(0.0, wait_s))
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()


@contextmanager
def linked(target: Address, bytes_per_s: float, free_at: Any = None) -> Iterator[Address]:
    """An address from which a link leads to `target`; without a limit it is `target`. `free_at`: see `Link`."""
    if not bytes_per_s:
        yield target
        return
    with socket.create_server(("127.0.0.1", 0)) as listening:
        carried = (listening, target, bytes_per_s, free_at or SPAWN.Value("d", 0.0))
        process = SPAWN.Process(target=relay, args=carried, daemon=True)
        process.start()
        try:
            yield listening.getsockname()[:2]
        finally:
            process.kill()
            process.join()


def relay(listening: socket.socket, target: Address, bytes_per_s: float, free_at: Any) -> None:
    Link(target, bytes_per_s, free_at).run(listening)


def work(
    directory: Path,
    address: Address,
    channels: int,
    cache: Path,
    doors: Sequence[Address],
    begin: Any,
    results: Any,
) -> None:
    """`doors`: of other workers that may lend something."""
    nodes = Nodes(directory)

    def reached(at: Address) -> Channel:
        return dial(nodes.worker, nodes.known_to_worker, nodes.head.fingerprint, "weights", [at])

    others = OtherWorkers([partial(reached, door) for door in doors], partial(reached, address))
    with ExitStack() as stack:
        opened = [stack.enter_context(reached(address)) for _ in range(channels)]
        begin.wait(WAIT_S)
        had = resource.getrusage(resource.RUSAGE_SELF)
        began_s = time.monotonic()
        with fetch_shard(opened, ShardCache(cache, CACHE_BYTES), others=others) as weights:
            seconds = time.monotonic() - began_s
            now = resource.getrusage(resource.RUSAGE_SELF)
            nbytes = weights.pack.manifest.nbytes if weights.pack else 0
    used_s = now.ru_utime + now.ru_stime - had.ru_utime - had.ru_stime
    grown_bytes = (now.ru_maxrss - had.ru_maxrss) << 10
    results.put(Fetched(nbytes, seconds, used_s, grown_bytes, weights.kept_bytes, weights.lent_bytes))


@contextmanager
def open_door(
    nodes: Nodes, serve: Callable[[Channel], None], link_bytes_per_s: float, free_at: Any = None
) -> Iterator[Address]:
    """Where channels are answered by `serve`, behind a link."""
    with (
        GroupListener(nodes.head, nodes.known, [("127.0.0.1", 0)]) as listener,
        linked(listener.addresses[0], link_bytes_per_s, free_at) as address,
    ):
        closed = threading.Event()

        def let_in() -> None:
            while not closed.is_set():
                if (channel := listener.accept(0.2)) is not None:
                    threading.Thread(target=serve, args=(channel,), daemon=True).start()

        thread = threading.Thread(target=let_in)
        thread.start()
        try:
            yield address
        finally:
            closed.set()
            thread.join()


def fetch(
    nodes: Nodes,
    directory: Path,
    cache: Path,
    server: WeightServer,
    shards: Sequence[Shard],
    channels: int,
    link_bytes_per_s: float,
    uplink: Any = None,
    lending: bool = False,
) -> list[Fetched]:
    """All these shards at once, each by a worker of its own behind a link of its own, or all behind `uplink`. The cache
    of each is named after its rank. `lending`: the workers whose caches are there lend each other what they have."""
    begin, results = SPAWN.Event(), SPAWN.Queue()
    workers = []
    with ExitStack() as stack:
        doors = {}
        for there in sorted(cache.glob("*")) if lending else ():
            lender = ShardLender(ShardCache(there, CACHE_BYTES), server.key)
            serve = partial(lend, lender, count())
            doors[there.name] = stack.enter_context(open_door(nodes, serve, link_bytes_per_s))
        for shard in shards:
            serve = partial(server.serve, shard=shard)
            address = stack.enter_context(open_door(nodes, serve, link_bytes_per_s, uplink))
            name = str(shard.rank)
            others = [door for whose, door in doors.items() if whose != name]
            arguments = (directory, address, channels, cache / name, others, begin, results)
            worker = SPAWN.Process(target=work, args=arguments)
            worker.start()
            workers.append(worker)
        begin.set()
        found = [results.get(timeout=WAIT_S) for _ in shards]
        for worker in workers:
            worker.join()
    return found


def lend(lender: ShardLender, number: Iterator[int], channel: Channel) -> None:
    lender.serve(next(number), channel)


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
    parser.add_argument("--recut", action="store_true")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.cache)))
        checkpoint = stack.enter_context(open_checkpoint(arguments.model))
        nodes = Nodes(directory)
        server = WeightServer(checkpoint, arguments.quant)
        grains = grains_of(checkpoint, arguments.quant)
        shards = divide(checkpoint.spec, arguments.workers + 1, grains)[1:]
        if arguments.recut:
            fewer = divide(checkpoint.spec, arguments.workers, grains)[1:]
            recut(nodes, directory, places, server, shards, fewer, arguments)
            return
        print("| what | MB | s | MB/s | processor s: head, workers | a worker's memory grew by, MB |")
        print("|---|---|---|---|---|---|")

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


def recut(
    nodes: Nodes,
    directory: Path,
    places: Path,
    server: WeightServer,
    every: Sequence[Shard],
    fewer: Sequence[Shard],
    arguments: argparse.Namespace,
) -> None:
    """The shards of all workers, and of all but the last."""
    link = arguments.link * 1e6
    rest = [shard for shard in every if shard.rank <= len(fewer)]
    print("| what | MB | had | from the head | from others | s |")
    print("|---|---|---|---|---|---|")
    for what, before, after in (
        ("one comes back with nothing", fewer, every[-1:]),
        ("one is lost", rest, fewer),
    ):
        for lending in (False, True):
            cache = places / f"{what} {lending}"
            fetch(nodes, directory, cache, server, before, arguments.channels, 0)
            uplink = SPAWN.Value("d", 0.0)
            found = fetch(nodes, directory, cache, server, after, arguments.channels, link, uplink, lending)
            whole, kept, lent = (
                sum(column) / 1e6
                for column in zip(*((it.nbytes, it.kept_bytes, it.lent_bytes) for it in found), strict=True)
            )
            how = f"{what}, {'all lend' if lending else 'the head alone'}, {link / 1e6:,.0f} MB/s"
            slowest = max(it.seconds for it in found)
            print(
                f"| {how} | {whole:,.0f} | {kept:,.0f} | {whole - kept - lent:,.0f} | {lent:,.0f} | {slowest:.2f} |"
            )


if __name__ == "__main__":
    main()
