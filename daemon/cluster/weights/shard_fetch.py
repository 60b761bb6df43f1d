"""Fetching a worker's shard: the cache's pack of it, made from what the head sends; or its weights alone, where no disk
has room for a pack.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.daemon.errors import NO_ROOM, DaemonError
from shoal.daemon.memory import available_bytes
from shoal.offload.block_store import BlockReader
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.errors import PackError
from shoal.offload.pack.builder import PackBuilder, partial_of
from shoal.offload.pack.manifest import DAMAGED, Manifest, Source, read_manifest
from shoal.offload.pack.pack import Pack, open_pack
from shoal.offload.window.pinned import PackReader
from shoal.partition.amounts import format_bytes
from shoal.partition.slicing import Shard
from shoal.partition.spec import BlockId

from .earlier_shards import EarlierShard
from .piece_sources import lent_by
from .remote_shard import RemoteShard
from .shard_cache import ShardCache, ShardLock

MOST_ASKED = 4  # other workers
MOST_EARLIER = 4  # shards that are looked at for what need not be sent
ADDED_BYTES = 4 << 20  # that are put into the pack at a time

log = logging.getLogger("shoal.cluster")


class OtherWorkers(NamedTuple):
    """Other workers that may have some of a shard. Each of `reach` opens a channel for weights to one of them, and may
    wait until that is known to be there; `dial_head` opens one to the head. Both raise CommError or OSError."""

    reach: Sequence[Callable[[], Channel]]
    dial_head: Callable[[], Channel]

    def ask(self, remote: RemoteShard) -> None:
        """From now on `remote` gets what they have from them, too. Does not wait, and never fails."""
        for reach in self.reach[:MOST_ASKED]:
            threading.Thread(target=self._ask, args=(remote, reach), name="shoal-lent", daemon=True).start()

    def _ask(self, remote: RemoteShard, reach: Callable[[], Channel]) -> None:
        try:
            if (source := lent_by(reach(), self.dial_head, remote.facts)) is not None:
                remote.lend(source)
        except (CommError, OSError) as error:
            log.info("%s: another worker lends nothing: %s", remote.name, error)


class ShardWeights:
    """A worker's weights. `close` it when they are loaded; the pack stays in the cache as long as anybody has `pack`.

    spec: of the smaller model.  pack: on this machine's disk; None if they have to be loaded from the head each time,
    and then `warning` says why.  reader: what a resident store loads from.  kept_bytes, lent_bytes: of those that were
    fetched into the pack, what was here already, and what came from other workers.  slices: of the head, in the pack.
    """

    def __init__(self, remote: RemoteShard, pack: Pack | None, warning: str = "") -> None:
        self.spec, self.shard = remote.spec, remote.facts.shard
        self.pack = pack
        self.slices = [block for block in pack.blocks if block.kind == "head"] if pack else []
        self.warning = warning
        self.kept_bytes, self.lent_bytes = remote.kept_bytes, remote.lent_bytes
        self.reader: BlockReader = PackReader(pack) if pack else remote
        self._remote = remote

    def matrix_bytes(self, block: BlockId) -> int:
        """Of a block's matrices; of a slice, all that the pack has of it."""
        if self.pack is not None and block in self.slices:
            return self.pack.blocks[block].nbytes
        return self._remote.facts.matrix_bytes(block)

    def close(self) -> None:
        """Ends the reading over channels. Idempotent."""
        self._remote.close()

    def __enter__(self) -> ShardWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fetch_shard(
    channels: Sequence[Channel],
    cache: ShardCache,
    progress: BytesDone = unheard,
    memory_bytes: int | None = None,
    model: str = "",
    others: OtherWorkers | None = None,
) -> ShardWeights:
    """The weights of the shard that the head serves on `channels`, of which the cache then has a pack. What an earlier
    attempt has left of it, or the same weights under another name at the head, is not sent again.

    memory_bytes: what the weights may take, if the disk has no room; None = what is available.  model: what people call
    it; "" = as its files do.  others: who may have some of what is fetched.
    Raises GroupError when the channels fail: they are closed then, and the next attempt goes on. Raises DaemonError:
    `resources` when neither disk nor memory have room, `busy` while another process fetches the same, and what the
    head refuses with.
    """
    remote = RemoteShard(channels)
    try:
        place = cache.place(remote.facts)
        lock = cache.lock(place)
        try:
            pack, refusal = _had(remote, cache, place, lock, progress, model or remote.name, others)
        except BaseException:
            lock.release()  # at once, though who catches this may keep it
            raise
        if pack is not None:
            pack.claim = lock
            return ShardWeights(remote, pack)
        lock.release()
        warning = _require_memory(remote, refusal, memory_bytes)
        log.warning("%s", warning)
        return ShardWeights(remote, None, warning)
    except BaseException:
        remote.close()
        raise


def _had(
    remote: RemoteShard,
    cache: ShardCache,
    place: Path,
    lock: ShardLock,
    progress: BytesDone,
    model: str,
    others: OtherWorkers | None,
) -> tuple[Pack | None, str]:
    """The pack at `place`, which nobody removes as long as `lock` lives; or None, and why there is no room for it."""
    lock.share()
    if (pack := cache.find(place, remote.facts)) is not None:
        return pack, ""
    lock.exclude()
    pack, refusal = _made(remote, cache, place, progress, model, others)
    lock.share()
    if pack is not None and not pack.path.exists():
        raise DaemonError("busy", f"another process has just removed {place}", "try again")
    return pack, refusal


def _made(
    remote: RemoteShard,
    cache: ShardCache,
    place: Path,
    progress: BytesDone,
    model: str,
    others: OtherWorkers | None,
) -> tuple[Pack | None, str]:
    """Finds or fetches the pack at `place`, whose lock is held alone. → it; or None, and why there is no room for it"""
    facts = remote.facts
    if (pack := cache.find(place, facts) or _adopted(remote, cache, place, progress)) is not None:
        return pack, ""
    builder = PackBuilder(remote, "keep", Source(model, [], facts.content), ADDED_BYTES)
    try:
        if not builder.reopen(place):
            cache.discard(place)
        if refusal := cache.make_room(place, builder.nbytes):
            return None, refusal
        with ExitStack() as claims:
            remote.earlier = list(_earlier(remote, cache, claims, progress))
            if others is not None:
                others.ask(remote)
            pack = builder.build(place, progress)
            kept, lent, whole = map(format_bytes, (remote.kept_bytes, remote.lent_bytes, builder.nbytes))
            log.info(
                "%s: of the %s of shard %s, %s were here already and %s came from other workers",
                remote.name,
                whole,
                remote.shard,
                kept,
                lent,
            )
            return pack, ""
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise DaemonError("internal", f"{error.filename or place}: {error.strerror or error}") from error
        with suppress(OSError):
            cache.discard(partial_of(place))
        return None, f"{place.parent}: {error.strerror}"


def _adopted(remote: RemoteShard, cache: ShardCache, place: Path, progress: BytesDone) -> Pack | None:
    """The pack at `place`, made of one that was fetched when the head's files had another name or time, if that has the
    same weights. The head reads its files to compare; weights are not sent."""
    for found in cache.relatives(remote.facts):
        lock = cache.lock(found)
        try:
            # It may be about to be removed, damaged, or on a disk without links.
            with suppress(DaemonError, PackError, OSError):
                lock.share()
                if _same(remote, read_manifest(found), progress):
                    cache.discard(place)
                    cache.link(found, place)
                    return cache.find(place, remote.facts)
        finally:
            lock.release()
    return None


def _earlier(
    remote: RemoteShard, cache: ShardCache, claims: ExitStack, progress: BytesDone
) -> Iterator[EarlierShard]:
    """What is here of the same model, in other shards, the latest first. Nobody removes it until `claims` end."""
    before: list[EarlierShard] = []
    for found in islice(cache.siblings(remote.facts), MOST_EARLIER):
        lock = cache.lock(found)
        claims.callback(lock.release)
        with suppress(DaemonError, PackError, OSError):  # being removed, damaged, or not what its name says
            lock.share()
            pack = open_pack(found)
            if isinstance(pack.manifest.shard, Shard) and not (found / DAMAGED).exists():
                shard = EarlierShard(pack, remote.facts)
                shard.check(before, progress)
                before.append(shard)
                yield shard


def _same(remote: RemoteShard, manifest: Manifest, progress: BytesDone) -> bool:
    """Whether the head has the weights of which `manifest` is."""
    if remote.checksum(None) != manifest.vectors.checksum:
        return False
    for item in manifest.blocks[:-1] if remote.spec.tied else manifest.blocks:
        progress(item.offset, manifest.nbytes)
        if remote.checksum(item.block) != item.checksum:
            return False
    return True


def _require_memory(remote: RemoteShard, refusal: str, memory_bytes: int | None) -> str:
    """A warning that the weights are only kept in memory. Raises DaemonError if there is not enough of it."""
    needed, there = remote.facts.nbytes, available_bytes() if memory_bytes is None else memory_bytes
    what = f"{remote.name}: shard {remote.shard} cannot be kept on this machine's disk: {refusal}"
    if needed > there:
        raise DaemonError(
            "resources",
            f"{what}; in memory it takes {format_bytes(needed)}, and {format_bytes(there)} are left",
            "free some space on the disk",
        )
    return f"{what}; it is loaded from the head each time"
