"""A cluster's machines for a command that computes in its own process, while no daemon does.

Workers look for their head all the time, so they come by themselves within seconds (`Roster.awaited`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from shoal.comm.home import Home
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.pack_shelf import PackShelf
from shoal.daemon.loading.grouping import Grouping
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.offload.budget import Budget

from .forming import Forming
from .membership import Membership
from .roster import Roster
from .shard_stores import ShardStores, send_weights
from .speed import node_speed
from .steady_shares import SteadyShares


@contextmanager
def gathered(home: Home, config: NodeConfig) -> Iterator[Grouping | None]:
    """The machines that `config` wants to take part; None if it wants this one alone. Raises DaemonError when they do
    not come."""
    if config.ranks is None or config.ranks == 1:
        yield None
        return
    roster = Roster()
    speed = partial(node_speed, config.thread_count, home.cluster / "speed.json", home.root)
    membership = Membership(home.cluster, config, Budget(0), roster, ShardStores(home.shards), speed)
    if membership.role != "head":
        hint = "shoal cluster init on the machine that has the model"
        raise DaemonError("resources", f"{config.ranks} ranks were asked for: this machine is no head", hint)
    try:
        membership.follow_files()
        sending = partial(send_weights, claimed=PackShelf(home).claimed)
        machine = OwnMachine.of(home, config.thread_count)
        steady = SteadyShares(home.cluster / "shares.json")
        yield Forming(roster, sending, speed, steady=steady, device=lambda: machine.device)
    finally:
        membership.close()
