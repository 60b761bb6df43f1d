"""Puts together all that a node needs to be in a cluster, and begins with what its files say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from shoal.comm.home import Home
from shoal.daemon.config import NodeConfig
from shoal.daemon.library.kv_files import KvFiles
from shoal.daemon.library.pack_shelf import PackShelf
from shoal.offload.budget import Budget
from shoal.partition.throughput.profile import Device

from .forming import Forming
from .kernel_check import check_kernels
from .membership import Membership
from .roster import Roster
from .routes.local_network import LocalNetwork
from .shard_stores import ShardStores, send_weights
from .speed import NodeSpeed, measure_again, node_speed
from .steady_shares import SteadyShares

LONG_QUIET_S = 10.0


def place_in_cluster(
    home: Home,
    config: NodeConfig,
    budget: Budget,
    computing: Callable[[], Sequence[str]],
    kv_files: KvFiles | None = None,
    device: Callable[[], Device | None] = lambda: None,
) -> tuple[Forming, Membership]:
    """`computing` names the models that compute now. `kv_files`: this node's, if it keeps KV on disk. `device`: what
    is known of this machine."""
    roster = Roster()
    measured = config.thread_count, home.cluster / "speed.json", home.root
    speed, again = partial(node_speed, *measured), partial(measure_again, *measured)

    def tested_speed() -> NodeSpeed:
        check_kernels(home.cluster / "kernels.tested")
        return speed()

    shards = ShardStores(home.shards, kv_files, config.shard_disk_bytes)
    membership = Membership(
        home.cluster, config, budget, roster, shards, tested_speed, computing, LocalNetwork(), device=device
    )
    membership.start()
    threading.Thread(target=_measure_again, args=(budget, again), name="shoal-speed", daemon=True).start()
    steady = SteadyShares(home.cluster / "shares.json")
    sending = partial(send_weights, claimed=PackShelf(home).claimed)
    return Forming(roster, sending, speed, steady=steady, device=device), membership


def _measure_again(budget: Budget, again: Callable[[], None]) -> None:
    """Once, when no model has been in memory for a while that was not there before: nobody waits for one then."""
    before = budget.held_bytes
    quiet_s = 0.0
    while quiet_s < LONG_QUIET_S:
        time.sleep(1.0)
        quiet_s = quiet_s + 1.0 if budget.held_bytes <= before else 0.0
    again()
