"""Plans with a device for what memory has no room for: within both memories, whatever their sizes; and what is missing
is said so that it would do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from fakes.throughput.throughput_cases import DENSE, MB, MIXED, spec, wanted, weighed
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.placement import DeviceRoom, ModelBytes, NoRoomThere, plan_beside_disk
from shoal.partition.plan import Misfit, Plan
from shoal.partition.spec import MoeSpec
from shoal.partition.throughput.placing.passing_plans import plan_passing_from_disk, spread
from shoal.partition.throughput.weights_of import Weighed

SOME = weighed(spec(moe=MoeSpec(16, 2, 512, True, shared_ffn=256), ffn=2048))
models = st.sampled_from([DENSE, MIXED, SOME])
bytes_here = st.integers(1, 700 * MB)
bytes_there = st.integers(1, 700 * MB)


def made(
    model: Weighed, memory: int, there: int, passing: bool, tokens: int | None, share: int = 2
) -> Plan | Misfit | NoRoomThere:
    room = DeviceRoom("gpu", there, 0, False, there)
    sizes = ModelBytes(model.extents, 0, model.vectors_bytes)
    asked = wanted(model.spec, kv_tokens=tokens, sequences=8)
    contexts = [asked, asked._replace(context_tokens=512)]
    if passing:
        return plan_passing_from_disk(contexts, sizes, room, memory_bytes=memory, kv_share=share)
    return plan_beside_disk(contexts, sizes, room, memory_bytes=memory)


@settings(deadline=None, max_examples=200)
@given(
    models,
    bytes_here,
    bytes_there,
    st.booleans(),
    st.sampled_from([None, 1024, 8192]),
    st.sampled_from([2, 8]),
)
def test_nothing_exceeds_either_memory(
    model: Weighed, memory: int, there: int, passing: bool, tokens: int | None, share: int
) -> None:
    plan = made(model, memory, there, passing, tokens, share)
    if isinstance(plan, NoRoomThere):
        assert plan.least_bytes > there
        assert not isinstance(made(model, memory, plan.least_bytes, passing, tokens, share), NoRoomThere)
        return
    if isinstance(plan, Misfit):
        assert memory < plan.least_bytes
        assert isinstance(made(model, plan.least_bytes, there, passing, tokens, share), Plan)
        plan, memory = plan.plan, plan.least_bytes
    assert plan.peak_bytes <= memory
    assert plan.device_bytes <= there
    assert [it.block for it in plan.blocks] == list(model.extents)
    assert {it.block: it.nbytes for it in plan.blocks} == model.extents
    streamed = [it for it in plan.blocks if it.tier == "disk" and it.block.kind != "embed" and not it.slotted]
    assert max((it.nbytes for it in streamed), default=0) <= plan.window_bytes
    assert plan.passes == passing
    assert (plan.expert_slots > 0) == any(it.slotted for it in plan.blocks)
    assert plan.device_weights_bytes > 0


@given(models, st.integers(0, 700 * MB))
def test_what_stays_lies_far_apart(model: Weighed, room: int) -> None:
    plan = made(model, 300 * MB, 300 * MB, True, 1024)
    assert isinstance(plan, Plan)
    blocks = [replace(it, tier="disk") for it in plan.blocks if it.passes]
    kept = spread(blocks, room)
    sizes = {it.block: it.nbytes for it in blocks}
    whole, held = sum(sizes.values()), sum(sizes[block] for block in kept)
    largest = max(sizes.values())
    assert held <= room
    assert held >= min(room, whole) - largest
    if len(kept) < len(blocks):
        seen = so_far = 0
        for it in blocks:
            seen += it.nbytes
            so_far += it.nbytes if it.block in kept else 0
            assert abs(so_far - held * seen / whole) <= 2 * largest


def test_more_memory_never_means_more_reading() -> None:
    for model in (DENSE, MIXED, SOME):
        for passing in (False, True):
            read = []
            for memory in range(120 * MB, 400 * MB, 20 * MB):
                plan = made(model, memory, 300 * MB if passing else 140 * MB, passing, 1024)
                if isinstance(plan, Plan):
                    read.append(plan.streamed_bytes)
            assert len(read) > 3
            assert all(later <= before + 9 * MB for before, later in pairwise(read)), read
