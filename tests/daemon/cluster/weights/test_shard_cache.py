"""The cache of shards: full disks, limits, what goes first, and damage."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.group.weights import VECTORS, Cut, asked, fetched, served, shard_of
from fakes.packing import assert_holds

from shoal.daemon.cluster.weights import shard_cache
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import ShardWeights, fetch_shard
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.errors import PackCorrupt
from shoal.offload.pack.manifest import DAMAGED
from shoal.offload.window.pinned import PackReader
from shoal.partition.spec import BlockId


def assert_in_memory(weights: ShardWeights, part: CheckpointShard) -> None:
    assert weights.pack is None
    blocks = part.spec.blocks()
    for (block, got), (_, expected) in zip(
        weights.reader.read_blocks(blocks), part.read_blocks(blocks), strict=True
    ):
        for role, matrix in expected.matrix.items():
            assert np.array_equal(got.matrix[role].data, matrix.data), (block, role)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_the_weights_in_memory(
    call: str, error: int, checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(error, os.strerror(error))

    shard = shard_of(checkpoint)
    part = CheckpointShard(checkpoint, shard)
    monkeypatch.setattr(os, call, fail)
    with served(WeightServer(checkpoint), shard) as channels:
        with pytest.raises(DaemonError, match=f"{os.strerror(error)}; in memory it takes") as caught:
            fetch_shard(channels, cache, memory_bytes=1000)
        assert caught.value.code == "resources"
    with served(WeightServer(checkpoint), shard) as channels, fetch_shard(channels, cache) as weights:
        assert "is loaded from the head each time" in weights.warning
        assert_in_memory(weights, part)
    assert cache.list() == ()
    monkeypatch.undo()
    assert_holds(fetched(checkpoint, cache), part)


def test_a_limit_of_a_files_size(checkpoint: Checkpoint, cache: ShardCache) -> None:
    """As a process has it under RLIMIT_FSIZE, or on FAT32."""
    shard = shard_of(checkpoint)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with served(WeightServer(checkpoint), shard) as channels, fetch_shard(channels, cache) as weights:
            assert_in_memory(weights, CheckpointShard(checkpoint, shard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_of_the_disk_are_told(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DaemonError, match="Input/output error") as caught:
        fetched(checkpoint, cache)
    assert caught.value.code == "internal"


def test_the_least_recently_used_go_first_and_none_in_use(checkpoint: Checkpoint, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    with served(WeightServer(checkpoint, "q8"), shard_of(checkpoint)) as channels:
        fetch_shard(channels, ShardCache(root)).close()
    first, second = (fetched(checkpoint, ShardCache(root), rank=rank).path.parent for rank in range(2))
    sizes = {shard.directory: shard.nbytes for shard in ShardCache(root).list()}
    limit = sum(sizes.values())  # so one as small as the first has to go
    with served(WeightServer(checkpoint, "q4"), shard_of(checkpoint)) as channels:
        weights = fetch_shard(channels, ShardCache(root, limit))
        weights.close()
        pack = weights.pack
    assert pack is not None
    held = {shard.directory for shard in ShardCache(root).list()}
    assert held == {second, first, pack.path.parent}

    tight = ShardCache(root, max(sizes.values()) + 8192)
    place = tight.root / "new.0.0"
    in_use = fetched(checkpoint, tight)  # the second
    del weights  # but its pack is in use
    assert "not enough that is not in use" in tight.make_room(place, max(sizes.values()))
    assert {shard.directory for shard in tight.list()} == held
    assert "may hold" in tight.make_room(place, 1 << 40)
    del in_use
    assert "not enough that is not in use" in tight.make_room(place, max(sizes.values()))
    del pack
    assert tight.make_room(place, max(sizes.values())) == ""
    assert first not in {shard.directory for shard in tight.list()}


def test_by_default_it_takes_a_quarter_of_the_free_disk(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetched(checkpoint, cache).path
    (shard,) = cache.list()
    usage = shutil.disk_usage(cache.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7 * shard.nbytes))
    assert cache.make_room(cache.root / "new.0.0", 2 * shard.nbytes) == ""
    assert "may hold" in cache.make_room(cache.root / "new.0.0", 2 * shard.nbytes + 4096)
    assert not path.exists()


def test_two_that_fetch_the_same_at_once(checkpoint: Checkpoint, cache: ShardCache) -> None:
    shard = shard_of(checkpoint)

    def again(done: int, total: int) -> None:
        with served(WeightServer(checkpoint), shard) as others, pytest.raises(DaemonError) as caught:
            fetch_shard(others, cache)
        assert caught.value.code == "busy"
        raise Cut

    with pytest.raises(Cut):
        fetched(checkpoint, cache, again)
    pack = fetched(checkpoint, cache)
    server = WeightServer(checkpoint)
    with (
        served(server, shard) as one,
        served(server, shard) as two,
        fetch_shard(one, cache) as mine,
        fetch_shard(two, cache) as other,
    ):
        assert mine.pack is not None
        assert other.pack is not None
        assert mine.pack.path == other.pack.path == pack.path


# --- damage ---------------------------------------------------------------------------------------------------------


def test_only_a_damaged_block_is_sent_again(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = fetched(checkpoint, cache)
    block = BlockId("ffn", 1)
    with pack.path.open("r+b") as file:
        file.seek(pack.blocks[block].offset + 100)
        file.write(b"wrong")
    with pytest.raises(PackCorrupt):
        list(PackReader(pack).read_blocks(checkpoint.spec.blocks()[1:-1]))
    assert (pack.path.parent / DAMAGED).exists()
    pieces = asked(monkeypatch)
    again = fetched(checkpoint, cache)
    assert {piece.block for piece in pieces if piece.role not in VECTORS} == {block}
    assert_holds(again, CheckpointShard(checkpoint, shard_of(checkpoint)))
    assert sorted(path.name for path in again.path.parent.iterdir()) == ["blocks.bin", "manifest.json"]


@pytest.mark.parametrize("name", ["blocks.bin", "manifest.json"])
def test_a_pack_that_lacks_a_part_is_fetched_again(
    name: str, checkpoint: Checkpoint, cache: ShardCache
) -> None:
    path = fetched(checkpoint, cache).path.parent / name
    for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-4096])):
        spoil(path)
        assert_holds(fetched(checkpoint, cache), CheckpointShard(checkpoint, shard_of(checkpoint)))


def test_clearing_leaves_what_is_in_use(checkpoint: Checkpoint, cache: ShardCache) -> None:
    used = fetched(checkpoint, cache)
    fetched(checkpoint, cache, rank=0)
    assert {shard.part: cache.used(shard) for shard in cache.list()} == {"1/2": False, "2/2": True}
    gone, kept = cache.clear()
    assert [shard.part for shard in kept] == ["2/2"]
    assert [shard.model for shard in gone] == [checkpoint.name]
    assert_holds(used, CheckpointShard(checkpoint, shard_of(checkpoint)))
    del used
    assert len(cache.clear()[0]) == 1
    assert cache.list() == ()
    assert cache.clear() == ([], [])


def test_who_looks_at_the_cache_is_in_nobodys_way(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "CLAIM_TRIES", 500)
    fetched(checkpoint, cache)
    (shard,) = cache.list()
    looking = cache.lock(shard.directory)
    looking.exclude()
    threading.Timer(0.03, looking.release).start()
    assert_holds(fetched(checkpoint, cache), CheckpointShard(checkpoint, shard_of(checkpoint)))
