"""A model that is cut anew: what a worker has in packs of other shards is not sent again, and is the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes.group.weights import VECTORS, asked, served
from fakes.packing import assert_holds, build_pack, tiny_checkpoint

from shoal.daemon.cluster.weights import shard_facts
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_fetch import fetch_shard
from shoal.daemon.cluster.weights.weight_messages import WantPiece
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.pack import Pack
from shoal.partition.slicing import CutOfExperts, Shard, divide


def shard(
    checkpoint: Checkpoint, rank: int, shares: tuple[int, ...], experts: CutOfExperts = "columns"
) -> Shard:
    return divide(checkpoint.spec, len(shares), grains_of(checkpoint, "keep"), shares, experts=experts)[rank]


def fetched(checkpoint: Checkpoint, cache: ShardCache, own: Shard, quant: Any = "keep") -> Pack:
    with served(WeightServer(checkpoint, quant), own) as channels, fetch_shard(channels, cache) as weights:
        assert weights.pack is not None
        return weights.pack


def sent_bytes(checkpoint: Checkpoint, own: Shard, pieces: list[WantPiece]) -> int:
    """Of matrices."""
    part, found = CheckpointShard(checkpoint, own), 0
    for piece in pieces:
        if piece.role not in VECTORS and piece.role in part.matrices(piece.block):
            kind, _, cols = part.matrices(piece.block)[piece.role]
            found += kind.matrix_bytes(piece.stop - piece.start, cols)
    return found


def matrix_bytes(checkpoint: Checkpoint, own: Shard) -> int:
    part = CheckpointShard(checkpoint, own)
    return sum(
        kind.matrix_bytes(rows, cols)
        for block in part.spec.blocks()
        for kind, rows, cols in part.matrices(block).values()
    )


CASES = [
    # family, type, shares before and after, the most that is sent
    ("qwen2", "F16", (1, 1), (2, 1), 0.0),
    ("qwen2", "F16", (2, 1), (1, 1), 0.75),
    ("qwen2", "F16", (1, 1), (1, 1, 1), 0.9),
    ("llama", "Q4_0", (1, 1), (2, 1), 0.0),
    ("llama", "Q8_0", (2, 1), (1, 1), 0.9),
    ("mixtral", "F16", (1, 1), (2, 1), 0.1),
]


@pytest.mark.parametrize(("family", "kind", "before", "after", "most"), CASES)
def test_what_both_shards_have_is_not_sent(
    family: str,
    kind: Any,
    before: tuple[int, ...],
    after: tuple[int, ...],
    most: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_facts, "PIECE_BYTES", 1 << 10)
    cache = ShardCache(tmp_path / "shards")
    with tiny_checkpoint(tmp_path, family, kind) as checkpoint:
        fetched(checkpoint, cache, shard(checkpoint, 1, before))
        own, pieces = shard(checkpoint, 1, after), asked(monkeypatch)
        pack = fetched(checkpoint, cache, own)
        assert sent_bytes(checkpoint, own, pieces) <= most * matrix_bytes(checkpoint, own)
        truth = build_pack(CheckpointShard(checkpoint, own), tmp_path / "own")
        assert pack.path.read_bytes() == truth.path.read_bytes()
        assert_holds(pack, CheckpointShard(checkpoint, own))


def test_what_is_damaged_or_of_another_form_is_not_used(
    checkpoint: Checkpoint, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    had = fetched(checkpoint, cache, shard(checkpoint, 1, (1, 1)))
    item = next(it for it in had.manifest.blocks if it.block.kind == "ffn")
    with had.path.open("r+b") as file:
        file.seek(item.offset + item.tensors["up"].offset + 5)
        file.write(b"\x5a\xa5")
    own, pieces = shard(checkpoint, 1, (2, 1)), asked(monkeypatch)
    pack = fetched(checkpoint, cache, own)
    assert {piece.block for piece in pieces if piece.role not in VECTORS} == {item.block}
    assert_holds(pack, CheckpointShard(checkpoint, own))
    rounded = fetched(checkpoint, cache, own, "q8")
    truth = build_pack(CheckpointShard(checkpoint, own), tmp_path / "q8", "q8")
    assert rounded.path.read_bytes() == truth.path.read_bytes()


def test_the_cache_is_no_larger_for_it(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one shard only: the earlier one goes, and all is sent."""
    had = fetched(checkpoint, ShardCache(tmp_path / "shards"), shard(checkpoint, 1, (1, 1)))
    tight = ShardCache(tmp_path / "shards", had.manifest.nbytes + (64 << 10))
    del had
    own, pieces = shard(checkpoint, 1, (2, 1)), asked(monkeypatch)
    pack = fetched(checkpoint, tight, own)
    assert sent_bytes(checkpoint, own, pieces) == matrix_bytes(checkpoint, own)
    assert [shard.directory for shard in tight.list()] == [pack.path.parent]


def test_one_that_goes_or_is_in_use_is_no_trouble(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = fetched(checkpoint, cache, shard(checkpoint, 1, (1, 1)))
    gone = fetched(checkpoint, cache, shard(checkpoint, 0, (1, 1)))
    gone.path.unlink()
    own, pieces = shard(checkpoint, 1, (2, 1)), asked(monkeypatch)
    assert_holds(fetched(checkpoint, cache, own), CheckpointShard(checkpoint, own))
    assert sent_bytes(checkpoint, own, pieces) == 0
    assert used.claim is not None
