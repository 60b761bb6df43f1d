"""Opens the store of a plan: all blocks in memory, from the checkpoint or a pack, or some streamed from a pack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.memory import trim
from shoal.daemon.progress import Progress
from shoal.devices.opening import home_of
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.pack.manifest import Quant
from shoal.offload.window.pinned import PackReader
from shoal.offload.window.window_store import WindowStore
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

MEASURED_BYTES = 64 << 20  # loading fewer bytes says nothing about the disk's speed


def open_store(
    plan: Plan,
    checkpoint: AnyCheckpoint,
    quant: Quant,
    packs: Packs | None,
    progress: Progress,
    *,
    bounded: bool,
    disk_bytes_per_s: float,
    known: Mapping[BlockId, float] = MappingProxyType({}),
) -> tuple[BlockStore, float]:
    """The store of a plan, with the blocks that stay already read, and the disk's speed meanwhile in bytes per second,
    0 if nothing will be streamed; `disk_bytes_per_s` where too little was read to tell. `bounded`: memory is limited,
    so reading must leave nothing behind in it. `known`: in which share of steps experts were used before.

    Raises OffloadError or CheckpointError, and DaemonError when it needs a pack and there is no place for one.
    """

    def loading(done: int, total: int) -> None:
        if bounded:
            trim()  # frees the buffers of reads
        progress("loading", done, total)

    if not plan.streams and quant == "keep":
        if bounded:
            checkpoint.bypass_cache()
        return ResidentStore.load(plan, checkpoint, loading, home_of), 0.0
    if packs is None:
        raise DaemonError("resources", "has to come from a pack, and there is no place for a pack of it")
    pack = packs.get(checkpoint, lambda done, total: progress("packing", done, total), quant=quant)
    if not plan.streams:
        away = {item.block for item in plan.blocks if item.tier == "gpu"}
        return ResidentStore.load(plan, PackReader(pack, away), loading, home_of), 0.0
    began_s = time.monotonic()
    store = WindowStore.open(plan, pack, loading, home_of, known)
    seconds = time.monotonic() - began_s
    measured = plan.pinned_bytes >= MEASURED_BYTES
    return store, plan.pinned_bytes / seconds if measured else disk_bytes_per_s
