"""Whatever machines there are: nobody is worse off with one more, all fits, and what was chosen can be carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from fakes.group.group_cases import (
    CABLE,
    all_linked,
    block_bytes,
    machine,
    mixture,
    model,
    small,
    wanted,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.group_choice import Choice, NoGroup, RankPlan
from shoal.partition.group_cost import Cost
from shoal.partition.group_cuts import Cuts
from shoal.partition.group_search import EXACT_MACHINES, TOLERANCE, choose
from shoal.partition.machines import LinkSpeed, Machine, Workload
from shoal.partition.memory_layout import arena_slack
from shoal.partition.plan import Plan, least_in_ram
from shoal.partition.rank_sizes import Memory, Sizes
from shoal.partition.slicing import ANYWHERE, Shard, divide, shard_spec
from shoal.partition.spec import ModelSpec
from shoal.partition.streamed_plan import plan_streamed
from shoal.partition.sum_cost import Means, Network

MODELS = {"8b": model(), "small": small(), "mixture": mixture()}
SIZES = {name: block_bytes(spec) for name, spec in MODELS.items()}
ALL: Mapping[str, Any] = {
    "topologies": ("star", "exchange", "sliced"),
    "splits": ("tensor", "pipeline", "prompts"),
}
Pairs = dict[tuple[int, int], LinkSpeed]

MACHINES = st.builds(
    machine,
    st.just("m"),
    st.sampled_from([0.5, 1, 2, 4, 8, 16]),
    st.sampled_from([2, 5, 10, 20, 40]),
    st.sampled_from([10, 50, 200, 800]),
    st.sampled_from([0, 0, 0.1, 0.5, 2]),
)
LINKS = st.builds(
    LinkSpeed,
    st.sampled_from([2e-5, 1e-4, 1e-3, 5e-3, 27e-3]),
    st.sampled_from([1e6, 5e6, 12e6, 118e6, 1.2e9]),
)


@st.composite
def clusters(draw: st.DrawFn, most: int = 5) -> tuple[str, list[Machine], Pairs, dict[str, Any]]:
    machines = draw(st.lists(MACHINES, min_size=2, max_size=most))
    links = {pair: draw(LINKS) for pair in all_linked(len(machines), CABLE)}
    return draw(st.sampled_from(sorted(MODELS))), machines, links, dict(draw(st.sampled_from([{}, ALL])))


def pick(name: str, machines: list[Machine], links: Pairs, **more: Any) -> Choice | NoGroup:
    return choose(wanted(MODELS[name]), SIZES[name], machines, links, **more)


def within(choice: Choice, other: Choice, factor: float) -> bool:
    return choice.figures.within(other.figures, factor + 1e-9)


@settings(max_examples=50, deadline=None)
@given(clusters(most=EXACT_MACHINES + 3))
def test_another_machine_never_costs_more_than_a_twentieth(
    cluster: tuple[str, list[Machine], Pairs, dict[str, Any]],
) -> None:
    """Neither a token nor the first token of any prompt; against the head alone, and against those there were."""
    name, machines, links, more = cluster
    found = pick(name, machines, links, **more)
    before = pick(
        name, machines[:-1], {pair: it for pair, it in links.items() if max(pair) < len(machines) - 1}, **more
    )
    if isinstance(before, Choice):
        assert isinstance(found, Choice)
        assert within(found, before, TOLERANCE)
        assert found.figures.total_s <= before.figures.total_s
    if isinstance(found, Choice) and found.alone:
        assert found.figures.within(found.alone, TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(clusters(), st.data(), st.sampled_from([1, 2, 10]), st.sampled_from([1, 2, 10]))
def test_a_faster_link_never_makes_a_group_slower(
    cluster: tuple[str, list[Machine], Pairs, dict[str, Any]], data: st.DataObject, sooner: int, wider: int
) -> None:
    """Of any number that is asked for; and with one further machine, what is chosen."""
    name, machines, links, more = cluster
    pair = data.draw(st.sampled_from(sorted(links)))
    faster = links | {pair: LinkSpeed(links[pair].latency_s / sooner, links[pair].bytes_per_s * wider)}
    ranks = data.draw(st.sampled_from([None, 2] if len(machines) == 2 else range(1, len(machines) + 1)))
    before, after = (pick(name, machines, which, ranks=ranks, **more) for which in (links, faster))
    if isinstance(before, Choice):
        assert isinstance(after, Choice)
        assert after.figures.total_s <= before.figures.total_s + 1e-9


def assert_plan(part: ModelSpec, rank: RankPlan, own: Machine, vocab: int | None = None) -> None:
    """There is a plan for this shard in the memory of its machine, and it streams only if that was said. `vocab`: as in
    `Wanted`."""
    sizes = {it: nbytes for it, nbytes in block_bytes(part).items() if part.vocab or it.kind != "head"}
    asked = wanted(part, threads=own.threads, vocab=vocab)
    if rank.streamed_bytes or rank.missing_experts:
        assert isinstance(plan_streamed(asked, sizes, 0, memory_bytes=own.memory_bytes), Plan)
    else:
        # The embedding may come from disk although nothing else does.
        resident = {
            it: nbytes for it, nbytes in sizes.items() if it.kind != "embed" or not own.disk_bytes_per_s
        }
        assert least_in_ram(asked, resident).peak_bytes <= 1.002 * own.memory_bytes


def assert_both(name: str, shard: Shard, head: Machine) -> None:
    """The head has room for the whole model and for its part."""
    spec = MODELS[name]
    part = block_bytes(shard_spec(spec, shard))
    layers = sum(nbytes for block, nbytes in part.items() if block.kind not in ("embed", "head"))
    whole = least_in_ram(wanted(spec, threads=head.threads), SIZES[name]).peak_bytes
    assert whole + layers + arena_slack(layers) <= 1.002 * head.memory_bytes


@settings(max_examples=60, deadline=None)
@given(clusters(), st.booleans())
def test_no_group_is_faster_than_its_bound(
    cluster: tuple[str, list[Machine], Pairs, dict[str, Any]], may_cut: bool
) -> None:
    """Or good groups would not be looked at."""
    name, machines, links, more = cluster
    asked, sizes = wanted(MODELS[name]), Sizes.of(MODELS[name], SIZES[name])
    cost, memory = Cost(asked, sizes, Workload()), Memory(asked, sizes)
    cuts = Cuts(asked, sizes, memory, ANYWHERE, may_cut_vocabulary=may_cut)
    network = Network(machines, links, range(len(machines)))
    means = [
        Means(topology, wire) for topology in more.get("topologies", ["star"]) for wire in ("f32", "int8")
    ]
    bound = cost.bound(machines, network, means, cut_vocabulary=may_cut)
    for _, parts in cuts.divided(machines, all_wishes=True):
        assert bound.within(cost.tensor(parts, network, means), 1 + 1e-9)
    layered = cost.bound(machines, network, (), layered=True)
    for _, parts in cuts.layered(machines):
        figures = cost.pipeline(parts, network)
        assert figures
        assert layered.within(figures, 1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(clusters())
def test_a_choice_can_be_carried_out(cluster: tuple[str, list[Machine], Pairs, dict[str, Any]]) -> None:
    name, machines, links, more = cluster
    found = pick(name, machines, links, **more)
    assert found.describe()
    if not isinstance(found, Choice):
        return
    assert found.ranks[0].place == 0, "the head is rank 0"
    assert sum(rank.share for rank in found.ranks) == pytest.approx(1)
    places = [rank.place for rank in found.ranks]
    assert places == sorted(set(places))
    for rank in found.ranks:
        own = machines[rank.place]
        assert 0 < rank.needed_bytes <= own.memory_bytes
        assert own.disk_bytes_per_s or not (rank.streamed_bytes or rank.missing_experts)
    if found.split == "pipeline":
        counts = [stop - start for start, stop in filter(None, (rank.layers for rank in found.ranks))]
        assert sum(counts) == len(MODELS[name].layers)
    elif len(found.ranks) > 1:
        cuts = {"experts": found.experts, "cut_vocabulary": found.cuts_vocabulary}
        shards = divide(MODELS[name], len(found.ranks), shares=found.shares, **cuts)  # type: ignore[arg-type]
        gathers = (MODELS[name].vocab, *[0] * len(shards)) if found.cuts_vocabulary else [None] * len(shards)
        if found.split == "prompts":
            assert_both(name, shards[0], machines[0])
            assert not any(rank.streamed_bytes or rank.missing_experts for rank in found.ranks)
            shards, ranks = shards[1:], found.ranks[1:]
            for rank, shard in zip(ranks, shards, strict=True):
                assert_plan(shard_spec(MODELS[name], shard), rank, machines[rank.place])
            return
        for rank, shard, vocab in zip(found.ranks, shards, gathers, strict=False):
            assert_plan(shard_spec(MODELS[name], shard), rank, machines[rank.place], vocab)
    assert len(found.ranks) + len(found.unused) == len(machines)
    assert pick(name, machines, links, **more) == found, "the same figures give the same choice"


def test_what_was_measured_counts_more_than_what_was_predicted() -> None:
    machines = [machine("head"), machine("slow"), machine("third")]
    links = all_linked(3, CABLE)
    both, alone = (pick("8b", machines[:count], links, topologies=("star",)) for count in (2, 1))
    assert isinstance(both, Choice)
    assert isinstance(alone, Choice)
    assert len(both.ranks) == 2
    pair_s, head_s = both.figures.token_s, alone.figures.token_s

    def ranks(measured: dict[tuple[int, ...], float], count: int = 2) -> list[str]:
        found = pick("8b", machines[:count], links, topologies=("star",), measured=measured)
        assert isinstance(found, Choice)
        return [rank.machine for rank in found.ranks]

    assert ranks({(0, 1): 3 * pair_s}) == ["head"]
    assert ranks({(0, 1): 3 * pair_s, (0,): 3 * head_s}) == ["head", "slow"]
    assert ranks({(0,): 3 * head_s}) == ["head", "slow"]
    assert ranks({(0, 1): 1.1 * head_s}) == ["head"]
    assert ranks({(0, 1): 0.9 * head_s}) == ["head", "slow"]
    assert ranks({(0, 1): 3 * pair_s}, 3) == ["head", "third"]
    corrected = pick("8b", machines[:2], links, topologies=("star",), measured={(0, 1): 1.2 * pair_s})
    assert isinstance(corrected, Choice)
    assert corrected.figures.token_s == pytest.approx(1.2 * pair_s)
    assert corrected.describe().endswith(" (corrected by what was measured)")
    assert "measured" not in both.describe()
