"""A head that serves shards of a tiny model, and channels of a worker to it, in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pytest

from shoal.comm.group.channel import Channel, channel_pair
from shoal.daemon.cluster.weights import weight_server
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import fetch_shard
from shoal.daemon.cluster.weights.weight_messages import WantPiece
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.pack import Pack
from shoal.partition.slicing import Shard, divide

VECTORS = {"norm", "q_bias", "k_bias", "v_bias"}  # few bytes, which are sent at every attempt


class ServesWeights(Protocol):
    def serve(self, channel: Channel, shard: Shard) -> None: ...


@contextmanager
def served(server: ServesWeights, shard: Shard, channels: int = 2) -> Iterator[list[Channel]]:
    """A worker's ends of channels that the server answers on threads of its own. All are closed at the end."""
    pairs = [channel_pair("weights") for _ in range(channels)]
    threads = [threading.Thread(target=server.serve, args=(theirs, shard)) for _, theirs in pairs]
    for thread in threads:
        thread.start()
    try:
        yield [mine for mine, _ in pairs]
    finally:
        for pair in pairs:
            for end in pair:
                end.close()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[WantPiece]:
    """A list that gets every piece that any head is asked for from now on."""
    pieces: list[WantPiece] = []
    original = weight_server._Serving.answer

    def answer(self: Any, question: Any) -> Any:
        if isinstance(question, WantPiece):
            pieces.append(question)
        return original(self, question)

    monkeypatch.setattr(weight_server._Serving, "answer", answer)
    return pieces


class Cut(Exception):
    """Ends a fetch in the middle."""


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
