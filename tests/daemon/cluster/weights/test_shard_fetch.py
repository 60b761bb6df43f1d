"""Fetching shards into the cache: once, resumed after a cut, and never from other files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes.group.weights import VECTORS, Cut, asked, fetched, served, shard_of
from fakes.packing import assert_holds, build_pack

from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import GroupError
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import fetch_shard
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.manifest import Source, SourceFile
from shoal.partition.slicing import Shard, divide
from shoal.partition.spec import BlockId


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


# --- files at the head ----------------------------------------------------------------------------------------------


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
        os.utime(checkpoint.path)  # at once, as the head answers ahead of what is written

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


# --- several workers ------------------------------------------------------------------------------------------------


def test_workers_do_not_wait_for_each_other(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a link of its own, and the head gives as much as all links together carry."""
    link_bytes_per_s = 200_000
    original = Channel.send

    def send(self: Channel, *buffers: Any, **rest: Any) -> None:
        if len(buffers[0]) > 1000:  # a piece
            time.sleep(len(buffers[0]) / (link_bytes_per_s / 2))  # of two channels
        original(self, *buffers, **rest)

    monkeypatch.setattr(Channel, "send", send)
    server = WeightServer(checkpoint)
    shards = divide(checkpoint.spec, 4, grains_of(checkpoint, "keep"))[1:]

    def seconds(attempt: str, some: Sequence[Shard]) -> float:
        def fetch(shard: Shard) -> None:
            with served(server, shard) as channels:
                fetch_shard(channels, ShardCache(tmp_path / f"{attempt}{shard.rank}")).close()

        began_s = time.monotonic()
        with ThreadPoolExecutor(len(some)) as pool:
            list(pool.map(fetch, some))
        return time.monotonic() - began_s

    longest = max(seconds("one", [shard]) for shard in shards)
    assert seconds("all", shards) <= 1.3 * longest + 0.2


def test_it_is_called_as_people_call_the_model(checkpoint: Checkpoint, cache: ShardCache) -> None:
    with (
        served(WeightServer(checkpoint), shard_of(checkpoint)) as channels,
        fetch_shard(channels, cache, model="smollm2:135m"),
    ):
        pass
    (shard,) = cache.list()
    assert (shard.model, shard.part) == ("smollm2:135m", "2/2")
