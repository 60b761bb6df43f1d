"""What a machine does by itself costs as much beside a device as without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes.throughput.throughput_cases import MB, device, spec, wanted, weighed

from shoal.partition.plan import Plan, plan_in_ram
from shoal.partition.spec import MoeSpec
from shoal.partition.streamed_plan import plan_streamed
from shoal.partition.throughput.cost import step_cost, step_of
from shoal.partition.throughput.laws import Rows, gathered_s
from shoal.partition.throughput.placing.device_ways import ways_from_disk
from shoal.partition.throughput.placing.rooms import room_of
from shoal.partition.throughput.profile import Accelerator, Corrections, Device, Overheads, SweptLaw
from shoal.partition.throughput.step_time import staying_step
from shoal.partition.throughput.weights_of import Weighed

OWN = Overheads(
    4e-4, 8e-5, 2e-4, 4e-10, 4e-6, 3e-5, 6e-6, 8e-10, SweptLaw((2e-4, 2e-3, 2e-2), (5e-5, 4e-4, 9e-4))
)
CARD = Accelerator("gpu", 130e6, 1e12, 5e13, 2e10, step_s=1e-4, scratch_bytes=0)
DENSE, MIXED = weighed(spec(layers=6)), weighed(spec(6, moe=MoeSpec(16, 4, 512, True), ffn=0))
HOST = device(overheads=OWN, measured=True)
# Nothing else takes time.
FAST = device(overheads=OWN, memory_bytes_per_s=1e15, disk_bytes_per_s=1e15, flops=1e18)


def made(model: Weighed, streams: bool, **more: Any) -> Plan:
    asked = wanted(model.spec, sequences=4, **more)
    if streams:
        plan = plan_streamed(asked, model.extents, MB, memory_bytes=int(0.5 * model.weights_bytes) + 40 * MB)
    else:
        plan = plan_in_ram(asked, model.block_bytes, memory_bytes=10**12)
    assert isinstance(plan, Plan)
    return plan


def taken(model: Weighed, plan: Plan, machine: Device, streams: int = 4, rows: int = 1) -> float:
    return step_of(model, plan, machine, [Rows(streams, rows, 30)], streams, 1.0).seconds


def ways(model: Weighed, there: Accelerator = CARD) -> dict[str, Plan]:
    """Blocks in all three places, and passing."""
    if model.spec.moe:
        there = replace(there, memory_bytes=250e6)
    room = room_of(there, ())._replace(gathers=False)
    found = ways_from_disk(model, [wanted(model.spec, sequences=4)], room, 150 * MB)
    return {it.name.partition(" ")[0]: it.made for it in found if isinstance(it.made, Plan)}


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("model", [DENSE, MIXED], ids=["dense", "mixture"])
def test_a_device_without_anything_to_do_changes_nothing(model: Weighed, streams: bool, rows: int) -> None:
    plan = made(model, streams)
    assert plan.streams is streams
    beside = staying_step(model, plan, HOST, CARD, [Rows(4, rows, 30)], 4, 1.0)
    assert beside.seconds == pytest.approx(taken(model, plan, HOST, rows=rows))


@pytest.mark.parametrize("model", [DENSE, MIXED], ids=["dense", "mixture"])
@pytest.mark.parametrize("name", ["on", "through"])
@pytest.mark.parametrize("figure", ["step_s", "stream_s", "logit_s", "stream_layer_s", "swept"])
def test_each_of_a_hosts_own_costs_counts_once(model: Weighed, name: str, figure: str) -> None:
    plan, more = ways(model)[name], 1e-2
    assert plan.device == "gpu"
    assert plan.passes is (name == "through")
    layers = len(model.spec.layers)
    here = {it.block.layer for it in plan.blocks if it.device == "cpu" and it.block.layer >= 0}
    attends = {it.block.layer for it in plan.blocks if it.device == "cpu" and it.block.kind == "attn"}
    streams, groups = 4, 2
    if plan.passes:  # the host attends in all layers, in each for one group after the other
        here, attends, turns = set(range(layers)), set(range(layers)), groups
    else:
        turns = 1
    times = {
        "step_s": 1,
        "stream_s": streams - 1,
        "logit_s": streams * model.spec.vocab,
        "stream_layer_s": (streams - 1) * len(attends),
        "swept": turns * len(here),
    }
    assert here
    nothing = None if figure == "swept" else 0.0
    something = SweptLaw((1e-30, 1.0), (more, more)) if figure == "swept" else more
    laws = (replace(replace(OWN, swept=None), **{figure: it}) for it in (nothing, something))
    both = (replace(FAST, overheads=its, accelerators=(replace(CARD, step_s=0.0),)) for its in laws)
    without, having = (taken(model, plan, it) for it in both)
    # Where weights pass, what goes on beside it hides some.
    assert having - without == pytest.approx(times[figure] * more, rel=0.2 if plan.passes else 0.02)


def test_what_running_taught_of_calls_is_the_processors() -> None:
    """A card's own calls are as they were tried."""
    slow = replace(CARD, memory_bytes=1e9, layer_s=1e-2, step_s=5e-3)
    plan = ways(DENSE, slow)["on"]
    assert all(it.tier == "gpu" for it in plan.blocks if it.block.kind != "embed")
    plain = replace(HOST, accelerators=(slow,))
    learnt = replace(plain, corrections=Corrections(overhead=2.0))
    more_s = taken(DENSE, plan, learnt) - taken(DENSE, plan, plain)
    # Rows of the embedding, not layers and a step that cost 65 ms there.
    assert 0 < more_s < 4e-3


def test_what_a_machine_takes_itself_is_told_from_what_its_device_does() -> None:
    """Another device changes only what it computes; another link what is copied."""
    plan = ways(DENSE)["on"]
    cards = CARD, replace(CARD, memory_bytes_per_s=CARD.memory_bytes_per_s / 10, flops=CARD.flops / 10)
    fast, slow = (step_cost(DENSE, plan, replace(HOST, accelerators=(it,)), 4, 30) for it in cards)
    assert sum(slow.away.values()) > sum(fast.away.values())
    assert slow.own == pytest.approx(fast.own)
    assert fast.own["link"] > 0
    far = replace(CARD, copy_s=CARD.copy_s + 1e-3)
    assert step_cost(DENSE, plan, replace(HOST, accelerators=(far,)), 4, 30).own["link"] > fast.own["link"]
    alone = step_cost(DENSE, made(DENSE, streams=False), HOST, 4, 30)
    assert alone.own == alone.parts
    through = step_cost(DENSE, ways(DENSE)["through"], replace(HOST, accelerators=(CARD,)), 4, 30)
    assert through.own == {**through.parts, "compute": 0.0}


def test_rows_of_an_embedding_on_disk_count() -> None:
    plan = made(DENSE, streams=False)
    blocks = tuple(replace(it, tier="disk") if it.block.kind == "embed" else it for it in plan.blocks)
    here = tuple(replace(it, tier="ram") if it.block.kind == "embed" else it for it in blocks)
    both = (replace(plan, blocks=its) for its in (blocks, here))
    away, stays = (staying_step(DENSE, it, HOST, CARD, [Rows(4, 1, 30)], 4, 1.0).seconds for it in both)
    assert away - stays == pytest.approx(gathered_s(HOST, 4), rel=0.1)


def test_what_running_taught_of_a_link_counts() -> None:
    link = replace(CARD, copy_s=1e-3, host_bytes_per_s=1e9)
    machine = replace(HOST, accelerators=(link,))
    learnt = replace(machine, corrections=Corrections(link=2.0))
    for name in ("on", "through"):
        plan = ways(DENSE, link)[name]
        one, two = (step_of(DENSE, plan, it, [Rows(4, 1, 30)], 4, 1.0) for it in (machine, learnt))
        assert one.parts["link"] > 0
        assert two.parts["link"] == pytest.approx(2 * one.parts["link"])
        assert two.seconds > one.seconds
