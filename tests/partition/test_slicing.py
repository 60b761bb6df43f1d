"""Ranks together hold everything once, in order, and cut only where that is possible; and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.errors import ShardError, SpecError
from shoal.partition.slicing import NONE, CutOfExperts, Grains, Range, Shard, cut_rows, divide, shard_spec
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec

SPEC = ModelSpec(
    family="llama",
    layers=(LayerSpec(),) * 2,
    hidden=256,
    vocab=1003,
    context=4096,
    heads=8,
    kv_heads=2,
    head_dim=32,
    ffn=512,
    ropes=(RopeSpec(16, 10000.0),),
)
MIXTURE = replace(
    SPEC,
    layers=(LayerSpec(moe=True),) * 2,
    ffn=0,
    moe=MoeSpec(10, 2, 64, True, shared_ffn=96, shared_gated=True),
)

FEW_EXPERTS = replace(MIXTURE, moe=MoeSpec(3, 2, 64, True))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelSpec, Grains, list[float]]:
    """A spec of odd sizes, its grains, and shares."""
    kv_heads, group = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    head_dim = draw(st.sampled_from([16, 24, 64, 96, 128, 256]))
    columns = kv_heads * group * head_dim
    attn = draw(st.sampled_from([grain for grain in (1, 32, 256) if columns % grain == 0]))
    ffn, shared = draw(st.sampled_from([1, 32, 256])), draw(st.sampled_from([1, 32, 256]))
    expert = draw(st.sampled_from([1, 32, 256]))
    shared_ffn, expert_ffn = shared * draw(st.integers(0, 300)), expert * draw(st.integers(1, 300))
    moe = MoeSpec(draw(st.integers(1, 40)), 1, expert_ffn, True, shared_ffn=shared_ffn)
    spec = replace(
        SPEC,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn * draw(st.integers(1, 300)),
        vocab=draw(st.integers(1, 3000)),
        moe=draw(st.sampled_from([None, moe])),
    )
    shares = draw(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
    return spec, Grains(attn, ffn, shared, expert), shares


def assert_follow(ranges: list[Range], end: int, grain: int = 1) -> None:
    """The ranges are disjoint, in order and not empty, cover [0, end), and are cut only at multiples of the grain."""
    assert [0, *(own.stop for own in ranges)] == [*(own.start for own in ranges), end]
    assert all(own.start < own.stop and own.start % grain == 0 for own in ranges)


def assert_whole(
    shards: tuple[Shard, ...], spec: ModelSpec, grains: Grains, cut_vocabulary: bool, experts: CutOfExperts
) -> None:
    own = [shard.ranges for shard in shards]
    group = spec.heads // spec.kv_heads
    assert_follow([item.heads for item in own], spec.heads)
    if cut_vocabulary:
        assert_follow([item.vocab for item in own], spec.vocab, 16)
    else:
        assert [item.vocab for item in own] == [Range(0, spec.vocab), *[NONE] * (len(own) - 1)]
    if spec.ffn:
        assert_follow([item.ffn for item in own], spec.ffn, grains.ffn)
    moe = spec.moe
    if moe and experts == "whole":
        assert_follow([item.experts for item in own], moe.experts)
        assert {item.expert_ffn for item in own} == {Range(0, moe.ffn)}
    elif moe:
        assert_follow([item.expert_ffn for item in own], moe.ffn, lcm(16, grains.expert_ffn))
        assert {item.experts for item in own} == {Range(0, moe.experts)}
    else:
        assert {item.experts for item in own} | {item.expert_ffn for item in own} == {NONE}
    if moe and moe.shared_ffn:
        assert_follow([item.shared_ffn for item in own], moe.shared_ffn, grains.shared_ffn)
    for rank, shard in enumerate(shards):
        heads, kv_heads = shard.ranges.heads, shard.ranges.kv_heads
        assert (heads.start // group, (heads.stop - 1) // group + 1) == kv_heads
        assert kv_heads.size == 1 or heads == kv_heads.times(group), "query heads go evenly over KV heads"
        assert (shard.rank, shard.ranks, shard.has_sum_biases) == (rank, len(shards), rank == 0)
        assert str(shard) == f"{rank + 1}/{len(shards)}"
        mixed, outputs = heads.times(spec.head_dim), shard.ranges.o_columns
        before, behind = mixed.start - outputs.start, outputs.stop - mixed.stop
        assert 0 <= before < grains.o > behind >= 0
        assert outputs.start % grains.o == 0 == outputs.stop % grains.o
        smaller = shard_spec(spec, shard)
        if moe and smaller.moe:
            held = len(smaller.moe.own) * smaller.moe.ffn
            assert held == shard.ranges.experts.size * shard.ranges.expert_ffn.size
            assert smaller.moe.experts == moe.experts, "the router chooses among all"
        tables = {block.kind for block in smaller.blocks()} & {"embed", "head"}
        assert len(tables) == (2 if cut_vocabulary or rank == 0 else 0)
        assert cut_rows(spec, shard) == (shard.ranges.vocab if cut_vocabulary and len(shards) > 1 else None)
        assert smaller.o_margins == (before, behind)
        assert (smaller.heads, smaller.kv_heads, smaller.hidden) == (heads.size, kv_heads.size, spec.hidden)


@settings(deadline=None, max_examples=300)
@given(cases(), st.booleans(), st.sampled_from(["columns", "whole"]))
def test_shards_are_all_of_the_model_once(
    case: tuple[ModelSpec, Grains, list[float]], cut_vocabulary: bool, experts: CutOfExperts
) -> None:
    spec, grains, shares = case

    def divided(ranks: int, shares: Sequence[float] = ()) -> tuple[Shard, ...]:
        return divide(spec, ranks, grains, shares, cut_vocabulary=cut_vocabulary, experts=experts)

    def check(shards: tuple[Shard, ...]) -> None:
        assert_whole(shards, spec, grains, cut_vocabulary, experts)

    with pytest.raises(ShardError, match=r"^1000000 ranks are too many: .* \d+ would do$") as caught:
        divided(10**6)
    most = int(str(caught.value).split()[-3])
    for ranks in range(1, most + 1):
        check(divided(ranks))
    with pytest.raises(ShardError, match=f"^{most + 1} ranks are too many"):
        divided(most + 1)
    if len(shares) <= most:
        check(divided(len(shares), shares))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=12), st.sampled_from([1, 32, 256]))
def test_shares_are_kept_to_one_group_of_columns(shares: list[float], grain: int) -> None:
    spec = replace(SPEC, heads=64, kv_heads=64, ffn=256 * 64)
    for shard, share in zip(divide(spec, len(shares), Grains(ffn=grain), shares), shares, strict=True):
        part = share / sum(shares)
        assert abs(shard.ranges.ffn.size - part * spec.ffn) <= max(16, grain) + 1e-6
        assert abs(shard.ranges.kv_heads.size - part * spec.kv_heads) <= 1 + 1e-6


@settings(deadline=None, max_examples=200)
@given(cases(), st.booleans(), st.sampled_from(["columns", "whole"]))
def test_sizes_are_near_the_shares(
    case: tuple[ModelSpec, Grains, list[float]], cut_vocabulary: bool, experts: CutOfExperts
) -> None:
    """To one group, and another for each rank that would have got nothing."""
    spec, grains, shares = case
    try:
        shards = divide(spec, len(shares), grains, shares, cut_vocabulary=cut_vocabulary, experts=experts)
    except ShardError:
        return
    moe = spec.moe
    parts: list[tuple[str, int, int]] = [("ffn", spec.ffn, grains.ffn)]
    if cut_vocabulary:
        parts.append(("vocab", spec.vocab, 1))
    if moe:
        parts.append(("shared_ffn", moe.shared_ffn, grains.shared_ffn))
        parts.append(
            ("experts", moe.experts, 0) if experts == "whole" else ("expert_ffn", moe.ffn, grains.expert_ffn)
        )
    if len(shares) <= spec.kv_heads:
        parts.append(("kv_heads", spec.kv_heads, 0))
    for name, count, grain in parts:
        group = lcm(16, grain) if grain else 1
        starved = sum(share / sum(shares) * count < group for share in shares)
        for shard, share in zip(shards, shares, strict=True):
            size = getattr(shard.ranges, name).size
            assert abs(size - share / sum(shares) * count) <= (2 + starved) * group + 1e-6, name


def test_more_ranks_than_kv_heads_share_their_query_heads() -> None:
    found = [(tuple(s.ranges.heads), tuple(s.ranges.kv_heads)) for s in divide(SPEC, 4)]
    assert found == [((0, 2), (0, 1)), ((2, 4), (0, 1)), ((4, 6), (1, 2)), ((6, 8), (1, 2))]
    found = [(tuple(s.ranges.heads), tuple(s.ranges.kv_heads)) for s in divide(SPEC, 3, shares=(2, 1, 1))]
    assert found == [((0, 4), (0, 1)), ((4, 6), (1, 2)), ((6, 8), (1, 2))]
    assert {s.ranges.heads.size for s in divide(SPEC, 8)} == {1}


def test_ranks_whose_heads_share_a_block_both_have_it() -> None:
    """A model has 28 heads of 128 and 4 KV heads, and its o is stored in blocks of 256."""
    spec = replace(SPEC, heads=28, kv_heads=4, head_dim=128)
    found = [(tuple(s.ranges.heads), tuple(s.ranges.o_columns)) for s in divide(spec, 4, Grains(o=256))]
    assert found == [
        ((0, 7), (0, 1024)),
        ((7, 14), (768, 1792)),
        ((14, 21), (1792, 2816)),
        ((21, 28), (2560, 3584)),
    ]
    assert [shard_spec(spec, s).o_margins for s in divide(spec, 4, Grains(o=256))] == [
        (0, 128), (128, 0), (0, 128), (128, 0)
    ]  # fmt: skip


def test_a_margin_cannot_be_negative() -> None:
    with pytest.raises(SpecError, match="must not be negative"):
        replace(SPEC, o_margins=(0, -1))


def test_experts_are_dealt_whole_and_keep_their_numbers() -> None:
    first, second, third = divide(MIXTURE, 3, experts="whole")
    assert [tuple(s.ranges.experts) for s in (first, second, third)] == [(0, 3), (3, 7), (7, 10)]
    assert first.ranges.ffn == NONE
    assert [s.ranges.shared_ffn.size for s in (first, second, third)] == [32, 32, 32]
    spec = shard_spec(MIXTURE, second)
    assert spec.ffn_blocks(1) == (BlockId("router", 1), *(BlockId("expert", 1, e) for e in range(3, 7)))
    assert spec.moe is not None
    assert (spec.moe.experts, spec.moe.shared_ffn) == (10, 32)


def test_alone_a_rank_has_the_model() -> None:
    for spec in (SPEC, MIXTURE, replace(SPEC, qk_norm="full")):
        (shard,) = divide(spec, 1)
        assert shard_spec(spec, shard) == spec


def test_shards_of_groups_of_different_sizes_may_be_the_same() -> None:
    halves, thirds = divide(SPEC, 2), divide(SPEC, 3, shares=(2, 1, 1))
    assert halves[0] != thirds[0]
    assert halves[0].same_bytes(thirds[0])
    assert not halves[1].same_bytes(thirds[1])
    assert not halves[0].same_bytes(replace(halves[0], rank=1))  # it has no biases of sums


REFUSED: list[tuple[ModelSpec, dict[str, Any], str]] = [
    (SPEC, {"ranks": 0}, "0 ranks: there must be 1 or more"),
    (SPEC, {"ranks": 9}, "9 ranks are too many: there are 8 heads; 8 would do"),
    (SPEC, {"ranks": 10**12}, "8 would do"),
    (SPEC, {"ranks": 3, "grains": Grains(ffn=256)}, "FFN has 512 columns, .* groups of 256; 2 would do"),
    (replace(SPEC, vocab=20), {"ranks": 3, "cut_vocabulary": True}, "20 rows, .* groups of 16; 2 would do"),
    (MIXTURE, {"ranks": 7, "experts": "whole"}, "shared expert has 96 columns, .* groups of 16; 6 would do"),
    (MIXTURE, {"ranks": 5}, "every expert has 64 columns, .* groups of 16; 4 would do"),
    (MIXTURE, {"ranks": 3, "grains": Grains(expert_ffn=32)}, "every expert has .* groups of 32; 2 would do"),
    (FEW_EXPERTS, {"ranks": 4, "experts": "whole"}, "there are 3 experts, .*; 3 would do"),
    (SPEC, {"ranks": 2, "shares": (1.0,)}, "1 shares for 2 ranks"),
    (SPEC, {"ranks": 2, "shares": (1.0, 0.0)}, "every one must be positive"),
    (SPEC, {"ranks": 2, "shares": (1.0, float("nan"))}, "every one must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "how", "said"), REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_numbers(
    spec: ModelSpec, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(ShardError, match=said) as caught:
        divide(spec, **how)
    assert "\n" not in str(caught.value)


def test_experts_that_are_not_there_cannot_be_held() -> None:
    for held in ((0, 0), (3, 11), (-1, 2)):
        with pytest.raises(SpecError, match="must be some of the 10 experts"):
            replace(MIXTURE.moe or MoeSpec(1, 1, 1, True), held=held)
