"""What a worker reads over channels is bit for bit what `CheckpointShard` reads from the files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.group.weights import served
from fakes.packing import assert_holds, build_pack, small_slices, tiny_checkpoint

from shoal.daemon.cluster.weights import shard_facts
from shoal.daemon.cluster.weights.remote_shard import RemoteShard
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.models.checkpoint.shard import AnyCheckpoint, CheckpointShard
from shoal.models.errors import CheckpointError
from shoal.offload.pack.builder import PackBuilder
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.manifest import Source
from shoal.partition.slicing import divide
from shoal.partition.spec import BlockId

FORMS = [(family, "F16", False) for family in tiny.FAMILIES] + [
    (family, "BF16", True) for family in tiny.FAMILIES
]
QUANTISED = [("llama", "Q8_0", False), ("qwen3_moe", "Q4_0", False), ("qwen3", "Q5_1", False)]


def assert_same(remote: RemoteShard, part: AnyCheckpoint) -> None:
    assert remote.spec == part.spec
    blocks = part.spec.blocks()
    for block in blocks:
        assert list(remote.matrices(block).items()) == list(part.matrices(block).items())
        assert list(remote.vector_lengths(block).items()) == list(part.vector_lengths(block).items())
    for (block, got), (_, expected) in zip(remote.read_blocks(blocks), part.read_blocks(blocks), strict=True):
        assert got.matrix.keys() == expected.matrix.keys()
        assert got.vector.keys() == expected.vector.keys()
        for role, matrix in expected.matrix.items():
            assert np.array_equal(got.matrix[role].data, matrix.data), (block, role)
        for role, vector in expected.vector.items():
            assert np.array_equal(got.vector[role], vector), (block, role)
    assert remote.facts.nbytes == sum(part.read_block(block).nbytes for block in blocks)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("family", "type", "hf"), FORMS + QUANTISED)
def test_shards_arrive_as_they_are_read_from_files(
    family: str, type: str, hf: bool, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_facts, "PIECE_BYTES", 1 << 10)
    small_slices(monkeypatch)
    known = vars(tiny.config(family))  # sizes that can be cut into three
    sizes = {name: 96 for name in ("intermediate_size", "moe_intermediate_size") if known.get(name)}
    with tiny_checkpoint(tmp_path, family, type, hf, **sizes) as checkpoint:
        server = WeightServer(checkpoint)
        for shard in divide(checkpoint.spec, ranks, grains_of(checkpoint, "keep")):
            part = CheckpointShard(checkpoint, shard)
            with served(server, shard) as channels:
                remote = RemoteShard(channels)
                assert_same(remote, part)
                source = Source("m", [])
                pack = PackBuilder(remote, "keep", source).build(tmp_path / f"{shard.rank}")
                remote.close()
            assert_holds(pack, part)
            own = build_pack(part, tmp_path / f"own{shard.rank}")
            assert pack.path.read_bytes() == own.path.read_bytes()


@pytest.mark.parametrize("drops", [False, True])
def test_a_checkpoint_that_is_closed_while_it_is_sent_gives_no_bytes(
    drops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of its descriptor may be another file's by then."""
    with tiny_checkpoint(tmp_path, "llama", "F32") as checkpoint:
        if drops:
            checkpoint.bypass_cache()
        original = os.preadv

        def preadv(*arguments: Any) -> int:
            got = original(*arguments)
            checkpoint.close()
            return got

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(CheckpointError, match="after the checkpoint was closed"):
            checkpoint.read_rows(BlockId("attn", 0), "q", 0, 16)
