"""One sum of all ranks over TLS: star, exchange and sliced in turn, and gloo's allreduce, by size and delay.

    python bench/sum_trips.py [--ranks 2,4] [--bytes 4096,16384,262144,8388608] [--delays 0,1,5] [--rounds 30]
        [--memory]

All ranks are processes on this machine with one thread each, as f32. With a delay (milliseconds, each way) they are
hosts that are so far from each other, which wants root (`hosts/far.py`). Median and the middle half, in ms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import get_args

import numpy as np
from hosts.far import DEVICE, address, enter, far

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
HERE = "127.0.0.1"
TURNS = 3
Took = dict[tuple[str, int], list[float]]  # milliseconds of each sum, by kind and bytes
TOPOLOGIES: tuple[SumTopology, ...] = get_args(SumTopology)


def channels(
    directory: str, rank: int, ranks: int, wire: Connection, memory: bool, host: str
) -> dict[int, Channel]:
    """To every other rank, by rank; the higher dials the lower. `wire` tells this rank's port, and those of all.
    `memory`: they may go on through memory that they share."""
    speaks = OURS if memory else Speaks()
    identities = [NodeIdentity.of(Path(directory) / str(it), f"rank{it}") for it in range(ranks)]
    known = Introduced({it: one.certificate for it, one in enumerate(identities) if it != rank})
    found: dict[int, Channel] = {}
    with GroupListener(identities[rank], known, [(host, 0)], speaks=speaks) as listener:
        wire.send(listener.addresses[0][1])
        ports: dict[int, int] = wire.recv()
        for lower in range(rank):
            peer = identities[lower].fingerprint
            at = (HERE if host == HERE else address(lower), ports[lower])
            found[lower] = dial(identities[rank], known, peer, "data", [at], speaks=speaks)
        while len(found) < ranks - 1:
            channel = listener.accept(WAIT_S)
            assert channel is not None
            assert channel.peer is not None
            found[known.rank(channel.peer)] = channel
    return found


def rank_process(
    directory: str,
    memory: bool,
    rank: int,
    ranks: int,
    wire: Connection,
    inside: str,
    sizes: list[int],
    rounds: int,
) -> None:
    """One rank. Rank 0 sends what it measured into `wire`, size by size."""
    if inside:
        enter(inside)
    found = channels(directory, rank, ranks, wire, memory, address(rank) if inside else HERE)
    if not rank:
        wire.send(lead([found[it] for it in range(1, ranks)], sizes, rounds))
        return
    fellows = {it: channel for it, channel in found.items() if it}
    spoke = Spoke(found[0], 1, rank=rank, ranks=ranks, fellows=fellows, most_bytes=1 << 24)
    spoke.watch()  # as groups do
    while order := spoke.next():
        if order == b"end":
            return
        rows, count = np.frombuffer(order, np.int32)
        partial = np.ones((int(rows), COLUMNS), np.float32)
        for _ in range(count):
            spoke.allreduce(partial)


def lead(workers: list[Channel], sizes: list[int], rounds: int) -> Took:
    took: Took = {}
    hub = Hub(workers, 1)
    hub.watch()
    for size in sizes:
        rows = max(1, size // 4 // COLUMNS)
        partial = np.ones((rows, COLUMNS), np.float32)
        count = counted(size, rounds)
        for _ in range(TURNS):
            for topology in TOPOLOGIES:
                hub.decide(Manners(Manner(topology), Manner(topology)))
                hub.begin(np.array([rows, count + 1], np.int32).tobytes())
                times = [timed(hub.allreduce, partial) for _ in range(count + 1)]
                took.setdefault((topology, size), []).extend(times[1:])
                hub.end()
    hub.begin(b"end")
    return took


def gloo_rank(rank: int, ranks: int, wire: Connection, inside: str, sizes: list[int], rounds: int) -> None:
    if inside:
        enter(inside)
        os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    first = address(0) if inside else HERE
    if not rank:
        with socket.create_server((first, 0)) as server:
            wire.send(server.getsockname()[1])
    distributed.init_process_group(
        "gloo", init_method=f"tcp://{first}:{wire.recv()[0]}", rank=rank, world_size=ranks
    )
    took: Took = {}
    for size in sizes:
        partial = torch.ones(size // 4)
        times = [timed(distributed.all_reduce, partial) for _ in range(TURNS * counted(size, rounds) + 1)]
        took["gloo", size] = times[1:]
    distributed.destroy_process_group()
    if not rank:
        wire.send(took)


def counted(size: int, rounds: int) -> int:
    """Sums of one kind in a row; fewer of long ones."""
    return max(5, min(rounds, rounds * 65536 // size))


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Milliseconds."""
    began_s = time.perf_counter()
    work(*arguments)
    return 1e3 * (time.perf_counter() - began_s)


def measured(ranks: int, inside: Sequence[str], options: argparse.Namespace, sizes: list[int]) -> Took:
    """Milliseconds of each sum. `inside`: the namespaces of the ranks, "" = here."""
    spawned = multiprocessing.get_context("spawn")
    took: Took = {}
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(ranks):
            NodeIdentity.of(Path(directory) / str(rank), f"rank{rank}")
        for ours in (True, False):
            wires = [spawned.Pipe() for _ in range(ranks)]
            processes = []
            for rank, (_, wire) in enumerate(wires):
                place, work = (rank, ranks, wire, inside[rank]), (sizes, options.rounds)
                arguments = (directory, options.memory, *place, *work) if ours else (*place, *work)
                target = rank_process if ours else gloo_rank
                processes.append(spawned.Process(target=target, args=arguments, daemon=True))
            for process in processes:
                process.start()
            asked = wires if ours else wires[:1]  # gloo's ranks meet at the port of the first
            ports = {rank: near.recv() for rank, (near, _) in enumerate(asked)}
            for near, _ in wires:
                near.send(ports)
            took |= wires[0][0].recv()
            for process in processes:
                process.join(WAIT_S)
    return took


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
            if delay_ms:
                with far(ranks, delay_ms / 1000) as namespaces:
                    took = measured(ranks, namespaces, arguments, sizes)
            else:
                took = measured(ranks, [""] * ranks, arguments, sizes)
            for size in sizes:
                cells = [cell(took.get((kind, size))) for kind in (*TOPOLOGIES, "gloo")]
                print(f"| {ranks} | {delay_ms:g} | {size:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
