"""Helper: a head and workers in one process, over TLS on loopback, each with a home and a budget of its own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

from shoal.comm.cluster_messages import Invitation, Invite, NodesReply, NodeStatus
from shoal.comm.cluster_messages import Nodes as AskNodes
from shoal.comm.group.sums.wire_types import WireType
from shoal.comm.home import Home
from shoal.daemon.cluster.forming import Choosing, Forming
from shoal.daemon.cluster.membership import Membership
from shoal.daemon.cluster.pairing_up import pair_with_head
from shoal.daemon.cluster.roster import Roster
from shoal.daemon.cluster.served_shard import ServedShard
from shoal.daemon.cluster.shard_stores import ShardStores, send_weights
from shoal.daemon.cluster.speed import NodeSpeed
from shoal.daemon.cluster.steady_shares import SteadyShares
from shoal.daemon.config import NodeConfig
from shoal.daemon.library.kv_files import KvFiles
from shoal.daemon.library.packs import Packs
from shoal.daemon.node import Node
from shoal.offload.budget import Budget
from shoal.partition.group_choice import Choice, KeptCuts, NoGroup
from shoal.partition.group_search import choose
from shoal.partition.machines import Links, Machine
from shoal.partition.plan import Wanted
from shoal.partition.slicing import Grains
from shoal.partition.spec import BlockId
from shoal.partition.sum_cost import Topology

PATIENCE_S = 20.0
PORTS = 100
_first = 12_000 + PORTS * (os.getpid() % 200)
_ports = cycle(range(_first, _first + PORTS))
WORKER_BYTES = 1 << 30


SPEED = NodeSpeed(1e10, 1e11, 1e9)


def everybody(
    wanted: Wanted,
    block_bytes: Mapping[BlockId, int],
    machines: Sequence[Machine],
    links: Links,
    *,
    grains: Grains,
    topologies: Sequence[Topology],
    wires: Sequence[WireType],
    ranks: int | None,
    kept: KeptCuts,
    **measured: object,
) -> Choice | NoGroup:
    """All machines take part, which would make no small model faster, however fast they turn out to be."""
    return choose(
        wanted,
        block_bytes,
        machines,
        links,
        grains=grains,
        topologies=topologies,
        wires=wires,
        ranks=ranks or len(machines),
        kept=kept,
    )


def prompts_by_everybody(*about: Any, **more: Any) -> Choice | NoGroup:
    """As `everybody`, but answers are decoded by the head alone. Steps of 8 rows or more are for all."""
    found = everybody(*about, **more)
    if isinstance(found, NoGroup) or len(found.ranks) == 1 or more["ranks"]:
        return found
    return found._replace(split="prompts", freely=None, figures=found.figures._replace(group_rows=8))


class Cluster:
    """`workers` may be stopped and started again by number."""

    def __init__(
        self, directory: Path, config: NodeConfig, workers: int, choosing: Choosing = everybody
    ) -> None:
        self.directory = directory
        self._choosing = choosing
        self.by: Callable[[str], str] = lambda address: address  # at which workers find that of the head
        self._config = config
        self.speed = SPEED  # of the head
        self._start_head()
        self.workers: dict[int, Membership] = {}
        for number in range(1, workers + 1):
            self.join(number)
        self.wait(workers)

    def _start_head(self) -> None:
        self.roster = Roster()
        head = self.home(0)
        self.node = Node(
            self._config,
            packs=Packs(head),
            kv_root=head.kv,
            grouping=Forming(
                self.roster,
                send_weights,
                lambda: self.speed,
                self._choosing,
                steady=SteadyShares(head.cluster / "shares.json"),
            ),
        )
        self.head = Membership(
            head.cluster, self._config, self.node.budget, self.roster, ShardStores(head.shards), lambda: SPEED
        )
        self.node.neighbours = self.head

    def restart_head(self) -> None:
        """It forgets everything but its files; the workers attach again."""
        self.node.close()
        self.head.close()
        self._start_head()
        self.head.start()
        self.wait(len(self.workers))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.node.close()
        self.head.close()
        for worker in self.workers.values():
            worker.close()

    def home(self, number: int) -> Home:
        """Of a worker; 0 is the head."""
        return Home(self.directory / (f"worker{number}" if number else "head"))

    def invite(self) -> Invitation:
        listen = [f"127.0.0.1:{free_port()}"] if self.head.role == "alone" else []
        invitation = self.head.answer(Invite(listen=listen))
        assert isinstance(invitation, Invitation)
        return invitation

    def join(self, number: int) -> None:
        """A new machine is paired, and attaches."""
        invitation = self.invite()
        pair_with_head(self.home(number), invitation.code, [self.by(invitation.addresses[0])])
        self.start(number)

    def start(self, number: int) -> None:
        home = self.home(number)
        worker = Membership(
            home.cluster,
            self._config,
            Budget(WORKER_BYTES),
            Roster(),
            ShardStores(
                home.shards, KvFiles(home.kv, self._config.kv_disk_bytes), self._config.shard_disk_bytes
            ),
            lambda: SPEED,
        )
        worker.start()
        self.workers[number] = worker

    def stop(self, number: int) -> None:
        self.workers.pop(number).close()

    @property
    def ranks(self) -> int:
        """Of the one model that is loaded."""
        (model,) = self.node._models
        return model.plan.ranks

    def shard(self, number: int) -> ServedShard:
        """The one shard of a worker."""
        worker = self.workers[number]._worker
        assert worker is not None
        (found,) = worker.shards
        return found

    def nodes(self) -> list[NodeStatus]:
        found = self.head.answer(AskNodes())
        assert isinstance(found, NodesReply)
        return found.nodes

    def wait(self, members: int) -> None:
        """Until so many are attached."""
        wait_for(lambda: len(self.roster.members) == members)


def free_port() -> int:
    """One that nobody has, of those that the system does not give to whoever asks for any: so nobody takes it before it
    is used, or while it is let go of for a moment. Each process that tests has ports of its own."""
    for _ in range(PORTS):
        port = next(_ports)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


def wait_for(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    ends_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.01)
