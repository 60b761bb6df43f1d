"""A model cut as it was chosen, with a plan for each rank.

Knows checkpoints and how their shards are planned. Which machines the ranks are, and what was chosen, is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.budgeting import disk_buffer_bytes
from shoal.daemon.loading.planning import rank_part, wanted_of
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint, CheckpointShard
from shoal.offload.pack.layout import grains_of
from shoal.partition.errors import ShardError
from shoal.partition.group_choice import Choice
from shoal.partition.group_search import STEADY
from shoal.partition.memory_layout import arena_slack
from shoal.partition.plan import BlockPlan, Misfit, Plan, Wanted
from shoal.partition.rank_plans import Fit, RankPart, assisted_plans, rank_plans
from shoal.partition.slicing import Shard, divide


class TooTight(NamedTuple):
    """A rank that has no plan, and the memory that would do."""

    rank: int
    least_bytes: int


class PlannedCut(NamedTuple):
    """A model in shares, and the plans for it, if there are any. If it is cut for prompts only, the first plan is that
    of the whole model, and rank 0 has its `share` besides (`daemon.loading.grouping.OwnShare`)."""

    choice: Choice
    shards: Sequence[Shard]
    parts: Sequence[CheckpointShard]
    plans: Sequence[Plan] | TooTight
    share: Plan | None = None

    @property
    def streamed_bytes(self) -> float:
        """What the rank that streams most reads for a token."""
        if isinstance(self.plans, TooTight):
            return inf
        return max(plan.streamed_bytes for plan in self.plans)

    @property
    def fit(self) -> Fit:
        if isinstance(self.plans, TooTight):
            return Fit(self.plans.rank, False)
        return Fit(None, self.streamed_bytes > 0)

    @property
    def cuts_vocabulary(self) -> bool:
        return len(self.shards) > 1 and self.shards[1].ranges.vocab.size > 0

    def is_better(self, other: PlannedCut) -> bool:
        """Whether it streams clearly less, or no more and keeps the vocabulary in one piece."""
        if STEADY * self.streamed_bytes < other.streamed_bytes:
            return True
        return self.cuts_vocabulary < other.cuts_vocabulary and self.streamed_bytes <= other.streamed_bytes


def planned_cut(
    checkpoint: Checkpoint,
    config: NodeConfig,
    choice: Choice,
    rooms: Sequence[int],
    threads: Sequence[int],
    *,
    may_cut_vocabulary: bool = True,
) -> PlannedCut:
    """`rooms`, `threads`: bytes of memory and threads of each rank. Rank 0 has all of embedding and head, unless
    cutting them helps (`Fit.wants`)."""
    made = _planned(checkpoint, config, choice, rooms, threads)
    if choice.split == "prompts" or not may_cut_vocabulary or not made.fit.may_want_cut_vocabulary:
        return made
    try:
        other = _planned(checkpoint, config, choice, rooms, threads, cut_vocabulary=True)
    except ShardError:
        return made  # more ranks than groups of rows
    return other if made.fit.wants(other.fit) else made


def _planned(
    checkpoint: Checkpoint,
    config: NodeConfig,
    choice: Choice,
    rooms: Sequence[int],
    threads: Sequence[int],
    *,
    cut_vocabulary: bool = False,
) -> PlannedCut:
    spec, grains = checkpoint.spec, grains_of(checkpoint, config.quant)
    shards = divide(
        spec,
        len(choice.ranks),
        grains,
        choice.shares,
        cut_vocabulary=cut_vocabulary,
        experts=choice.experts,
    )
    # The tokenizer and whole logits are rank 0's, whatever rows it has.
    vocabs = [spec.vocab if cut_vocabulary else None, *[0 if cut_vocabulary else None] * len(shards[1:])]
    parts = [CheckpointShard(checkpoint, shard) for shard in shards]
    held: list[AnyCheckpoint] = [*parts]
    layers: list[BlockPlan] = []
    if choice.split == "prompts":
        held[0] = checkpoint
        blocks = rank_part(parts[0], config.quant, 0, 1).block_bytes.items()
        layers = [BlockPlan(*item) for item in blocks if item[0].kind not in ("embed", "head")]
    share_bytes = sum(item.nbytes for item in layers)
    taken = [share_bytes + arena_slack(share_bytes), *[0] * len(parts[1:])]
    needs = [
        rank_part(part, config.quant, max(0, room - disk_buffer_bytes(part, config) - share), own, vocab)
        for part, room, share, own, vocab in zip(held, rooms, taken, threads, vocabs, strict=True)
    ]
    plans = _plans(wanted_of(checkpoint.spec, config), needs, assisted=bool(layers))
    if isinstance(plans, TooTight):
        return PlannedCut(choice, shards, parts, plans)
    figures = choice.figures
    plans = [
        replace(
            plan,
            overlap_rows=figures.overlap_rows,
            group_rows=figures.group_rows,
            page_rows=figures.page_rows,
        )
        for plan in plans
    ]
    if not layers:
        return PlannedCut(choice, shards, parts, plans)
    first, *others = plans
    share = replace(
        first,
        blocks=tuple(layers),
        kv=replace(first.kv, nbytes=0),
        scratch_bytes=arena_slack(share_bytes),
    )
    return PlannedCut(choice, shards, parts, [replace(first, ranks=1), *others], share)


def _plans(
    wanted: Sequence[Wanted], parts: Sequence[RankPart], *, assisted: bool
) -> Sequence[Plan] | TooTight:
    """Plans in memory for the longest context with which there are some; else plans that stream, if the head is not
    only `assisted`."""
    tried = (assisted_plans(it, parts[0], parts[1:]) for it in wanted)
    if not assisted:
        tried = (rank_plans(it, parts, streaming=streams) for streams in (False, True) for it in wanted)
    made: Sequence[Plan | Misfit] = ()
    for made in tried:
        plans = [plan for plan in made if isinstance(plan, Plan)]
        if len(plans) == len(made):
            return plans
    rank, misfit = next((rank, it) for rank, it in enumerate(made) if isinstance(it, Misfit))
    return TooTight(rank, misfit.least_bytes)
