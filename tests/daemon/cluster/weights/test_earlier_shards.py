"""A model that is cut anew: what a worker has in packs of other shards is not sent again, and is the same bytes."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.group.weights import VECTORS, asked, served
from fakes.packing import assert_holds, build_pack, tiny_checkpoint

from shoal.daemon.cluster.weights import earlier_shards, shard_facts
from shoal.daemon.cluster.weights.earlier_shards import EarlierShard
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_facts import ShardFacts, described
from shoal.daemon.cluster.weights.shard_fetch import fetch_shard
from shoal.daemon.cluster.weights.weight_messages import WantPiece
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.models.checkpoint.weight_source import Piece
from shoal.offload.errors import PackError
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.pack import Pack, open_pack, tensor_type
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


@pytest.mark.parametrize("hf", [False, True])
def test_shards_with_rows_of_the_vocabulary_and_the_heads_own(hf: bool, tmp_path: Path) -> None:
    """The head's are not copied, but all else is; also where a machine was the head and is no more."""
    with tiny_checkpoint(tmp_path, "qwen2" if hf else "llama", "F16", hf=hf) as checkpoint:
        grains = grains_of(checkpoint, "keep")
        for number, cut_vocabulary in enumerate((False, True)):
            cache = ShardCache(tmp_path / f"shards{number}")
            for rank in (0, 1):
                before = divide(checkpoint.spec, 2, grains, cut_vocabulary=cut_vocabulary)[rank]
                fetched(checkpoint, cache, before)
            own = divide(checkpoint.spec, 3, grains, cut_vocabulary=cut_vocabulary)[1]
            part = CheckpointShard(checkpoint, own)
            facts = facts_of(checkpoint, own)
            shards = [EarlierShard(open_pack(place), facts) for place in cache.siblings(facts)]
            assert {block.kind for it in shards for block, _ in it.held} == {"attn", "ffn"}
            assert all(it.held for it in shards)
            assert_holds(fetched(checkpoint, cache, own), part)


def test_routers_are_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path / "shards")
    with tiny_checkpoint(tmp_path, "mixtral", "F16") as checkpoint:
        fetched(checkpoint, cache, shard(checkpoint, 1, (1, 1)))
        pieces = asked(monkeypatch)
        fetched(checkpoint, cache, shard(checkpoint, 1, (2, 1)))
        assert not [piece for piece in pieces if piece.role == "router"]


def facts_of(checkpoint: Checkpoint, own: Shard) -> ShardFacts:
    part = CheckpointShard(checkpoint, own)
    return ShardFacts(described(part, checkpoint.spec, own, "keep", WeightServer(checkpoint).key))


def test_manifests_that_cannot_be_are_passed_over(checkpoint: Checkpoint, cache: ShardCache) -> None:
    """Whatever a number in it becomes: it is refused in one of the ways that are expected, or has not changed."""
    had = fetched(checkpoint, cache, shard(checkpoint, 1, (1, 1))).path.parent
    facts, chance = facts_of(checkpoint, shard(checkpoint, 1, (2, 1))), random.Random(5)
    right = (had / "manifest.json").read_text()
    held = EarlierShard(open_pack(had), facts).held
    begins, ends = right.index('"shard"'), right.index('"model":{')
    numbers = [(it.start(), it.end()) for it in re.finditer(r"-?\d+", right) if begins < it.start() < ends]
    refused = 0
    for _ in range(150):
        start, stop = chance.choice(numbers)
        wrong = chance.choice([-1, 0, 1, 16, 48, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 64, -(1 << 63)])
        (had / "manifest.json").write_text(f"{right[:start]}{wrong}{right[stop:]}")
        try:
            assert EarlierShard(open_pack(had), facts).held == held
        except (DaemonError, PackError, OSError):
            refused += 1
    assert refused > 75


def test_reading_what_is_here_is_told_and_is_only_of_what_is_of_use(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a head would take a worker with a slow disk for stuck."""
    monkeypatch.setattr(earlier_shards, "SHARD_READ_BYTES", 4096)
    for shares in ((1, 1), (1, 1, 1)):
        fetched(checkpoint, cache, shard(checkpoint, len(shares) - 1, shares))
    facts, told = facts_of(checkpoint, shard(checkpoint, 1, (2, 1))), list[int]()
    wide, narrow = (
        EarlierShard(open_pack(place), facts)
        for place in sorted(cache.siblings(facts), key=lambda it: -open_pack(it).manifest.nbytes)
    )
    wide.check([], lambda done, total: told.append(done))
    assert len(told) > len(wide.held)
    told.clear()
    narrow.check([wide], lambda done, total: told.append(done))
    assert told == []
    assert narrow.held == {}


@pytest.mark.parametrize("most", [1, 5000])
def test_a_narrow_piece_of_a_wide_matrix_is_read_little_by_little(
    most: int, checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks decides how narrow it is."""
    had = fetched(checkpoint, cache, shard(checkpoint, 1, (1, 1)))
    facts = facts_of(checkpoint, own := shard(checkpoint, 2, (1, 1, 1)))
    monkeypatch.setattr(earlier_shards, "SHARD_READ_BYTES", most)
    earlier, part = EarlierShard(open_pack(had.path.parent), facts), CheckpointShard(checkpoint, own)
    pieces = [Piece(*key, *rows) for key, rows in earlier.held.items()]
    truth = [part.read_rows(*piece).data.copy() for piece in pieces]
    sizes, original = list[int](), os.preadv

    def preadv(file: int, buffers: list[memoryview], at: int) -> int:
        sizes.append(sum(it.nbytes for it in buffers))
        return original(file, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    for piece, wanted in zip(pieces, truth, strict=True):
        assert earlier.has(piece)
        into = np.empty(facts.piece_bytes(piece), np.uint8)
        earlier.read(piece, into)
        assert np.array_equal(into, wanted)
    tensors = [had.blocks[block].tensors[role] for block, role in earlier.held]
    widest = max(tensor_type(it).band_rows * tensor_type(it).row_bytes(it.cols) for it in tensors)
    assert max(sizes) <= max(most, widest)
    assert len(sizes) > len(pieces)


def test_a_disk_that_fails_in_the_middle_costs_only_time(
    checkpoint: Checkpoint, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(checkpoint, cache, shard(checkpoint, 1, (1, 1)))
    own, original, count = shard(checkpoint, 1, (2, 1)), EarlierShard.read, itertools.count()

    def read(self: EarlierShard, piece: Any, into: Any) -> None:
        if next(count) > 5:
            raise OSError(errno.EIO, "the disk is on fire")
        original(self, piece, into)

    monkeypatch.setattr(EarlierShard, "read", read)
    assert_holds(fetched(checkpoint, cache, own), CheckpointShard(checkpoint, own))
    assert next(count) == 7


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
