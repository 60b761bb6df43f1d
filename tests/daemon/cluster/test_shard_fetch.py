"""Fetching shards into the cache: once, resumed after a cut, never from other files, and where the disk is full."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.group.weights import asked, served
from fakes.packing import assert_holds, build_pack, small_slices, tiny_checkpoint

from shoal.comm.group.errors import GroupError
from shoal.daemon.cluster.weights import shard_facts
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import ShardWeights, fetch_shard
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.errors import PackCorrupt
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.manifest import DAMAGED, Source, SourceFile
from shoal.offload.pack.pack import Pack
from shoal.offload.window.pinned import PackReader
from shoal.partition.slicing import Shard, divide
from shoal.partition.spec import BlockId

VECTORS = {"norm", "q_bias", "k_bias", "v_bias"}  # few bytes, which are sent at every attempt


class Cut(Exception):
    """Ends a fetch in the middle."""


def cut_at(share: float) -> BytesDone:
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise Cut

    return progress


def shard_of(checkpoint: Checkpoint, rank: int = 1, ranks: int = 2) -> Shard:
    return divide(checkpoint.spec, ranks, grains_of(checkpoint, "q4"))[rank]


def fetched(checkpoint: Checkpoint, cache: ShardCache, progress: BytesDone = unheard, rank: int = 1) -> Pack:
    """The pack in the cache after a fetch from a head that has just opened its files."""
    shard = shard_of(checkpoint, rank)
    with (
        served(WeightServer(checkpoint), shard) as channels,
        fetch_shard(channels, cache, progress) as weights,
    ):
        assert weights.pack is not None
        return weights.pack


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpoint]:
    monkeypatch.setattr(shard_facts, "PIECE_BYTES", 4 << 10)
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, "qwen2", "F16") as checkpoint:
        yield checkpoint


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "shards")


def test_a_shard_is_sent_once(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = asked(monkeypatch)
    pack = fetched(checkpoint, cache)
    assert_holds(pack, CheckpointShard(checkpoint, shard_of(checkpoint)))
    assert len(pieces) == len(set(pieces)) > len(pack.blocks)
    pieces.clear()
    assert fetched(checkpoint, cache).path == pack.path
    with open_checkpoint(checkpoint.path) as again:  # the head was restarted
        assert fetched(again, cache).path == pack.path
    assert pieces == []
    fetched(checkpoint, cache, rank=0)
    assert pieces != []
    assert [shard.complete for shard in cache.list()] == [True, True]


@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_in_fewer_bits_it_is_the_pack_that_the_head_would_make(
    quant: Any, checkpoint: Checkpoint, cache: ShardCache, tmp_path: Path
) -> None:
    shard = shard_of(checkpoint)
    with served(WeightServer(checkpoint, quant), shard) as channels, fetch_shard(channels, cache) as weights:
        assert weights.pack is not None
        own = build_pack(CheckpointShard(checkpoint, shard), tmp_path / "own", quant)
        assert weights.pack.path.read_bytes() == own.path.read_bytes()
        assert weights.pack.manifest.blocks == own.manifest.blocks
    fetched(checkpoint, cache)
    assert len(cache.list()) == 2


@pytest.mark.parametrize("seed", range(8))
def test_what_was_written_before_a_cut_is_not_sent_again(
    seed: int, checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker fails in the middle, or the head's channels end."""
    chance = random.Random(seed)
    pieces = asked(monkeypatch)
    written: set[BlockId] = set()
    for _ in range(3):
        pieces.clear()
        shard = shard_of(checkpoint)
        with served(WeightServer(checkpoint), shard) as channels:
            at = chance.uniform(0, 0.7)

            def progress(done: int, total: int, at: float = at, ends: Any = channels) -> None:
                if done > at * total:
                    if chance.random() < 0.5:
                        raise Cut
                    for end in ends:
                        end.close()

            with pytest.raises((Cut, GroupError)):
                fetch_shard(channels, cache, progress)
        assert not any(piece.block in written for piece in pieces if piece.role not in VECTORS)
        (left,) = cache.list()
        assert not left.complete
        journal = (left.directory / "journal").read_text()
        written |= {block for block in checkpoint.spec.blocks() if f"{block} " in journal}
    pieces.clear()
    pack = fetched(checkpoint, cache)
    assert_holds(pack, CheckpointShard(checkpoint, shard_of(checkpoint)))
    assert not any(piece.block in written for piece in pieces if piece.role not in VECTORS)


WORKER = """
import os, signal, socket, sys
from pathlib import Path
from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import GroupError
from shoal.comm.group.streams import SocketStream
from shoal.daemon.cluster.weights import shard_facts
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import fetch_shard
from shoal.offload.pack import layout
shard_facts.PIECE_BYTES = layout.SLICE_BYTES = 4096
root, share, *ends = sys.argv[1:]
def progress(done, total):
    if done > float(share) * total:
        os.kill(os.getpid(), signal.SIGKILL)
channels = [Channel(SocketStream(socket.socket(fileno=int(end)))) for end in ends]
try:
    fetch_shard(channels, ShardCache(Path(root)), progress)
except GroupError:
    sys.exit(3)
"""

HEAD = """
import itertools, os, signal, socket, sys, threading
from shoal.comm.group.channel import Channel
from shoal.comm.group.streams import SocketStream
from shoal.daemon.cluster.weights import weight_server
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.errors import PackCorrupt
from shoal.offload.pack.layout import grains_of
from shoal.offload.window.pinned import PackReader
from shoal.partition.slicing import divide
path, answers, *ends = sys.argv[1:]
number = itertools.count()
original = weight_server._Serving.answer
def answer(self, question):
    if next(number) == int(answers):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, question)
weight_server._Serving.answer = answer
checkpoint = open_checkpoint(path)
server = weight_server.WeightServer(checkpoint)
shard = divide(checkpoint.spec, 2, grains_of(checkpoint, "q4"))[1]
for end in ends:
    channel = Channel(SocketStream(socket.socket(fileno=int(end))))
    threading.Thread(target=server.serve, args=(channel, shard)).start()
"""


def started(code: str, *args: object, ends: list[socket.socket]) -> subprocess.Popen[bytes]:
    """A process that has these sockets, which are closed here."""
    numbers = [str(end.fileno()) for end in ends]
    command = [sys.executable, "-c", code, *map(str, args), *numbers]
    process = subprocess.Popen(command, pass_fds=[end.fileno() for end in ends])
    for end in ends:
        end.close()
    return process


def test_processes_that_are_killed_at_either_side(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(5)
    for attempt in range(4):
        pairs = [socket.socketpair() for _ in range(2)]
        share, answers = (chance.uniform(0.2, 0.6), 10_000) if attempt % 2 else (2, chance.randrange(12, 25))
        head = started(HEAD, checkpoint.path, answers, ends=[theirs for _, theirs in pairs])
        worker = started(WORKER, cache.root, share, ends=[mine for mine, _ in pairs])
        assert worker.wait(60) == (-signal.SIGKILL if attempt % 2 else 3)
        assert head.wait(60) == (0 if attempt % 2 else -signal.SIGKILL)
        assert [shard.complete for shard in cache.list()] == [False]
    pieces = asked(monkeypatch)
    pack = fetched(checkpoint, cache)
    assert_holds(pack, CheckpointShard(checkpoint, shard_of(checkpoint)))
    assert BlockId("attn", 0) not in {piece.block for piece in pieces if piece.role not in VECTORS}


# --- files at the head ------------------------------------------------------------------------------------------


def test_a_file_that_was_copied_or_touched_is_not_sent_again(
    checkpoint: Checkpoint, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = asked(monkeypatch)
    first = fetched(checkpoint, cache)  # and it is in use
    (before,) = cache.list()
    pieces.clear()
    os.utime(checkpoint.path)
    shutil.copy(checkpoint.path, tmp_path / "other.gguf")
    for path in (checkpoint.path, tmp_path / "other.gguf"):
        with open_checkpoint(path) as again:
            pack = fetched(again, cache)
            assert_holds(pack, CheckpointShard(again, shard_of(again)))
    assert pieces == []
    assert pack.manifest == first.manifest
    assert sum(shard.nbytes for shard in cache.list()) <= before.nbytes + 3


@pytest.mark.parametrize("role", ["norm", "gate"])
def test_other_weights_of_the_same_form_are_sent(
    role: str, checkpoint: Checkpoint, cache: ShardCache, tmp_path: Path
) -> None:
    before = fetched(checkpoint, cache)
    (tmp_path / "tuned").mkdir()
    tuned = tmp_path / "tuned" / checkpoint.path.name
    data = bytearray(checkpoint.path.read_bytes())
    tensor = checkpoint._places(BlockId("ffn", 2))[role].tensor
    data[tensor.offset + tensor.nbytes - 2] ^= 1  # a single weight, of the last rank
    tuned.write_bytes(data)
    with open_checkpoint(tuned) as other:
        pack = fetched(other, cache)
        assert_holds(pack, CheckpointShard(other, shard_of(other)))
    assert pack.path != before.path
    assert_holds(before, CheckpointShard(checkpoint, shard_of(checkpoint)))


def test_a_file_that_changes_while_it_is_sent_makes_no_pack(
    checkpoint: Checkpoint, cache: ShardCache
) -> None:
    def touch(done: int, total: int) -> None:
        if done > total / 2:
            os.utime(checkpoint.path)

    with pytest.raises(DaemonError, match=r"m\.gguf: was changed while it was sent") as caught:
        fetched(checkpoint, cache, touch)
    assert caught.value.code == "corrupt"
    assert [shard.complete for shard in cache.list()] == [False]


def test_a_model_in_the_store_is_known_by_its_content(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("m", [SourceFile("m.gguf", checkpoint.path.stat().st_size, 1)], "ab" * 32)
    later = Source("m", [SourceFile("m.gguf", checkpoint.path.stat().st_size, 2)], "ab" * 32)
    shard = shard_of(checkpoint)
    with served(WeightServer(checkpoint, source=source), shard) as channels:
        fetch_shard(channels, cache).close()
    pieces = asked(monkeypatch)
    with served(WeightServer(checkpoint, source=later), shard) as channels:
        fetch_shard(channels, cache).close()
    assert pieces == []


# --- disk ---------------------------------------------------------------------------------------------------------


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


# --- damage -------------------------------------------------------------------------------------------------------


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
