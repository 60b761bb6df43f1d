"""Plans for the ranks of a group: each within its own memory, and alike in what ranks must have in common.

Pages of KV, the context, the tokens of a step and the rows of its parts are those of the tightest rank, because all
carry out the same orders, and sum part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from shoal.daemon.config import NodeConfig
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.partition.plan import Misfit, Plan

from .planning import make_plan


class RankSeat(NamedTuple):
    """What a rank is planned for: its shard, with the configuration of its machine, in so much memory."""

    part: AnyCheckpoint
    config: NodeConfig
    memory_bytes: int


class TooTight(NamedTuple):
    """A rank that has no plan, and the memory that would do."""

    rank: int
    least_bytes: int


def rank_plans(seats: Sequence[RankSeat]) -> list[Plan] | TooTight:
    """A plan for each rank. Raises DaemonError as `make_plan` does."""
    free = _each(seats)
    if isinstance(free, TooTight):
        return free
    context = min(plan.context_tokens for plan in free)
    tokens = min(plan.kv.tokens for plan in free)
    bound = _each(
        [
            seat._replace(config=replace(seat.config, context_tokens=context, kv_tokens=tokens))
            for seat in seats
        ]
    )
    if isinstance(bound, TooTight):
        return bound
    return [
        replace(
            plan,
            chunk_tokens=min(plan.chunk_tokens for plan in bound),
            part_tokens=min(plan.part_tokens for plan in bound),
            sequences=min(plan.sequences for plan in bound),
            guesses=min(plan.guesses for plan in bound),
            ranks=len(bound),
        )
        for plan in bound
    ]


def _each(seats: Sequence[RankSeat]) -> list[Plan] | TooTight:
    plans = []
    for rank, seat in enumerate(seats):
        made = make_plan(seat.part, seat.config, seat.memory_bytes)
        if isinstance(made, Misfit):
            return TooTight(rank, made.least_bytes)
        plans.append(made)
    return plans
