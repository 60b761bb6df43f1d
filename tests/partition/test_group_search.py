"""Who takes part, as it can be worked out by hand; and what is told if nobody can."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from fakes.group.group_cases import (
    CABLE,
    GB,
    WIFI,
    all_linked,
    block_bytes,
    machine,
    mixture,
    model,
    small,
    wanted,
)

from shoal.partition.errors import MachineError
from shoal.partition.group_choice import Choice, KeptCut, KeptCuts, NoGroup
from shoal.partition.group_search import choose
from shoal.partition.machines import LinkSpeed, Machine, Workload
from shoal.partition.rank_sizes import crowding
from shoal.partition.slicing import Grains, divide
from shoal.partition.spec import LayerSpec, ModelSpec, MoeSpec
from shoal.partition.sum_cost import Means

MODELS = {"8b": model(), "small": small(), "mixture": mixture()}
SIZES = {name: block_bytes(spec) for name, spec in MODELS.items()}
ALL: Mapping[str, Any] = {"topologies": ("star", "exchange", "sliced"), "splits": ("tensor", "pipeline")}
FAR = LinkSpeed(2.5e-3, 125e6, "Wi-Fi")  # quick enough for prompts
Pairs = dict[tuple[int, int], LinkSpeed]


def chosen(spec: ModelSpec, machines: list[Machine], links: Pairs, **more: Any) -> Choice:
    """By a star, unless it is said otherwise."""
    found = choose(wanted(spec), block_bytes(spec), machines, links, **{"topologies": ("star",), **more})
    assert isinstance(found, Choice), found
    return found


def names(choice: Choice) -> list[str]:
    return [rank.machine for rank in choice.ranks]


def test_alone_a_token_takes_as_long_as_its_bytes() -> None:
    """4.2 GB of weights without the embedding, 0.08 GB of KV at 640 tokens: 4.28 GB at 20 GB/s."""
    found = chosen(model(), [machine("head")], {})
    assert names(found) == ["head"]
    assert found.shares == ()
    assert found.figures.token_s == pytest.approx(4.28 / 20 + 1e-3, rel=0.02)
    # 512 tokens, 7 billion weights of layers, a multiplication and an addition each, at 400 GFLOPS.
    first_token_s = found.figures.first_token_s[found.prompts.index(512)]
    assert first_token_s == pytest.approx(2 * 512 * 7.0 / 400, rel=0.05)


def test_two_equal_machines_at_a_cable_take_half_each() -> None:
    found = chosen(model(), [machine("head"), machine("other")], all_linked(2, CABLE))
    assert names(found) == ["head", "other"]
    assert found.shares == (128, 128)
    shards = divide(model(), 2, shares=found.shares)
    assert [shard.ranges.kv_heads.size for shard in shards] == [4, 4]
    # Half of 3.9 GB of layers, the head's 0.3 GB, and 65 times 0.2 ms and a little over the cable.
    assert found.figures.token_s == pytest.approx(1.98 / 20 + 0.296 / 20 + 65 * 0.0005, rel=0.1)


def test_a_far_machine_is_not_used_and_the_reason_is_its_delay() -> None:
    """Two sums a layer wait for it: 64 times 54 ms a token."""
    found = chosen(model(), [machine("head"), machine("pi3")], all_linked(2, WIFI))
    assert names(found) == ["head"]
    (pi3,) = found.unused
    assert pi3.with_it
    assert 64 * 0.054 < pi3.with_it.token_s < 1.2 * 64 * 0.054 + 0.2


def test_of_three_the_far_one_is_left_out() -> None:
    links = all_linked(3, CABLE) | {(0, 2): WIFI, (1, 2): WIFI}
    found = chosen(model(), [machine("head"), machine("near"), machine("far")], links)
    assert names(found) == ["head", "near"]
    assert [unused.machine for unused in found.unused] == ["far"]


def test_uneven_machines_have_uneven_shares() -> None:
    uneven = [machine("head", pace=30, flops=600), machine("other", pace=10, flops=200)]
    found = chosen(model(), uneven, all_linked(2, CABLE), ranks=2)
    assert [rank.share for rank in found.ranks] == pytest.approx([0.75, 0.25], abs=0.03)


def test_what_no_machine_can_hold_several_can() -> None:
    machines = [machine(str(rank), 3) for rank in range(3)]
    found = chosen(model(), machines, all_linked(3, CABLE))
    assert len(found.ranks) == 3
    assert found.alone is None
    assert found.ranks[0].share < found.ranks[1].share or found.ranks[0].share == pytest.approx(
        1 / 3, abs=0.05
    )


def test_a_tiny_machine_gets_what_fits_there() -> None:
    found = chosen(model(), [machine("head", 4.5), machine("tiny", 1.2)], all_linked(2, CABLE))
    assert names(found) == ["head", "tiny"]
    assert found.ranks[1].share < 0.3
    assert found.ranks[1].needed_bytes <= 1.2 * GB


def test_a_group_multiplies_the_speed_of_disks() -> None:
    one = machine("head", 2, disk=1)
    alone = chosen(model(), [one], {})
    assert alone.ranks[0].streamed_bytes > 2 * GB
    both = chosen(model(), [one, machine("other", 2, disk=1)], all_linked(2, CABLE))
    assert len(both.ranks) == 2
    assert both.figures.token_s <= 0.6 * alone.figures.token_s
    four = chosen(model(), [one] * 4, all_linked(4, CABLE))
    assert four.figures.token_s <= 0.35 * alone.figures.token_s


def test_more_ranks_than_kv_heads() -> None:
    machines = [machine(str(rank), 16, pace=2, flops=20) for rank in range(4)]
    found = chosen(small(), machines, all_linked(4, LinkSpeed(20e-6, 1e9)))
    assert len(found.ranks) > small().kv_heads


def test_the_wire_follows_the_link() -> None:
    slow, fast = LinkSpeed(0.1e-3, 12e6), LinkSpeed(20e-6, 4e9)

    def decode(link: LinkSpeed, **more: Any) -> Means | None:
        return chosen(
            model(), [machine("a"), machine("b")], all_linked(2, link), ranks=2, **more
        ).figures.decode

    assert decode(slow) == Means("star", "int8")
    assert decode(fast) == Means("star", "f32")
    assert decode(slow, wires=("f32",)) == Means("star", "f32")


def test_prompts_and_answers_may_add_in_different_ways() -> None:
    found = chosen(model(), [machine(str(rank)) for rank in range(4)], all_linked(4, CABLE), **ALL)
    assert found.figures.decode
    assert found.figures.prompt
    assert (found.figures.decode.topology, found.figures.prompt.topology) == ("exchange", "sliced")


def test_layers_are_divided_where_delay_is_too_long_for_sums() -> None:
    machines = [machine("head", 3.2), machine("other", 3.5)]
    far = all_linked(2, LinkSpeed(5e-3, 12e6))
    summing, piped = (chosen(model(), machines, far, **more) for more in ({}, ALL))
    assert (summing.split, piped.split) == ("tensor", "pipeline")
    assert piped.figures.token_s < 0.6 * summing.figures.token_s
    layers = [rank.layers for rank in piped.ranks]
    assert layers[0] is not None
    assert layers[1] is not None
    assert (layers[0][0], layers[0][1], layers[1][1]) == (0, layers[1][0], len(model().layers))


def test_experts_are_cut_by_columns_and_whole_where_they_stream() -> None:
    roomy = chosen(mixture(), [machine("a"), machine("b")], all_linked(2, CABLE), ranks=2)
    assert roomy.experts == "columns"
    assert not any(rank.missing_experts for rank in roomy.ranks)
    tight = chosen(
        mixture(), [machine("a", 1.2, disk=1), machine("b", 1.2, disk=1)], all_linked(2, CABLE), ranks=2
    )
    assert tight.experts == "whole"
    assert all(0 < rank.missing_experts < 1 for rank in tight.ranks)
    # Of 8 experts in each of 16 layers, 3.5 MB each, the busier rank reads some more than half.
    assert tight.figures.token_s > 16 * 4 * 3.5e6 * min(rank.missing_experts for rank in tight.ranks) / 1e9


def test_experts_of_few_blocks_are_dealt_out_whole() -> None:
    """768 columns in blocks of 256 are 3 parts at most."""
    moe = MoeSpec(128, 8, 768, True)
    spec = model(moe, layers=(LayerSpec(moe=True),) * 48, hidden=2048, vocab=151936, kv_heads=4)
    four = [machine(str(rank)) for rank in range(4)]
    found = chosen(spec, four, all_linked(4, CABLE), ranks=4, grains=Grains(256, 256, 256, 256))
    assert found.experts == "whole"
    assert [rank.share for rank in found.ranks] == pytest.approx([0.25] * 4, abs=0.02)


def test_whole_experts_crowd_on_some_rank() -> None:
    assert crowding(64, 8, 4) == pytest.approx(1.72, abs=0.01)
    assert crowding(8, 8, 4) == 1
    assert crowding(8, 1, 4) == 4
    assert crowding(128, 8, 1) == 1


def test_the_workload_weighs() -> None:
    """A machine that computes quickly but reads slowly is worth having for long prompts with short answers."""
    machines = [machine("head", pace=20, flops=100), machine("other", pace=20, flops=800)]
    long, short = Workload(4000, 16), Workload(64, 512)
    links = all_linked(2, LinkSpeed(0.2e-3, 1e9))
    prompts, answers = (chosen(model(), machines, links, workload=it) for it in (long, short))
    first = prompts.prompts.index(4000)
    assert prompts.figures.first_token_s[first] <= answers.figures.first_token_s[answers.prompts.index(4000)]
    assert answers.figures.token_s <= prompts.figures.token_s


def test_somebody_insists_on_a_number() -> None:
    links = all_linked(2, WIFI)
    two = [machine("head"), machine("pi3")]
    found = chosen(model(), two, links, ranks=2)
    assert names(found) == ["head", "pi3"]
    assert found.freely
    assert found.freely.token_s < found.figures.token_s
    assert len(chosen(model(), [*two, machine("c")], all_linked(3, CABLE), ranks=1).ranks) == 1
    many = [machine(str(rank)) for rank in range(12)]
    assert len(chosen(model(), many, all_linked(12, CABLE), ranks=5).ranks) == 5


@pytest.mark.parametrize(
    ("machines", "ranks", "why"),
    [
        ([machine("a", 2), machine("b", 2)], None, "it takes about"),
        ([machine("a", 0.2), machine("b", 9)], None, "a has 200 MB of memory"),
        ([machine("a", 9), machine("b", 9)], 3, "`ranks=3` was asked for: must be from 1 to 2"),
        ([machine("a", 9), machine("b", 9)], 0, "`ranks=0`"),
    ],
)
def test_what_is_missing_is_told(machines: list[Machine], ranks: int | None, why: str) -> None:
    found = choose(wanted(model()), SIZES["8b"], machines, all_linked(2, CABLE), ranks=ranks)
    assert isinstance(found, NoGroup)
    assert why in found.describe()
    assert found.needed_bytes > 4.5 * GB


def test_too_many_ranks_to_cut_for() -> None:
    machines = [machine(str(rank)) for rank in range(16)]
    found = choose(wanted(small()), SIZES["small"], machines, all_linked(16, CABLE), ranks=16)
    assert isinstance(found, NoGroup)
    assert "16 ranks are too many: there are 14 heads" in found.why


def test_a_machine_that_the_head_does_not_reach() -> None:
    found = chosen(model(), [machine("head"), machine("b")], {})
    assert names(found) == ["head"]
    assert found.unused[0].why_not == "the head does not reach it"


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes_per_s": float("nan")},
        {"memory_bytes_per_s": 0},
        {"flops": float("inf")},
        {"flops": -1.0},
        {"memory_bytes": -5},
        {"disk_bytes_per_s": -1},
        {"threads": 0},
        {"port_bytes_per_s": 1e30},
    ],
)
def test_a_machine_that_says_what_cannot_be_true_is_left_out(wrong: dict[str, Any]) -> None:
    """Figures come from other machines; a wrong one keeps nobody else from being used."""
    machines = [machine("a"), machine("b")._replace(**wrong), machine("c")]
    found = chosen(model(), machines, all_linked(3, CABLE))
    assert names(found) == ["a", "c"]
    assert [(unused.machine, unused.with_it) for unused in found.unused] == [("b", None)]
    assert next(iter(wrong)) in found.describe()
    with pytest.raises(MachineError, match=next(iter(wrong))):
        chosen(model(), machines[1:], all_linked(2, CABLE))
    refused = choose(wanted(model()), SIZES["8b"], machines, all_linked(3, CABLE), ranks=3)
    assert isinstance(refused, NoGroup)
    assert next(iter(wrong)) in refused.why


@pytest.mark.parametrize("link", [LinkSpeed(float("nan"), 1e6), LinkSpeed(-1, 1e6), LinkSpeed(0, 0)])
def test_a_link_that_cannot_be_true_is_none(link: LinkSpeed) -> None:
    assert names(chosen(model(), [machine("a"), machine("b")], {(0, 1): link})) == ["a"]


def test_there_may_be_too_many() -> None:
    with pytest.raises(MachineError, match="65 machines"):
        chosen(model(), [machine("a")] * 65, {})


def test_sixteen_machines_are_chosen_from_in_a_moment() -> None:
    machines = [machine(str(n), 1 + n % 4, 2 + 7 * n % 23, 20 * (1 + n % 5), n % 3 / 2) for n in range(16)]
    took = []
    for _ in range(3):
        began = time.process_time()
        chosen(model(), machines, all_linked(16, CABLE))
        took.append(time.process_time() - began)
    assert min(took) < 0.15, "usually a third of that"


def test_prompts_are_read_in_halves_where_that_hides_sums() -> None:
    """512 rows of 4096 numbers take 144 ms there and back at 1 Gb/s, so 64 sums take 9.2 s. Computing takes 9 s."""
    two = [machine("head"), machine("other")]
    found = chosen(model(), two, all_linked(2, LinkSpeed(20e-6, 117e6)), ranks=2)
    first_token_s = found.figures.first_token_s[found.prompts.index(512)]
    assert 9.2 < first_token_s < 0.75 * (9.2 + 9)
    assert found.figures.overlap_rows == 32


def test_steps_are_not_halved_where_copying_is_all_that_holds_sums_up() -> None:
    """Two ranks of one machine: in the other half's time nothing else would happen than that copying."""
    two = [machine("head"), machine("other")]
    halved_from = [
        chosen(
            model(), two, all_linked(2, LinkSpeed(60e-6, speed)), ranks=2, topologies=("exchange",)
        ).figures.overlap_rows
        for speed in (1e9, 117e6)
    ]
    assert halved_from[0] > 512
    assert halved_from[1] == 32


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_where_a_delay_is_longer_than_computing_steps_have_one_sum_a_block(spec: ModelSpec) -> None:
    found = chosen(spec, [machine("a"), machine("b")], all_linked(2, LinkSpeed(1.0, 117e6)), ranks=2)
    assert found.figures.overlap_rows > 512


def test_what_was_used_is_taken_again_while_it_costs_little() -> None:
    spec, machines = MODELS["8b"], [machine("a"), machine("b"), machine("c")]
    links = all_linked(3, CABLE)
    best = chosen(spec, machines, links)
    assert len(best.ranks) == 3

    def again(places: tuple[int, ...], shares: tuple[float, ...], last: bool = True) -> Choice:
        kept = KeptCuts({places: KeptCut(shares, "columns")}, places if last else None)
        return chosen(spec, machines, links, kept=kept)

    assert again((0, 1, 2), (30, 31, 32)).shares == (30, 31, 32)
    assert again((0, 1, 2), (30, 31, 32), last=False).shares == (30, 31, 32)
    assert again((0, 1, 2), (20, 20, 60)).shares == best.shares, "too slow"
    assert again((0, 1, 2), (1, 1)).shares == best.shares, "damaged"
    assert again((0, 1), (1, 1)).shares == best.shares, "a third of the speed would be lost"
    machines[2] = machine("c", pace=8, flops=160)
    assert chosen(spec, machines, links).shares != best.shares
    assert again((0, 1), (7, 8)).shares == (7, 8), "the third would help a little"
    assert again((0, 1), (7, 8), last=False).shares != (7, 8), "it has come since"


def test_what_was_used_does_not_stay_if_it_does_not_fit_or_is_slower_than_alone() -> None:
    spec, kept = MODELS["8b"], KeptCuts({(0, 1): KeptCut((1, 1), "columns")}, (0, 1))
    small_one = [machine("a"), machine("b", memory=2)]
    found = chosen(spec, small_one, all_linked(2, CABLE), kept=kept, ranks=2)
    assert found.shares != (1, 1)
    far = {(0, 1): LinkSpeed(0.005, 1e8)}
    whole = chosen(spec, [machine("a"), machine("b")], far, kept=kept, splits=("tensor",))
    assert names(whole) == ["a"]


def test_far_machines_read_prompts_and_the_head_answers() -> None:
    """Two sums a layer wait 5 ms for each token, which takes 0.2 s; 512 tokens take 18 s alone."""
    machines = [machine("head"), machine("b"), machine("c")]
    found = chosen(model(), machines, all_linked(3, FAR), **{**ALL, "splits": ("tensor", "prompts")})
    assert (found.split, names(found)) == ("prompts", ["head", "b", "c"])
    assert found.alone
    assert found.figures.token_s == found.alone.token_s
    first_s, alone_s = (each.first_token_s[0] for each in (found.figures, found.alone))
    # 8 pages of 8.4 MB, of which two others have three heads of eight each, pass one port; then come the sums.
    assert alone_s / 3 + 8 * 8.4e6 * 6 / 8 / 125e6 < first_s < 0.5 * alone_s
    assert found.figures.decode is None
    assert found.figures.prompt is not None
    assert 16 <= found.figures.group_rows < 256
    # A page passes in 0.05 s; the head alone computes a row in 0.035 s, together they do in less than half of that.
    assert found.figures.page_rows in (2, 3)
    assert found.ranks[0].needed_bytes > 4.5 * GB + 1.1 * GB


def test_the_head_needs_room_for_the_model_and_its_part() -> None:
    """5.4 GB with KV, and some of 3.9 GB: a third, or less."""
    machines = [machine("b"), machine("c")]

    def shares(memory: float) -> tuple[float, ...]:
        head = machine("head", memory=memory)
        found = chosen(model(), [head, *machines], all_linked(3, FAR), topologies=("sliced",))
        assert found.split == ("prompts" if found.shares else "tensor")
        return found.shares

    assert shares(8.5) == (85, 85, 85)
    small, *others = shares(5.8)
    assert small < min(others)
    assert shares(5.4) == ()


def test_a_number_of_ranks_computes_all_together() -> None:
    machines, kept = [machine("head"), machine("b")], {(0, 1): KeptCut((1, 1), "columns", "prompts")}
    links = all_linked(2, FAR)
    free = chosen(model(), machines, links, kept=KeptCuts(kept, (0, 1)))
    assert (free.split, free.shares) == ("prompts", (1, 1))
    asked = chosen(model(), machines, links, kept=KeptCuts(kept, (0, 1)), ranks=2)
    assert (asked.split, len(asked.ranks)) == ("tensor", 2)
    without = chosen(model(), machines, links, splits=("tensor",), kept=KeptCuts(kept, (0, 1)))
    assert names(without) == ["head"]


def test_a_group_that_was_slow_at_answers_is_not_trusted_with_prompts() -> None:
    machines, links = [machine("head"), machine("b")], all_linked(2, FAR)
    assert chosen(model(), machines, links).split == "prompts"
    together = chosen(model(), machines, links, ranks=2)
    slow = {(0, 1): 4 * together.figures.token_s}
    assert names(chosen(model(), machines, links, measured=slow)) == ["head"]


def test_a_vocabulary_that_the_head_has_no_room_for_is_cut() -> None:
    """Embedding and head are 0.3 GB each."""
    machines = [machine("head", 1.0), machine("other", 8)]
    found = chosen(model(), machines, all_linked(2, CABLE))
    assert names(found) == ["head", "other"]
    assert [rank.streamed_bytes for rank in found.ranks] == [0, 0]
    assert found.ranks[0].needed_bytes <= 1.0 * GB
    asked, sizes = wanted(model()), block_bytes(model())
    kept_whole = choose(
        asked, sizes, machines, all_linked(2, CABLE), topologies=("star",), may_cut_vocabulary=False
    )
    assert isinstance(kept_whole, NoGroup)
    roomy = chosen(model(), [machine("head", 3), machine("other", 8)], all_linked(2, CABLE))
    whole = chosen(
        model(), [machine("head", 3), machine("other", 8)], all_linked(2, CABLE), may_cut_vocabulary=False
    )
    assert (roomy.shares, roomy.figures) == (whole.shares, whole.figures), "there is room for it"


def test_what_would_stream_with_a_whole_vocabulary_and_not_with_a_cut_one_does_not() -> None:
    """Embedding and head are 0.9 GB each."""
    machines = [machine("head", 1.2, disk=1), machine("other", 4, disk=1), machine("third", 4, disk=1)]
    links = all_linked(3, CABLE)
    found = chosen(model(vocab=400_000), machines, links, ranks=3)
    whole = chosen(model(vocab=400_000), machines, links, ranks=3, may_cut_vocabulary=False)
    assert any(rank.streamed_bytes for rank in whole.ranks)
    assert not any(rank.streamed_bytes for rank in found.ranks)
    assert found.figures.token_s < whole.figures.token_s


def test_a_cut_vocabulary_costs_a_gathering() -> None:
    """Half of 128,256 logits pass at 125 MB/s, and half of the head is read by each of both at once."""
    machines, links = [machine("head", 1.6), machine("other", 8)], all_linked(2, CABLE)
    spec = model()
    slow = [it._replace(memory_bytes_per_s=1e15, flops=1e18) for it in machines]
    cut = chosen(spec, [slow[0]._replace(memory_bytes=10**9), slow[1]], links, ranks=2)
    whole = chosen(spec, [slow[0]._replace(memory_bytes=3 * 10**9), slow[1]], links, ranks=2)
    share = 1 - cut.ranks[0].share
    sum_s = (whole.figures.token_s - 1e-3) / 65
    gathered_s = 4 * spec.vocab * share / 125e6
    assert cut.figures.token_s - whole.figures.token_s == pytest.approx(gathered_s, abs=2 * sum_s)


def test_steps_in_halves_take_what_kernels_take_for_half_of_the_rows() -> None:
    """Twice a half is more than the whole where weights are read twice."""
    two = [machine("head", flops=1e6), machine("other", flops=1e6)]
    found = chosen(model(), two, all_linked(2, LinkSpeed(20e-6, 1e9)), ranks=2)
    assert found.figures.overlap_rows > 32
