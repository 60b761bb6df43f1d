"""Weights of shards: how a head sends them, and how a worker opens what it got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import KvFiles, NotKept, rank_fingerprint
from shoal.daemon.progress import Progress
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.kv.disk_slots import KvSlots
from shoal.offload.pack.builder import source_of
from shoal.offload.pack.manifest import Quant, Source
from shoal.offload.pack.pack import Pack
from shoal.offload.window.window_store import WindowStore
from shoal.partition.given_plan import check_given
from shoal.partition.memory_layout import kv_page_bytes

from .control_messages import Serve
from .mesh.fellows import ServeWeights
from .served_shard import Dial, OpenedShard, Reach
from .weights.shard_cache import ShardCache
from .weights.shard_fetch import OtherWorkers, fetch_shard
from .weights.shard_lender import ShardLender
from .weights.weight_server import WeightServer

CHANNELS = 2  # on which one worker gets weights


def send_weights(
    checkpoint: Checkpoint,
    quant: Quant,
    *,
    bounded: bool = False,
    claimed: Callable[[Source], Source] = lambda source: source,
) -> WeightServer:
    """What answers requests for the weights of shards of an open checkpoint. `bounded`: memory is limited, so that
    reading must leave nothing behind in it. `claimed`: see `PackShelf`; a model of the store is then told by its
    content. Raises DaemonError."""
    return WeightServer(checkpoint, quant, claimed(source_of(checkpoint)), bounded=bounded)


class ShardStores:
    """Shards whose weights are kept in `directory`, of which all together take `limit_bytes` at most; and their KV on
    disk among `kv_files`, if there are any."""

    def __init__(
        self, directory: Path, kv_files: KvFiles | None = None, limit_bytes: int | None = None
    ) -> None:
        self.kv_files = kv_files
        self._cache = ShardCache(directory, limit_bytes)

    def lend(self, request: Serve) -> ServeWeights | None:
        return ShardLender(self._cache, request.files).serve if request.files else None

    def open(
        self, request: Serve, dial: Dial, progress: Progress, reach: Sequence[Reach] = ()
    ) -> OpenedShard:
        store, pack = self._open_store(request, dial, progress, reach)
        if store is None:
            return OpenedShard(store, NotKept(""), pack)
        try:
            return OpenedShard(store, open_kv(request, self.kv_files), pack)
        except BaseException:
            store.close()
            raise

    def _open_store(
        self, request: Serve, dial: Dial, progress: Progress, reach: Sequence[Reach]
    ) -> tuple[BlockStore | None, Pack | None]:
        def loading(done: int, total: int) -> None:
            progress("loading", done, total)

        channels = [dial("weights") for _ in range(CHANNELS)]
        try:
            with fetch_shard(
                channels,
                self._cache,
                lambda done, total: progress("fetching", done, total),
                model=request.model,
                others=OtherWorkers(reach, partial(dial, "weights")) if request.files else None,
            ) as weights:
                if weights.spec != request.spec or weights.shard != request.shard:
                    raise DaemonError("bad_request", "the head sends another shard than it asked for")
                if request.plan.streams and weights.pack is None and not request.fetch_only:
                    raise DaemonError(
                        "resources", f"a shard that streams needs room on a disk: {weights.warning}"
                    )
                check_given(request.plan, request.spec, weights.matrix_bytes, weights.slices)
                if request.fetch_only:
                    return None, weights.pack
                if weights.pack is None or not request.plan.streams:
                    return ResidentStore.load(request.plan, weights.reader, loading), weights.pack
                return WindowStore.open(request.plan, weights.pack, loading), weights.pack
        finally:
            for channel in channels:
                channel.close()


def open_kv(request: Serve, kv_files: KvFiles | None) -> KvSlots | NotKept:
    """Where a shard keeps KV on this machine's disk: in a place that is no other shard's and no other model's."""
    wanted = request.kv_on_disk
    if wanted is None:
        return NotKept("")
    if kv_files is None:
        return NotKept("it keeps no KV on its disk")
    key = rank_fingerprint(bytes.fromhex(wanted.store), request.shard.rank)
    page_bytes = kv_page_bytes(request.spec, request.plan.kv.dtype)
    return kv_files.open_slots(f"a shard of {request.model}", key, page_bytes, wanted.slots)
