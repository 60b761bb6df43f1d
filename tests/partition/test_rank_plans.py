"""Plans of a group's ranks fit into their memory and agree on pages of KV and on rows that are summed together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.given_plan import check_given
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.pinning import Pinnings
from shoal.partition.plan import Misfit, Plan, Wanted, plan_in_ram
from shoal.partition.rank_plans import LEAST_COPIED_TOKENS, Fit, RankPart, assisted_plans, rank_plans
from shoal.partition.slicing import Shard, divide, shard_spec
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec

MB = 1 << 20
DENSE = ModelSpec(
    family="llama",
    layers=(LayerSpec(),) * 28,
    hidden=3072,
    vocab=128256,
    context=8192,
    heads=24,
    kv_heads=8,
    head_dim=128,
    ffn=8192,
    ropes=(RopeSpec(128, 10000.0),),
)
MIXTURE = replace(
    DENSE, layers=(LayerSpec(moe=True),) * 28, ffn=0, moe=MoeSpec(64, 8, 1024, True), qk_norm="head"
)
WANTED = Wanted(
    DENSE,
    context_tokens=1024,
    kv_tokens=None,
    kv_type="f16",
    chunk_tokens=256,
    sequences=4,
    guesses=32,
    threads=2,
)


def part(spec: ModelSpec, shard: Shard, memory_bytes: int, threads: int = 2) -> RankPart:
    """A rank's part with weights of two bytes."""
    own = shard_spec(spec, shard)
    width = own.hidden * 2
    experts = own.moe.ffn * 3 * width if own.moe else 0
    sizes = {
        "embed": own.vocab * width,
        "attn": (2 * own.heads + 2 * own.kv_heads) * own.head_dim * width,
        "ffn": 3 * own.ffn * width,
        "router": 64 * width,
        "expert": experts,
        "head": own.vocab * width,
    }
    in_memory = {block: sizes[block.kind] for block in own.blocks()}
    packed = {block: size for block, size in in_memory.items() if block.kind != "head"}
    slices = {BlockId("head", -1, number): own.vocab * width // 12 for number in range(12) if own.vocab}
    return RankPart(own, in_memory, packed | slices, MB, memory_bytes, threads)


def parts(spec: ModelSpec, memory: list[int], shares: tuple[float, ...] = ()) -> list[RankPart]:
    shards = divide(spec, len(memory), shares=shares, experts="whole")
    return [part(spec, shard, nbytes, 1 + shard.rank) for shard, nbytes in zip(shards, memory, strict=True)]


def planned(spec: ModelSpec, memory: list[int], **more: bool) -> list[Plan]:
    made = rank_plans(WANTED._replace(spec=spec), parts(spec, memory), **more)
    plans = [plan for plan in made if isinstance(plan, Plan)]
    assert len(plans) == len(made)
    return plans


def assert_agreed(plans: list[Plan], own: list[RankPart]) -> None:
    assert len({(p.kv.pages, p.chunk_tokens, p.part_tokens, p.context_tokens, p.ranks) for p in plans}) == 1
    for plan, mine in zip(plans, own, strict=True):
        assert plan.peak_bytes <= mine.memory_bytes
        assert plan.kv.nbytes == plan.kv.pages * kv_page_bytes(mine.spec, "f16")
        assert plan.threads == mine.threads
        assert plan.ranks == len(own)
        assert plan.kv.tokens >= WANTED.context_tokens
        blocks = {item.block for item in plan.blocks}
        assert blocks in (set(mine.block_bytes), set(mine.extents))
        if not mine.spec.vocab:  # so every rank but the first
            check_given(plan, mine.spec, mine.block_bytes.__getitem__)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([DENSE, MIXTURE]),
    st.lists(st.integers(100, 20_000), min_size=1, max_size=6),
    st.booleans(),
)
def test_ranks_agree_and_none_takes_more_than_it_has(
    spec: ModelSpec, megabytes: list[int], streaming: bool
) -> None:
    memory = [it * MB for it in megabytes]
    own = parts(spec, memory)
    made = rank_plans(WANTED._replace(spec=spec), own, streaming=streaming)
    assert len(made) == len(own)
    misfits = [found for found in made if isinstance(found, Misfit)]
    if not misfits:
        assert_agreed([plan for plan in made if isinstance(plan, Plan)], own)
        return
    enough = [
        max(found.least_bytes, nbytes) if isinstance(found, Misfit) else nbytes
        for found, nbytes in zip(made, memory, strict=True)
    ]
    assert any(now > before for now, before in zip(enough, memory, strict=True))
    plans = rank_plans(WANTED._replace(spec=spec), parts(spec, enough), streaming=streaming)
    assert_agreed([plan for plan in plans if isinstance(plan, Plan)], parts(spec, enough))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([DENSE, MIXTURE]),
    st.integers(10_000, 40_000),
    st.lists(st.integers(100, 20_000), min_size=1, max_size=4),
    st.sampled_from([256, 1024, 8192]),
    st.sampled_from([None, 512, 4096]),
)
def test_beside_a_head_that_has_all_others_take_no_more_than_they_have(
    spec: ModelSpec, head_megabytes: int, megabytes: list[int], context: int, kv_tokens: int | None
) -> None:
    """They agree on pages, which may be fewer than the head's, and would believe their plans; nothing fits less."""
    wanted = WANTED._replace(spec=spec, context_tokens=context, kv_tokens=kv_tokens)
    head = part(spec, divide(spec, 1)[0], head_megabytes * MB)
    others = parts(spec, [1 << 50, *(it * MB for it in megabytes)])[1:]
    made = assisted_plans(wanted, head, others)
    assert len(made) == len(others) + 1
    plans = [plan for plan in made if isinstance(plan, Plan)]
    if len(plans) < len(made):
        for found, mine in zip(made, (head, *others), strict=True):
            assert isinstance(found, Plan) or found.least_bytes > mine.memory_bytes
        return
    own, *theirs = plans
    alone = plan_in_ram(wanted._replace(spec=head.spec), head.block_bytes, memory_bytes=head.memory_bytes)
    assert isinstance(alone, Plan)
    assert own.kv == alone.kv
    (pages,) = {plan.kv.pages for plan in theirs}
    assert pages <= own.kv.pages
    assert pages * 64 >= min(context, kv_tokens or context, LEAST_COPIED_TOKENS)
    for plan, mine in zip(theirs, others, strict=True):
        assert plan.peak_bytes <= mine.memory_bytes
        assert (plan.context_tokens, plan.chunk_tokens, plan.ranks) == (context, own.chunk_tokens, len(plans))
        check_given(plan, mine.spec, mine.block_bytes.__getitem__)


def test_if_all_fits_nothing_streams_and_the_tightest_rank_decides_about_kv() -> None:
    roomy, tight = planned(DENSE, [30_000 * MB, 3_600 * MB])
    assert not roomy.streams
    assert not tight.streams
    own = parts(DENSE, [30_000 * MB, 3_600 * MB])
    alone = plan_in_ram(
        WANTED._replace(spec=own[1].spec), own[1].block_bytes, memory_bytes=own[1].memory_bytes
    )
    assert isinstance(alone, Plan)
    assert roomy.kv.pages == tight.kv.pages == alone.kv.pages
    assert roomy.kv.nbytes == tight.kv.nbytes, "they have as many heads"


def test_a_rank_that_has_room_for_its_shard_keeps_it_though_another_streams() -> None:
    roomy, tight = planned(DENSE, [30_000 * MB, 1_500 * MB])
    assert not roomy.streams
    assert [item.block for item in roomy.blocks][-1] == BlockId("head")
    assert tight.streams
    assert tight.window_bytes > 0


def test_what_a_tight_rank_leaves_to_the_others_is_used_for_weights() -> None:
    plans = planned(DENSE, [2_500 * MB, 1_500 * MB])
    alone = rank_plans(WANTED, parts(DENSE, [2_500 * MB, 30_000 * MB]))[0]
    assert isinstance(alone, Plan)
    assert plans[0].kv.pages < alone.kv.pages
    assert plans[0].pinned_bytes > alone.pinned_bytes


def test_experts_stream_on_the_ranks_that_have_them() -> None:
    first, second = planned(MIXTURE, [8_000 * MB, 8_000 * MB])
    assert first.expert_slots > 0 < second.expert_slots
    for plan, own in ((first, range(32)), (second, range(32, 64))):
        assert {item.block.expert for item in plan.blocks if item.block.kind == "expert"} == set(own)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_misfit_says_what_this_rank_needs(streaming: bool) -> None:
    made = rank_plans(WANTED, parts(DENSE, [30_000 * MB, 10 * MB]), streaming=streaming)
    assert isinstance(made[0], Plan)
    assert isinstance(made[1], Misfit)
    assert made[1].least_bytes > 10 * MB
    assert (made[1].least_bytes < 1_000 * MB) == streaming


def test_a_rank_that_has_some_of_the_experts_streams_its_share_of_the_active_ones() -> None:
    """Together the ranks stream what one that has all experts would."""
    moe = MIXTURE.moe
    assert moe is not None
    expert_bytes = 3 * moe.ffn * MIXTURE.hidden * 2
    for share, own in zip((1 / 2, 1 / 4, 1 / 4), parts(MIXTURE, [0] * 3, (2.0, 1.0, 1.0)), strict=True):
        dense = sum(nbytes for it, nbytes in own.extents.items() if it.kind not in ("embed", "expert"))
        found = Pinnings(own.spec, own.extents).best(dense + 14 * expert_bytes, 0)
        assert found is not None
        assert found.expert_slots == 14
        missed = 1 - 14 / (28 * moe.experts * share)
        assert found.streamed_bytes == pytest.approx(28 * moe.active * share * expert_bytes * missed)


def test_a_vocabulary_is_cut_where_that_helps() -> None:
    fits, streams, rank_0, rank_1 = Fit(None, False), Fit(None, True), Fit(0, False), Fit(1, False)
    assert [it.may_want_cut_vocabulary for it in (fits, streams, rank_0, rank_1)] == [
        False,
        True,
        True,
        False,
    ]
    assert streams.wants(fits)
    assert not streams.wants(streams)
    assert not streams.wants(rank_1)
    assert rank_0.wants(streams)
    assert rank_0.wants(fits)
    assert not rank_0.wants(rank_1)
