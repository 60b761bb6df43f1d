"""Ranks that stream their shards compute, bit for bit, what ranks that have them in memory compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.group.ranks import Group, Opened, orders, resident
from fakes.packing import build_pack, small_slices, tiny_checkpoint
from fakes.running import FP32, planned
from fakes.streaming import Pinned, streaming_plan

from shoal.daemon.loading.planning import rank_part
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.block_store import BlockStore
from shoal.offload.pack.layout import grains_of
from shoal.offload.window.window_store import WindowStore
from shoal.partition.plan import Misfit, Plan, Wanted
from shoal.partition.rank_plans import RankPart, rank_plans
from shoal.partition.slicing import divide
from shoal.partition.spec import BlockId

MODELS = ["llama", "qwen2", "gemma3", "olmo2", *tiny.EXPERT_SIZES]
NOTHING: Pinned = lambda block: False  # noqa: E731
EVEN: Pinned = lambda block: block.layer % 2 == 0 and block.kind != "expert"  # noqa: E731


def windows(directory: Path, pinned: Pinned = NOTHING) -> Opened:
    """Ranks that stream packs of their shards, which are made in `directory`, except what is pinned."""

    def opened(part: CheckpointShard, base: Plan) -> tuple[Plan, BlockStore]:
        assert part.shard != "whole"
        pack = build_pack(part, directory / str(part.shard.rank))
        plan = streaming_plan(base, part.spec, pack, pinned=pinned, slots=3, part_tokens=base.part_tokens)
        return plan, WindowStore.open(plan, pack)

    return opened


def assert_same(checkpoint: Checkpoint, base: Plan, ranks: int, opened: Opened, **how: object) -> None:
    work = orders(checkpoint.spec.vocab, seed=ranks)
    with (
        closing(Group(checkpoint, base, ranks, opened=resident, **how)) as still,  # type: ignore[arg-type]
        closing(Group(checkpoint, base, ranks, opened=opened, **how)) as streaming,  # type: ignore[arg-type]
    ):
        for order in work:
            expected, got = still.run(order), streaming.run(order)
            for one, other in zip(expected, got, strict=True):
                assert np.array_equal(one.logits, other.logits)
        assert still.members[0].seen == streaming.members[0].seen == streaming.members[-1].seen


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("ranks", "pinned"), [(2, NOTHING), (3, EVEN)])
def test_ranks_stream_their_own_shards(
    family: str, ranks: int, pinned: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has the rows of the embedding and the head's slices on disk, too."""
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, family, "F16") as checkpoint:
        base = replace(planned(checkpoint, FP32, 1 << 33), part_tokens=32)
        assert_same(checkpoint, base, ranks, windows(tmp_path, pinned), experts="whole")


def test_shares_columns_of_experts_and_a_cut_vocabulary_stream_too(tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, "qwen2_moe", "F16") as checkpoint:
        base = planned(checkpoint, FP32, 1 << 33)
        how = {"shares": (1, 3), "experts": "columns", "cut_vocabulary": True}
        assert_same(checkpoint, base, 2, windows(tmp_path), **how)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_ranks_do_as_they_were_planned(family: str, tmp_path: Path) -> None:
    """One rank has little memory and streams, the other has plenty and keeps all of its shard."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 8192,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 3,
    }
    known = vars(tiny.config(family))
    with tiny_checkpoint(
        tmp_path, family, **{key: sizes[key] for key in sizes if key in known}
    ) as checkpoint:
        shards = divide(checkpoint.spec, 2, grains_of(checkpoint, "keep"), experts="whole")
        wanted = wanted_of(checkpoint)

        def parts(memory: Callable[[int], int]) -> list[RankPart]:
            return [
                rank_part(CheckpointShard(checkpoint, shard), "keep", memory(shard.rank), 1)
                for shard in shards
            ]

        refused = rank_plans(wanted, parts(lambda rank: 0))
        assert all(isinstance(made, Misfit) for made in refused)
        least = [made.least_bytes for made in refused if isinstance(made, Misfit)]
        plans = rank_plans(wanted, parts(lambda rank: (1 << 33, least[1])[rank]))
        assert [isinstance(plan, Plan) and plan.streams for plan in plans] == [False, True]

        def opened(part: CheckpointShard, base: Plan) -> tuple[Plan, BlockStore]:
            assert part.shard != "whole"
            plan = plans[part.shard.rank]
            assert isinstance(plan, Plan)
            assert [item.block for item in plan.blocks if item.block.kind != "head"] == [
                block for block in part.spec.blocks() if block.kind != "head"
            ]
            if plan.streams:
                return plan, WindowStore.open(plan, build_pack(part, tmp_path / str(part.shard.rank)))
            return resident(part, plan)

        base = plans[1]
        assert isinstance(base, Plan)
        assert_same(checkpoint, base, 2, opened, experts="whole")


def wanted_of(checkpoint: Checkpoint) -> Wanted:
    return Wanted(
        checkpoint.spec,
        context_tokens=128,
        kv_tokens=512,
        kv_type="f32",
        chunk_tokens=64,
        sequences=4,
        guesses=4,
        threads=1,
    )


def test_a_worker_has_neither_embedding_nor_head_on_disk(tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, "qwen2") as checkpoint:
        first, second = (CheckpointShard(checkpoint, shard) for shard in divide(checkpoint.spec, 2))
        for part in (first, second):
            has = BlockId("embed") in rank_part(part, "keep", 0, 1).extents
            pack = build_pack(part, tmp_path / str(has))
            assert has == (part is first) == (BlockId("embed") in pack.blocks)
            for block in part.spec.blocks():
                assert part.block_bytes(block) == part.read_block(block).nbytes
