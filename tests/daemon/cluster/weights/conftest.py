"""A tiny model at a head, in small pieces, and the cache of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.packing import small_slices, tiny_checkpoint

from shoal.daemon.cluster.weights import shard_facts
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.models.checkpoint.checkpoint import Checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpoint]:
    monkeypatch.setattr(shard_facts, "PIECE_BYTES", 4 << 10)
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, "qwen2", "F16") as checkpoint:
        yield checkpoint


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "shards")
