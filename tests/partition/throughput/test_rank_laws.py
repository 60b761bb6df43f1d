"""What a device takes for a rank's part of a model: the same as alone if it is all of it, and never by halves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import DENSE, MB, MIXED, device, spec, wanted, weighed

from shoal.partition.group_choice import Choice
from shoal.partition.machines import BlockTimes, FixedCosts, StepRows
from shoal.partition.plan import Plan, plan_in_ram
from shoal.partition.rank_sizes import Held, Portion
from shoal.partition.spec import MoeSpec
from shoal.partition.streamed_plan import plan_streamed
from shoal.partition.sum_cost import Means, sent_s
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.group_plans import Groups
from shoal.partition.throughput.laws import products
from shoal.partition.throughput.peak import beside_bytes
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import (
    AttentionLaw,
    CacheLaw,
    Contention,
    Device,
    Overheads,
    Profile,
    ProfileLink,
    RowsLaw,
    SweptLaw,
)
from shoal.partition.throughput.rank_laws import RankLaws
from shoal.partition.throughput.weights_of import Weighed

SHARED = weighed(spec(moe=MoeSpec(32, 4, 512, True, shared_ffn=1024), ffn=0))
WINDOWED = weighed(spec(window=128))
# A kernel that computes long before 16 rows, and is slower with small matrices.
TABLES = tuple(
    RowsLaw("BF16", nbytes, (1, 4, 16, 256), tuple(times * 5e-11 * it for it in (1, 2, 5, 60)))
    for nbytes, times in ((1e5, 2.0), (1e6, 1.2), (1e7, 1.0))
)
SEEN = AttentionLaw("f16", (64, 2048), (4e-11, 2e-11), (2e-11, 1e-11))
MEASURED = device(products=TABLES, attention=(SEEN,))
NEAR = tuple(replace(law, byte_s=tuple(it / 2 for it in law.byte_s)) for law in TABLES)
CACHED = replace(MEASURED, caches=CacheLaw((10 * MB, 1000 * MB), (0.0, 1.0), NEAR))

ONE = StepRows(1, 1.0)


@pytest.mark.parametrize(
    "machine", [device(), MEASURED, CACHED], ids=["as written", "tables", "tables and caches"]
)
@pytest.mark.parametrize(
    "model", [DENSE, MIXED, SHARED, WINDOWED], ids=["dense", "mixed", "shared", "windows"]
)
def test_all_of_a_model_takes_what_it_takes_alone(model: Weighed, machine: Device) -> None:
    """Whoever chooses groups and whoever predicts one machine say the same of it."""
    job, asked = Job(512, 64, distinct=1.0), wanted(model.spec, chunk_tokens=512)
    plan = plan_in_ram(asked, model.block_bytes, memory_bytes=10**12)
    assert isinstance(plan, Plan)
    alone = cost(model, plan, machine, job)
    found = Groups(model, asked, Profile((machine,)), job, ("f32",)).of(1)
    assert isinstance(found, Choice)
    assert found.figures.token_s == pytest.approx(alone.token_s, rel=0.02)
    assert found.figures.first_token_s[0] == pytest.approx(alone.ttft_s, rel=0.03)


def test_experts_of_a_group_multiply_the_rows_that_come_to_them() -> None:
    """64 tokens that choose 4 of 32 give each expert 8 rows; in the last layer one token is left."""
    laws = RankLaws(MEASURED, MIXED, "f16", 1.0)
    whole = Portion.even(MIXED.spec, 1.0)
    kind = MIXED.kind_of(0)
    each = products(MEASURED, kind.expert, 8.0).seconds
    router = products(MEASURED, kind.dense, 64).seconds
    one_s = laws.times(whole, ONE, 1.0).ffn_s / 8
    assert laws.times(whole, StepRows(64, 32.5), 1.0).ffn_s == pytest.approx(
        7 * (32 * each + router) + one_s, rel=0.01
    )


def test_matrices_that_are_cut_are_as_slow_as_small_ones() -> None:
    laws = RankLaws(MEASURED, DENSE, "f16")
    whole, half = (laws.times(Portion.even(DENSE.spec, share), ONE, 1.0) for share in (1.0, 0.5))
    assert 0.5 * whole.ffn_s < half.ffn_s < whole.ffn_s
    assert 0.5 * whole.attn_s < half.attn_s < whole.attn_s


def test_whole_experts_are_dealt_out_unevenly_and_columns_are_not() -> None:
    laws = RankLaws(device(), MIXED, "f16")
    columns = Portion.even(MIXED.spec, 0.5)
    one, crowded = (laws.times(it, ONE, 1.5).ffn_s for it in (columns, columns._replace(whole_experts=True)))
    router = 8 * products(device(), MIXED.kind_of(0).dense, 1).seconds
    assert crowded - router == pytest.approx(1.5 * (one - router), rel=0.01)


def test_what_links_cost_is_told_apart_from_the_rest() -> None:
    """The part of the network is all that the same machines would save without links."""
    job, asked = Job(64, 32), wanted(DENSE.spec)
    both = tuple(device(name=name) for name in "ab")

    def token_s(latency_s: float) -> tuple[float, float]:
        link = ProfileLink(("a", "b"), latency_s, 1e9)
        found = Groups(DENSE, asked, Profile(both, (link,)), job, ("f32",)).of(2)
        assert isinstance(found, Choice)
        return found.figures.token_s, found.figures.step.network_s

    near, far = token_s(1e-4), token_s(1e-3)
    assert near[0] - near[1] == pytest.approx(far[0] - far[1])
    assert far[1] > near[1] + 16 * 0.9e-3


def test_fixed_costs_are_the_device_s() -> None:
    own = replace(device().overheads, step_s=1.0, layer_s=2.0, mixture_s=3.0, hidden_s=4.0)
    numbers = DENSE.spec.hidden * len(DENSE.spec.layers)
    assert RankLaws(device(overheads=own), DENSE, "f16").fixed(1.0) == (
        1.0,
        2.0,
        3.0,
        4.0 * numbers,
        0.0,
        0.0,
        0.0,
        own.logit_s * DENSE.spec.vocab,
    )
    mixed = MIXED.spec.hidden * len(MIXED.spec.layers)  # whose sums begin with zeros
    assert RankLaws(device(overheads=own), MIXED, "f16").fixed(1.0).token_s == 4.0 * 2 * mixed
    layer = sum(it.nbytes for it in (*DENSE.kind_of(0).attention, *DENSE.kind_of(0).dense))
    passing_s = layer / device().memory_bytes_per_s
    law = SweptLaw((passing_s / 4, passing_s), (0.5, 1.0))
    swept = RankLaws(device(overheads=replace(own, swept=law)), DENSE, "f16")
    assert swept.fixed(0.625).layer_s == pytest.approx(2.75)
    assert swept.fixed(0.0).layer_s == 2.0
    assert swept.fixed(0.625).way_s == pytest.approx((0.5 + 0.5 / 12) / 2)  # after half of that
    assert swept.fixed(0.0).way_s == 0.0


def test_sums_cost_more_the_longer_ranks_compute_between_them() -> None:
    """By as much as a layer's calls do; where a prompt is read in halves, the sums of both."""
    one_s, more_s = 1e-4, 2e-3
    link = ProfileLink(("a", "b"), 1e-5, 1e10)
    took = []
    for law in (SweptLaw((1e-9, 1.0), (0.0, 0.0)), SweptLaw((1e-3, 1e-1), (one_s, more_s))):
        own = Overheads(0.0, 0.0, 0.0, 0.0, swept=law)
        both = tuple(device(name=name, overheads=own) for name in "ab")
        found = Groups(DENSE, wanted(DENSE.spec), Profile(both, (link,)), Job(128, 8), ("f32",)).of(2)
        assert isinstance(found, Choice)
        took.append(found)
    plain, swept = (it.figures for it in took)
    ways = {"star": 2, "exchange": 1, "sliced": 2}
    layers, fixed = len(DENSE.spec.layers), RankLaws(both[0], DENSE, "f16").fixed(0.5)
    assert fixed.way_s > 0
    assert swept.step.network_s == plain.step.network_s  # which goes with the link
    assert swept.decode is not None
    token_s = 2 * layers * ways[swept.decode.topology] * fixed.way_s + layers * fixed.layer_s
    assert swept.token_s - plain.token_s == pytest.approx(token_s, rel=0.1)
    assert swept.prompt is not None
    halves, rows = (2, 64) if swept.overlap_rows <= 128 else (1, 128)
    way_s, layer_s = fixed.way_s + rows * fixed.way_token_s, fixed.layer_s + rows * fixed.token_s / layers
    first_s = halves * layers * (2 * ways[swept.prompt.topology] * way_s + layer_s)
    assert swept.overlap_rows == plain.overlap_rows
    assert swept.first_token_s[0] - plain.first_token_s[0] == pytest.approx(first_s, rel=0.1)


def test_squares_of_queries_and_keys_are_sums_as_well() -> None:
    """And what sums cost behind kernels is the processors', whatever the link does."""
    full = weighed(spec(qk_norm="full"))
    fixed = FixedCosts(way_s=1e-3)
    means = Means("star", "f32")
    layers = len(full.spec.layers)
    assert sent_s(full.spec, fixed, means, 1) == pytest.approx(3 * 2 * layers * 1e-3)
    assert sent_s(DENSE.spec, fixed, means, 1) == pytest.approx(2 * 2 * layers * 1e-3)
    assert sent_s(DENSE.spec, fixed, means._replace(topology="exchange"), 1) == pytest.approx(
        2 * layers * 1e-3
    )
    assert sent_s(DENSE.spec, fixed, None, 1) == 0
    parts = []
    for law in (None, SweptLaw((1e-3, 1e-1), (1e-4, 2e-3))):
        both = tuple(device(name=it, overheads=Overheads(0.0, 0.0, 0.0, 0.0, swept=law)) for it in "ab")
        groups = Groups(
            full,
            wanted(full.spec),
            Profile(both, (ProfileLink(("a", "b"), 1e-5, 1e10),)),
            Job(64, 8),
            ("f32",),
        )
        found = groups.of(2)
        assert isinstance(found, Choice)
        parts.append(groups.cost(found).parts)
    assert parts[1]["overhead"] > parts[0]["overhead"]
    assert parts[1]["network"] == parts[0]["network"]
    assert parts[1]["memory"] == pytest.approx(parts[0]["memory"], rel=0.01)


@pytest.mark.parametrize("machine", [device(), MEASURED], ids=["as written", "tables"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("model", [DENSE, MIXED], ids=["dense", "mixed"])
def test_what_streams_on_one_rank_takes_what_it_takes_alone(
    model: Weighed, machine: Device, share: float
) -> None:
    job = Job(64, 64, distinct=1.0)
    memory = int(share * model.weights_bytes) + 60 * MB
    asked = wanted(model.spec, chunk_tokens=64)
    plan = plan_streamed(asked, model.extents, model.vectors_bytes, memory_bytes=memory)
    assert isinstance(plan, Plan)
    alone = cost(model, plan, machine, job)
    here = replace(machine, memory_bytes=memory + beside_bytes(model, "f16"))
    found = Groups(model, asked, Profile((here,)), job, ("f32",)).of(1)
    assert isinstance(found, Choice)
    # How much streams is estimated, and never to its favour.
    reads = found.ranks[0].streamed_bytes / plan.streamed_bytes if model is DENSE else 1.0
    assert found.figures.token_s == pytest.approx(reads * alone.token_s, rel=0.15)


def test_a_disk_takes_what_it_takes_through_a_window_while_others_compute() -> None:
    half = Portion.even(DENSE.spec, 0.5)
    held = Held(0, 100 * MB, 0.0, 64, window_bytes=40 * MB, block_bytes=20 * MB)
    own = BlockTimes(0.01, 0.01)
    calm = device(contention=Contention(1.0, 1.0))
    least = RankLaws(calm, DENSE, "f16").disk(half, held, 1, 1.0, own)
    assert least == pytest.approx((0.1, 1.0, 0.0))
    tight = RankLaws(calm, DENSE, "f16").disk(half, held._replace(window_bytes=20 * MB), 1, 1.0, own)
    assert tight.least_s == pytest.approx(0.1 + 5 * 0.01 / 8), "each waits until the one before has left"
    busy = RankLaws(device(contention=Contention(0.8, 0.5)), DENSE, "f16").disk(half, held, 1, 1.0, own)
    assert busy.least_s > least.least_s
    assert 1.0 < busy.slower <= 1 / 0.8


def test_caches_keep_more_of_a_part_than_of_the_whole() -> None:
    """Of half of the model they keep more, so half of it takes less than half as long."""
    laws = RankLaws(CACHED, DENSE, "f16")
    whole, half = (laws.times(Portion.even(DENSE.spec, share), ONE, 1.0) for share in (1.0, 0.5))
    bare = RankLaws(MEASURED, DENSE, "f16")
    far, near = (bare.times(Portion.even(DENSE.spec, share), ONE, 1.0) for share in (1.0, 0.5))
    assert whole.ffn_s < far.ffn_s
    assert half.ffn_s / whole.ffn_s < near.ffn_s / far.ffn_s
