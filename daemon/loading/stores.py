"""The store that carries out a plan: everything in memory from the checkpoint or a pack, or streamed from a pack."""

from __future__ import annotations

import time
from typing import Protocol

from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import trim
from shoal.daemon.progress import Progress
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.bytes_done import BytesDone
from shoal.offload.pack.manifest import Quant
from shoal.offload.pack.pack import Pack
from shoal.offload.window.pinned import PackReader
from shoal.offload.window.window_store import WindowStore
from shoal.partition.guesses import DISK_BYTES_PER_S
from shoal.partition.plan import Plan

MEASURED_BYTES = 64 << 20  # less than this read while loading says nothing about the disk's speed


class PackSource(Protocol):
    """Where packs come from (`library.packs` has it)."""

    def get(self, checkpoint: Checkpoint, progress: BytesDone, *, quant: Quant) -> Pack:
        """The pack of a checkpoint, made if there is none; `progress` hears of that. Raises DaemonError."""
        ...


def open_store(
    plan: Plan,
    checkpoint: Checkpoint,
    quant: Quant,
    packs: PackSource | None,
    progress: Progress,
    *,
    bounded: bool,
) -> tuple[BlockStore, float]:
    """The store of a plan, its blocks that stay read, and how fast the disk was meanwhile in bytes per second, 0 if
    nothing will be streamed. `bounded`: what reading leaves in memory matters.

    Raises OffloadError or CheckpointError, or DaemonError when it takes a pack and there is no place for one.
    """

    def loading(done: int, total: int) -> None:
        if bounded:
            trim()  # buffers that were read into
        progress("loading", done, total)

    if not plan.streams and quant == "keep":
        if bounded:
            checkpoint.bypass_cache()
        return ResidentStore.load(plan, checkpoint, loading), 0.0
    if packs is None:
        raise DaemonError("resources", "has to come from a pack, and there is no place for a pack of it")
    pack = packs.get(checkpoint, lambda done, total: progress("packing", done, total), quant=quant)
    if not plan.streams:
        return ResidentStore.load(plan, PackReader(pack), loading), 0.0
    began_s = time.monotonic()
    store = WindowStore.open(plan, pack, loading)
    seconds = time.monotonic() - began_s
    told = plan.pinned_bytes >= MEASURED_BYTES
    return store, plan.pinned_bytes / seconds if told else DISK_BYTES_PER_S
