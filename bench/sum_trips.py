"""One sum of all ranks over TLS: star, exchange and sliced in turn, and gloo's allreduce, by size and delay.

    python bench/sum_trips.py [--ranks 2,4] [--bytes 4096,16384,262144,8388608] [--delays 0,1,5] [--rounds 30]
        [--memory]

All ranks are processes on this machine with one thread each, as f32. A delay (milliseconds, each way) is that of relays
between every two ranks; gloo dials by itself, so it is measured without one. Median and the middle half, in ms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import get_args

import numpy as np

from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import dial
from shoal.comm.group.group_protocol import OURS, Speaks
from shoal.comm.group.introduced import Introduced
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.sums.manners import Manner, Manners, SumTopology
from shoal.comm.group.sums.star import Hub, Spoke

WAIT_S = 60.0
COLUMNS = 1024  # of a row of f32: 4 KiB
RELAY = Path(__file__).parent / "hosts" / "relay.py"
TOPOLOGIES: tuple[SumTopology, ...] = get_args(SumTopology)


def channels(
    directory: str, rank: int, ranks: int, wire: Connection, memory: bool = False
) -> dict[int, Channel]:
    """To every other rank, by rank; the higher dials the lower. `wire` tells this rank's port, and where others are.
    `memory`: they may go on through memory that they share."""
    speaks = OURS if memory else Speaks()
    identities = [NodeIdentity.of(Path(directory) / str(it), f"rank{it}") for it in range(ranks)]
    known = Introduced({it: one.certificate for it, one in enumerate(identities) if it != rank})
    found: dict[int, Channel] = {}
    with GroupListener(identities[rank], known, [("127.0.0.1", 0)], speaks=speaks) as listener:
        wire.send(listener.addresses[0][1])
        ports: dict[int, int] = wire.recv()
        for lower in range(rank):
            peer = identities[lower].fingerprint
            address = ("127.0.0.1", ports[lower])
            found[lower] = dial(identities[rank], known, peer, "data", [address], speaks=speaks)
        while len(found) < ranks - 1:
            channel = listener.accept(WAIT_S)
            assert channel is not None
            assert channel.peer is not None
            found[known.rank(channel.peer)] = channel
    return found


def follow(directory: str, rank: int, ranks: int, wire: Connection, memory: bool) -> None:
    found = channels(directory, rank, ranks, wire, memory)
    fellows = {it: channel for it, channel in found.items() if it}
    spoke = Spoke(found[0], 1, rank=rank, ranks=ranks, fellows=fellows, most_bytes=1 << 24)
    spoke.watch()  # as groups do
    while order := spoke.next():
        if order == b"end":
            return
        rows, rounds = np.frombuffer(order, np.int32)
        partial = np.ones((int(rows), COLUMNS), np.float32)
        for _ in range(rounds):
            spoke.allreduce(partial)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def relayed(port: int, delay_ms: float, relays: list[subprocess.Popen[str]]) -> int:
    """A port that leads there after a delay."""
    if not delay_ms:
        return port
    near = free_port()
    relay = subprocess.Popen(
        [sys.executable, str(RELAY), f"127.0.0.1:{near}", f"127.0.0.1:{port}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert relay.stdin is not None
    assert relay.stdout is not None
    relay.stdout.readline()
    relay.stdin.write(f'{{"delay_s": {delay_ms / 1000}}}\n')
    relay.stdin.flush()
    relay.stdout.readline()
    relays.append(relay)
    return near


def measured(
    ranks: int, delay_ms: float, sizes: list[int], rounds: int, memory: bool
) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of each sum, by topology and bytes."""
    took: dict[tuple[str, int], list[float]] = {}
    relays: list[subprocess.Popen[str]] = []
    forked = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        for it in range(ranks):
            NodeIdentity.of(Path(directory) / str(it), f"rank{it}")
        wires = [forked.Pipe() for _ in range(ranks)]
        workers = [
            forked.Process(target=follow, args=(directory, rank, ranks, wires[rank][1], memory), daemon=True)
            for rank in range(1, ranks)
        ]
        for worker in workers:
            worker.start()
        ports: dict[int, int] = {rank: wires[rank][0].recv() for rank in range(1, ranks)}

        class Own:
            """The pipe of rank 0, which is here: when its port is known, all may dial."""

            def send(self, port: int) -> None:
                ports[0] = port
                for rank in range(1, ranks):
                    lower = {it: relayed(ports[it], delay_ms, relays) for it in range(rank)}
                    wires[rank][0].send(lower)

            def recv(self) -> dict[int, int]:
                return {}

        found = channels(directory, 0, ranks, Own(), memory)  # type: ignore[arg-type]
        hub = Hub([found[rank] for rank in range(1, ranks)], 1)
        hub.watch()
        for size in sizes:
            rows = max(1, size // 4 // COLUMNS)
            partial = np.ones((rows, COLUMNS), np.float32)
            count = max(5, min(rounds, rounds * 65536 // size))
            for _ in range(3):
                for topology in TOPOLOGIES:
                    hub.decide(Manners(Manner(topology), Manner(topology)))
                    hub.begin(np.array([rows, count + 1], np.int32).tobytes())
                    for number in range(count + 1):
                        began_s = time.perf_counter()
                        hub.allreduce(partial)
                        if number:
                            took.setdefault((topology, size), []).append(
                                1e3 * (time.perf_counter() - began_s)
                            )
                    hub.end()
        hub.begin(b"end")
        for worker in workers:
            worker.join(WAIT_S)
        for relay in relays:
            relay.kill()
            relay.wait()
    return took


def gloo_rank(
    rank: int, ranks: int, port: int, sizes: list[int], rounds: int, wire: Connection | None
) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    for size in sizes:
        partial = torch.ones(size // 4)
        took = []
        for number in range(3 * max(5, min(rounds, rounds * 65536 // size)) + 1):
            began_s = time.perf_counter()
            distributed.all_reduce(partial)
            if number:
                took.append(1e3 * (time.perf_counter() - began_s))
        if wire is not None:
            wire.send(took)
    distributed.destroy_process_group()


def gloo(ranks: int, sizes: list[int], rounds: int) -> dict[tuple[str, int], list[float]]:
    spawned = multiprocessing.get_context("spawn")
    near, far = spawned.Pipe()
    port = free_port()
    processes = [
        spawned.Process(
            target=gloo_rank, args=(rank, ranks, port, sizes, rounds, None if rank else far), daemon=True
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = {("gloo", size): near.recv() for size in sizes}
    for process in processes:
        process.join(WAIT_S)
    return found


def cell(took: list[float] | None) -> str:
    if not took:
        return "–"
    low, middle, high = quantiles(took, n=4)
    return f"{middle:.3g} ({low:.3g}–{high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--bytes", default="4096,16384,262144,8388608")
    parser.add_argument("--delays", default="0,1,5")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--memory", action="store_true", help="ranks share memory, as those of one machine do"
    )
    arguments = parser.parse_args()
    sizes = [int(text) for text in arguments.bytes.split(",")]
    print("| ranks | delay, ms | bytes | star, ms | exchange, ms | sliced, ms | gloo, ms |")
    print("|---|---|---|---|---|---|---|")
    for ranks in map(int, arguments.ranks.split(",")):
        for delay_ms in map(float, arguments.delays.split(",")):
            took = measured(ranks, delay_ms, sizes, arguments.rounds, arguments.memory)
            if not delay_ms:
                took |= gloo(ranks, sizes, arguments.rounds)
            for size in sizes:
                cells = [cell(took.get((kind, size))) for kind in (*TOPOLOGIES, "gloo")]
                print(f"| {ranks} | {delay_ms:g} | {size:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
