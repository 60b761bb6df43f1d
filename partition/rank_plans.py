"""Plans for the ranks of a group: each fits into its own memory, and they agree where ranks must.

Every page of KV has the same number on every rank, because rank 0 keeps the books for all. Sums over ranks have the
same rows everywhere, so the length of a step and of its parts is one for all. The tightest rank decides both. Which
blocks stay in memory is each rank's own business: if not all ranks keep everything, each streams what it has to.
Beside a head that has all of a model in memory the others have copies of pages, and need not have all. Pure: knows
sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from .memory_layout import PAGE_TOKENS, arena_slack
from .plan import BlockPlan, Misfit, Plan, Wanted, kv_plan, plan_in_ram
from .spec import BlockId, ModelSpec
from .streamed_plan import plan_streamed

LEAST_COPIED_TOKENS = 512  # for which ranks have pages beside a head that has all: a usual prompt


class RankPart(NamedTuple):
    """What one rank has of a model, and where. `spec`: of its shard. `block_bytes`: of its blocks in memory, in the
    order of a step. `extents` and `vectors_bytes`: of its pack, as for `plan_streamed`. `vocab`: as in `Wanted`."""

    spec: ModelSpec
    block_bytes: Mapping[BlockId, int]
    extents: Mapping[BlockId, int]
    vectors_bytes: int
    memory_bytes: int
    threads: int
    vocab: int | None = None


class Fit(NamedTuple):
    """How a model fits into the memory of ranks: the first that has too little, if there is one; whether weights come
    from a disk."""

    lacking: int | None
    streams: bool

    @property
    def may_want_cut_vocabulary(self) -> bool:
        """Whether embedding and head, which are rank 0's, could be cut for a better fit. If another rank lacks memory,
        it would get more."""
        return self.streams if self.lacking is None else self.lacking == 0

    def wants(self, cut: Fit) -> bool:
        """Whether to cut them, if it fits like that then: where there would be no plan otherwise, or where nothing
        comes from a disk any more. Every token costs a sum and a gathering more."""
        return cut.lacking is None and (self.lacking is not None or not cut.streams)


def rank_plans(
    wanted: Wanted, parts: Sequence[RankPart], *, streaming: bool = True
) -> tuple[Plan | Misfit, ...]:
    """A plan for each rank, in their order; if one of them is a misfit, there are no plans for the group. `wanted` says
    what the group is asked for; each rank puts in its own shard and threads. `streaming`: weights may come from disk.
    """
    asked = [wanted._replace(spec=it.spec, threads=it.threads, vocab=it.vocab) for it in parts]
    made = [_in_ram(*each) for each in zip(asked, parts, strict=True)]
    streams = streaming and any(isinstance(plan, Misfit) for plan in made)
    if streams:
        made = [_streamed(*each) for each in zip(asked, parts, strict=True)]
    found = [plan for plan in made if isinstance(plan, Plan)]
    if len(found) < len(made):
        return tuple(made)
    pages = min(plan.kv.pages for plan in found)
    # What the tightest rank leaves to the others they can use for weights.
    asked = [each._replace(kv_tokens=pages * PAGE_TOKENS) for each in asked]
    if streams:
        again = [_streamed(*each) for each in zip(asked, parts, strict=True)]
        found = [plan for plan in again if isinstance(plan, Plan)]
        assert len(found) == len(again), "less KV needs less memory"
    chunk = min(plan.chunk_tokens for plan in found)
    part = min(plan.part_tokens for plan in found)
    return tuple(
        replace(plan, kv=kv_plan(each, pages), chunk_tokens=chunk, part_tokens=part, ranks=len(parts))
        for plan, each in zip(found, asked, strict=True)
    )


def assisted_plans(wanted: Wanted, head: RankPart, others: Sequence[RankPart]) -> tuple[Plan | Misfit, ...]:
    """Plans in memory for a head that has all of the model, and for ranks that compute long steps with it. Its pages
    are its own business. Theirs are copies of some of these; the tightest decides how many, if there is no room for a
    whole context for shorter texts. If one plan is a misfit, there are none for the group."""
    ranks = len(others) + 1
    own = _in_ram(wanted._replace(spec=head.spec, threads=head.threads), head)
    for tokens in _copied_tokens(wanted):
        asked = [wanted._replace(spec=it.spec, threads=it.threads, kv_tokens=tokens) for it in others]
        made = [_in_ram(*each) for each in zip(asked, others, strict=True)]
        found = [plan for plan in (own, *made) if isinstance(plan, Plan)]
        if len(found) == ranks:
            pages = min(plan.kv.pages for plan in found)
            copies = [found[0].kv, *(kv_plan(each, pages) for each in asked)]
            return tuple(replace(it, kv=kv, ranks=ranks) for it, kv in zip(found, copies, strict=True))
    return own, *made


def _copied_tokens(wanted: Wanted) -> Iterator[int | None]:
    """For how many tokens others than the head may have pages, the most first."""
    yield wanted.kv_tokens
    tokens = wanted.context_tokens
    while tokens >= LEAST_COPIED_TOKENS:
        yield tokens
        tokens //= 2


def _in_ram(wanted: Wanted, part: RankPart) -> Plan | Misfit:
    return plan_in_ram(wanted, part.block_bytes, memory_bytes=part.memory_bytes)


def _streamed(wanted: Wanted, part: RankPart) -> Plan | Misfit:
    made = plan_streamed(wanted, part.extents, part.vectors_bytes, memory_bytes=part.memory_bytes)
    if isinstance(made, Misfit) or made.streamed_bytes:
        return made
    # If its embedding finds room as well, all of it stays, and need not come from a pack.
    stays = replace(
        made,
        blocks=tuple(BlockPlan(*item) for item in part.block_bytes.items()),
        window_bytes=0,
        expert_slots=0,
        scratch_bytes=made.scratch_bytes + arena_slack(sum(part.block_bytes.values())),
    )
    return stays if stays.peak_bytes <= part.memory_bytes else made
