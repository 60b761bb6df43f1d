"""Which ways one machine has to run a model, and which of them is taken near full memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from fakes.throughput.throughput_cases import device, spec, wanted, weighed

from shoal.partition.plan import Misfit, Plan
from shoal.partition.spec import BlockId
from shoal.partition.throughput.alone import STREAMINGS, best_plan, usual_job, ways
from shoal.partition.throughput.cost import cost
from shoal.partition.throughput.memory_curve import memory_curve
from shoal.partition.throughput.peak import beside_bytes
from shoal.partition.throughput.profile import Accelerator, Profile
from shoal.partition.throughput.solve import Choices, solve
from shoal.partition.throughput.weights_of import Weighed

SLICES = 16


def in_slices(model: Weighed) -> Weighed:
    """With its head in slices, as a pack of a large vocabulary has it."""
    head, products = BlockId("head", -1, 0), dict(model.products)
    (whole,) = products[head]
    extents = dict(model.extents)
    for place in range(SLICES):
        block = BlockId("head", -1, place)
        products[block] = (whole._replace(rows=whole.rows // SLICES, nbytes=whole.nbytes // SLICES),)
        extents[block] = whole.nbytes // SLICES
    return replace(model, products=products, extents=extents)


# Blocks of attention are larger than slices of the head, which is 7% of all.
WIDE = in_slices(weighed(spec(16, vocab=1 << 15)))
MACHINE = replace(device(disk_bytes_per_s=2e9), measured=True)
ASKED = [wanted(WIDE.spec)]


def whole_bytes() -> int:
    made = next(iter(ways(WIDE, ASKED, 0))).made
    assert isinstance(made, Misfit)
    return made.least_bytes


def head_bytes(plan: Plan) -> int:
    return sum(it.nbytes for it in plan.blocks if it.block.kind == "head" and it.tier == "ram")


@pytest.mark.parametrize("share", [0.4, 0.7, 0.85, 0.9, 0.95, 0.99])
def test_a_head_that_is_kept_stays_whole_within_the_same_memory(share: float) -> None:
    memory = int(share * whole_bytes())
    found = {way.name: way.made for way in ways(WIDE, ASKED, memory)}
    usual, kept = found["stream"], found.get("stream, head kept")
    assert isinstance(usual, Plan)
    whole = sum(nbytes for block, nbytes in WIDE.extents.items() if block.kind == "head")
    if kept is None:  # the usual way keeps it, too
        assert head_bytes(usual) == whole
        return
    assert isinstance(kept, Plan)
    assert head_bytes(kept) == whole > head_bytes(usual)
    assert kept.peak_bytes <= memory
    assert kept.streamed_bytes >= usual.streamed_bytes, "the usual way reads least"
    assert {it.block for it in kept.blocks} == {it.block for it in usual.blocks}


def test_near_full_memory_the_head_is_kept_where_layers_hide_what_is_read() -> None:
    whole, job = whole_bytes(), usual_job(ASKED[0].context_tokens)
    gained = []
    for percent in range(88, 100):
        memory = int(whole * percent / 100)
        named = {way.name: way.made for way in ways(WIDE, ASKED, memory)}
        usual, chosen = named["stream"], best_plan(WIDE, ASKED, memory, MACHINE)
        assert isinstance(usual, Plan)
        assert isinstance(chosen, Plan)
        taken = [cost(WIDE, it, MACHINE, job).total_s(job) for it in (usual, chosen)]
        assert taken[1] <= taken[0]
        if chosen == named.get("stream, head kept"):
            gained.append(taken[0] / taken[1])
    assert max(gained) > 1.1
    unmeasured = best_plan(WIDE, ASKED, int(whole * 0.97), replace(MACHINE, measured=False))
    assert unmeasured == next(way.made for way in ways(WIDE, ASKED, int(whole * 0.97)) if way.order == 1)


def test_more_memory_is_never_slower() -> None:
    """Each point of the curve is the best plan within so much memory."""
    curve = list(memory_curve(WIDE, ASKED, MACHINE, usual_job(ASKED[0].context_tokens)))
    assert curve[0].tokens_per_s < 0.5 * curve[-1].tokens_per_s
    for less, more in pairwise(curve):
        assert more.tokens_per_s >= less.tokens_per_s
    below = [it for it in curve if it.memory_bytes < whole_bytes() + beside_bytes(WIDE, "f16")]
    assert len(below) > 10


def test_the_curve_has_the_plans_with_a_device() -> None:
    there = Accelerator("gpu", whole_bytes() / 2, 400e9, 50e12, 1e10, step_s=0.0, layer_s=0.0)
    machine, job = replace(MACHINE, accelerators=(there,)), usual_job(ASKED[0].context_tokens)
    curve = list(memory_curve(WIDE, ASKED, machine, job))
    alone = list(memory_curve(WIDE, ASKED, MACHINE, job))
    assert curve[-1].tokens_per_s > 1.15 * alone[-1].tokens_per_s  # the usual job gains more, as layers come
    taken = []
    for point in curve:
        here = replace(machine, memory_bytes=point.memory_bytes)
        chosen = solve([WIDE], lambda *_: ASKED, Profile((here,)), job, Choices("f16")).chosen
        assert chosen is not None
        taken.append(chosen.prediction.tokens_per_s)
        assert point.tokens_per_s == max(taken)
    assert taken != sorted(taken), "one that is quicker for the job gives tokens more slowly"


def test_names_say_how_it_streams() -> None:
    names = [way.name for way in ways(WIDE, ASKED, whole_bytes() * 9 // 10)]
    assert names[:2] == ["memory", "stream"]
    assert set(names[2:]) <= {f"stream, {label}" for label in STREAMINGS if label}
