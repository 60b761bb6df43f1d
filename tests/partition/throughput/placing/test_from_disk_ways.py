"""Plans with a device whose other weights come from disk: predicted as can be worked out by hand, and chosen only where
they are predicted to be quicker."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from fakes.throughput.throughput_cases import FREE, MB, MIXED, device, free_card, spec, wanted, weighed
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.plan import Misfit, Plan
from shoal.partition.throughput.alone import AS_QUICK, best_plan, usual_job
from shoal.partition.throughput.cost import cost, round_bytes, step_cost
from shoal.partition.throughput.laws import passing_bytes_per_s
from shoal.partition.throughput.placing.device_choice import (
    mixed_rate,
    plan_with_device,
    with_device_or_alone,
)
from shoal.partition.throughput.placing.device_ways import coming_one, ways_from_disk, ways_through_device
from shoal.partition.throughput.placing.rooms import room_of
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import (
    ANY,
    Accelerator,
    CacheLaw,
    Contention,
    CopyContention,
    Corrections,
    Device,
    Profile,
    RowsLaw,
)
from shoal.partition.throughput.solve import asks, solve
from shoal.partition.throughput.weights_of import Weighed

DENSE = weighed(spec(layers=24))
READ = 1e9
MACHINE = device(overheads=FREE, measured=True, disk_bytes_per_s=READ, contention=Contention(1.0, 1.0))
card = partial(free_card, memory_bytes=300e6, scratch_bytes=0)


def plans(model: Weighed, there: Accelerator, memory: int, **more: Any) -> dict[str, Plan]:
    room = room_of(there, coming_one(model))._replace(gathers=False)
    asked = wanted(model.spec, **more)
    return {
        way.name.partition(":")[0]: way.made
        for way in ways_from_disk(model, [asked], room, memory)
        if isinstance(way.made, Plan)
    }


@pytest.mark.parametrize("rows", [2, 512])
@pytest.mark.parametrize(
    ("longest", "read", "link", "flops"),
    [("disk", 1e9, 20e9, 50e12), ("link", 1e11, 1e9, 50e12), ("compute", 1e11, 1e11, 1e11)],
)
def test_passing_takes_what_takes_longest(
    longest: str, read: float, link: float, flops: float, rows: int
) -> None:
    there = card(host_bytes_per_s=link, flops=flops)
    plan = plans(DENSE, there, 400 * MB)["through gpu from disk"]
    machine = replace(
        MACHINE, memory_bytes_per_s=1e13, flops=1e15, disk_bytes_per_s=read, accelerators=(there,)
    )
    found = cost(DENSE, plan, machine, Job(1, 2, rows))
    passing = sum(it.nbytes for it in plan.blocks if it.passes)
    whole = sum(
        it.rows * it.cols for block, its in DENSE.products.items() if block.kind != "embed" for it in its
    )
    each = {
        "disk": plan.cyclic_bytes / read,
        "link": passing / link,
        "compute": max((DENSE.weights_bytes - 8 * MB) / 1000e9, 2 * rows * whole / flops),
    }
    assert 0 < plan.cyclic_bytes < passing
    if longest != "compute" or rows == 512:
        assert max(each, key=lambda it: each[it]) == longest
        assert 0.95 * each[longest] < found.token_s < 1.2 * each[longest]
    if longest == "disk":
        assert found.binding == "disk"
        assert found.parts["disk"] == pytest.approx(each["disk"])
        assert 0.5 < found.stall_share <= 1


def test_what_running_taught_of_the_disk_counts_beside_a_device() -> None:
    """As it does without one: else the device would be taken for what the disk does."""
    for model, memory in ((DENSE, 400), (MIXED, 160)):
        for name, plan in plans(model, card(), memory * MB).items():
            machine = replace(MACHINE, disk_bytes_per_s=READ / 10, accelerators=(card(),))
            learnt = replace(machine, corrections=Corrections(disk=2.0))
            took, longer = (cost(model, plan, it, Job(1, 2, 2)) for it in (machine, learnt))
            assert took.binding == "disk"
            assert longer.token_s == pytest.approx(2 * took.token_s, rel=0.1), name
            assert longer.parts["disk"] == pytest.approx(2 * took.parts["disk"], rel=0.01), name


def test_what_caches_keep_of_the_processors_part_counts_beside_a_device() -> None:
    """As it does of all of the model without one."""
    far, near = RowsLaw(ANY, 1.0, (1, 256), (5e-11, 1e-9)), RowsLaw(ANY, 1.0, (1, 256), (1e-11, 1e-9))
    plan = plan_with_device(MIXED, [wanted(MIXED.spec)], room_of(card(), coming_one(MIXED)), 1 << 30, MACHINE)
    assert isinstance(plan, Plan)
    here = round_bytes(MIXED, plan, 0)
    assert 0 < here < MIXED.weights_bytes
    took = []
    for kept in (1, here):  # of which more than that comes from memory
        caches = CacheLaw((int(kept), int(2 * kept)), (0.0, 1.0), (near,))
        machine = replace(MACHINE, products=(far,), caches=caches, accelerators=(card(),))
        took.append(cost(MIXED, plan, machine, Job(1, 2, distinct=1.0)).parts["memory"])
    assert took[1] < 0.5 * took[0]


def test_what_stays_there_is_not_read() -> None:
    """Twice the room there, half of the reading for a token of one stream."""
    for model in (DENSE, MIXED):
        took, read = [], []
        for memory in (100e6, 180e6, 260e6):
            there = card(memory_bytes=memory)
            (name,) = [it for it in plans(model, there, 160 * MB) if it.startswith("on gpu")]
            plan = plans(model, there, 160 * MB)[name]
            machine = replace(MACHINE, accelerators=(there,))
            took.append(cost(model, plan, machine, Job(64, 64)).token_s)
            read.append(plan.streamed_bytes)
        assert took == sorted(took, reverse=True)
        if model is DENSE:  # all of it is read for every token
            for seconds, nbytes in zip(took, read, strict=True):
                assert seconds == pytest.approx(nbytes / READ, rel=0.1)


def test_a_device_beside_the_disk_is_taken_where_it_is_quicker() -> None:
    for model, there, memory, many, said in (
        (DENSE, card(host_bytes_per_s=7e8), 160 * MB, False, "on gpu: "),
        (DENSE, card(), 160 * MB, False, "through gpu from disk: "),
        (MIXED, card(), 160 * MB, False, "on gpu: "),
        (DENSE, card(), 400 * MB, True, "through gpu from disk"),
        (DENSE, card(layer_s=0.5), 400 * MB, False, "the processor alone: "),
        (MIXED, card(copy_s=0.5), 160 * MB, False, "the processor alone: "),
        (DENSE, card(layer_s=0.5), 400 * MB, True, "the processor alone: "),
        (DENSE, card(memory_bytes=1e6), 400 * MB, False, "the processor alone: gpu has no room for a layer"),
    ):
        room = room_of(there, coming_one(model))._replace(gathers=False)
        more = {"sequences": 64, "chunk_tokens": 1024, "kv_tokens": None} if many else {}
        machine = replace(MACHINE, flops=1e10)
        found = with_device_or_alone(model, [wanted(model.spec, **more)], room, memory, machine, many=many)
        assert isinstance(found, Plan)
        assert found.why.startswith(said), (said, found.why)
        assert found.streams
        assert bool(found.device) == (not said.startswith("the processor"))
        assert not with_streaming_off(model, room, memory, machine)


def with_streaming_off(model: Weighed, room: Any, memory: int, machine: Device) -> bool:
    """Whether a plan streams though it may not."""
    made = with_device_or_alone(model, [wanted(model.spec)], room, memory, machine, streaming=False)
    return isinstance(made, Plan) and made.streams


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([DENSE, MIXED]),
    st.integers(120 * MB, 420 * MB),
    st.floats(1e7, 4e8),
    st.floats(1e9, 1e13),
    st.floats(1e8, 1e11),
    st.floats(1e8, 1e10),
    st.booleans(),
)
def test_it_is_never_predicted_to_be_slower_than_the_processor_alone(
    model: Weighed, memory: int, there_bytes: float, flops: float, link: float, read: float, many: bool
) -> None:
    there = card(memory_bytes=there_bytes, flops=flops, host_bytes_per_s=link, memory_bytes_per_s=flops / 10)
    machine = replace(MACHINE, disk_bytes_per_s=read)
    room, contexts = room_of(there, coming_one(model))._replace(gathers=False), [wanted(model.spec)]
    chosen = with_device_or_alone(model, contexts, room, memory, machine, many=many)
    alone = best_plan(model, contexts, memory, machine)
    if isinstance(alone, Misfit):
        return
    assert isinstance(chosen, Plan)
    here = replace(machine, accelerators=(there,))
    job = usual_job(chosen.context_tokens)

    def took_s(plan: Plan) -> float:
        if many:
            return 1 / mixed_rate(model, plan, here, chosen.context_tokens)
        return cost(model, plan, here, job).total_s(job)

    assert took_s(chosen) <= took_s(alone) * (1 + 1e-9)
    if not chosen.device:
        for way in ways_from_disk(model, contexts, room, memory):  # nor is one missed that would be worth it
            if isinstance(way.made, Plan):
                assert took_s(chosen) <= AS_QUICK * took_s(way.made) * (1 + 1e-9)


def test_a_device_that_was_named_is_used_beside_the_disk() -> None:
    """Also if nothing is known of it; what is missing is said if nothing fits."""
    for model in (DENSE, MIXED):
        room = room_of(card(), coming_one(model))._replace(gathers=False, expert=None)
        for many in (False, True):
            made = plan_with_device(
                model, [wanted(model.spec)], room, 160 * MB, MACHINE, many=many, streaming=True
            )
            assert isinstance(made, Plan)
            assert (made.device, made.streams) == ("gpu", True)
        too_little = plan_with_device(model, [wanted(model.spec)], room, 10 * MB, MACHINE, streaming=True)
        assert isinstance(too_little, Misfit)
        least = too_little.least_bytes
        assert isinstance(
            plan_with_device(model, [wanted(model.spec)], room, least, MACHINE, streaming=True), Plan
        )


def test_all_of_them_are_shown_side_by_side() -> None:
    """What has room otherwise does not come from disk."""
    for memory, shown in ((300e6, True), (8e9, False)):
        machine = replace(MACHINE, memory_bytes=memory, accelerators=(card(),))
        found = solve([DENSE], asks(Job(64, 16), None, 256, 1, 0), Profile((machine,)), Job(64, 16))
        names = [it.name for it in found.candidates if it.fits and it.asked]
        assert any("others from disk" in name for name in names) == shown, names
        assert any("through gpu from disk" in name for name in names) == shown, names
        if shown:
            assert found.chosen is not None
            assert found.chosen.name.startswith("on gpu: ")


@pytest.mark.parametrize(("longest", "link"), [("link", 1e9), ("device", 2e9)])
def test_what_copies_and_products_leave_of_each_others_speed_counts(longest: str, link: float) -> None:
    """For as long as both go on, of what a step waits for; what is hidden may take longer."""
    rows = 512
    there = card(host_bytes_per_s=link, flops=1e12)
    plan = plans(DENSE, there, 400 * MB)["through gpu from disk"]
    machine = replace(MACHINE, memory_bytes_per_s=1e13, flops=1e15, disk_bytes_per_s=1e11)

    def step_s(**keeps: float) -> float:
        keeping = replace(there, contention=CopyContention(**keeps))
        return cost(DENSE, plan, replace(machine, accelerators=(keeping,)), Job(1, 2, rows)).token_s

    alone = cost(DENSE, plan, replace(machine, accelerators=(there,)), Job(1, 2, rows))
    busy = {"link": alone.parts["link"], "device": alone.parts["compute"]}
    assert max(busy, key=lambda it: busy[it]) == longest
    other = min(busy.values()) / alone.token_s
    assert 0.5 < other < 0.8
    own, hidden = ("link_keeps", "device_keeps") if longest == "link" else ("device_keeps", "link_keeps")
    assert step_s() == alone.token_s
    assert step_s(**{own: 0.7}) / alone.token_s == pytest.approx(1 + 0.3 * other, rel=0.03)
    assert 1 <= step_s(**{hidden: 0.9}) / alone.token_s < 1.03
    assert step_s(host_keeps=0.7) == pytest.approx(alone.token_s, rel=0.01)


@pytest.mark.parametrize("memory", [180, 250, 300, 400])
def test_a_disk_as_quick_as_the_link_keeps_it_busy(memory: int) -> None:
    """Though blocks are of several sizes and each lies in one piece of the window."""
    there = card(host_bytes_per_s=1e9)
    plan = plans(DENSE, there, memory * MB)["through gpu from disk"]
    machine = replace(MACHINE, disk_bytes_per_s=1e9, accelerators=(there,))
    found = cost(DENSE, plan, machine, Job(1, 2, 2))
    assert 0 < found.parts["disk"] < found.parts["link"]
    assert found.token_s < 1.04 * found.parts["link"]


@pytest.mark.parametrize("model", [DENSE, MIXED], ids=["dense", "mixture"])
def test_what_passes_from_memory_has_the_speed_of_locked_pages(model: Weighed) -> None:
    """What comes from disk, hidden states, and experts that come for prompts go in packets."""
    there = card(host_bytes_per_s=1e8, flops=1e15)
    quick = replace(there, locked_bytes_per_s=4e8)
    assert (passing_bytes_per_s(there), passing_bytes_per_s(quick)) == (1e8, 4e8)
    machine = replace(MACHINE, memory_bytes_per_s=1e13, flops=1e15, disk_bytes_per_s=1e11)
    room = room_of(there, coming_one(model))._replace(gathers=False)
    (way,) = ways_through_device(model, [wanted(model.spec)], room, 2000 * MB)
    assert isinstance(way.made, Plan)
    in_memory = way.made
    from_disk = plans(model, there, 400 * MB)["through gpu from disk"]
    staying = plans(model, there, 400 * MB, chunk_tokens=512)["on gpu"]

    def took(plan: Plan, accelerator: Accelerator) -> float:
        return step_cost(model, plan, replace(machine, accelerators=(accelerator,)), 2, 100).seconds

    passing = [it.nbytes for it in in_memory.blocks if it.passes]
    saved_s = took(in_memory, there) - took(in_memory, quick)
    assert saved_s == pytest.approx(sum(passing) * (1 / 1e8 - 1 / 4e8), rel=0.01)
    here = sum(it.nbytes for it in from_disk.blocks if it.passes and it.tier == "ram")
    saved_s = took(from_disk, there) - took(from_disk, quick)
    assert saved_s == pytest.approx(here * (1 / 1e8 - 1 / 4e8), rel=0.02)
    assert 0 < here < sum(passing)
    assert took(staying, there) == took(staying, quick)
