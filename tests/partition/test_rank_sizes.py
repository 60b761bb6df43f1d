"""What a rank is estimated to hold is what plans of its shard take: in memory, and streamed."""

from __future__ import annotations

import pytest
from fakes.group.group_cases import GB, block_bytes, machine, mixture, model, small, wanted
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.partition.plan import Plan, least_in_ram
from shoal.partition.rank_sizes import Held, Memory, Portion, Sizes
from shoal.partition.slicing import CutOfExperts, divide
from shoal.partition.spec import ModelSpec
from shoal.partition.streamed_plan import plan_streamed

MODELS = {"8b": model(), "small": small(), "mixture": mixture()}


def portion_of(spec: ModelSpec, rank: int, ranks: int, experts: CutOfExperts = "columns") -> Portion:
    if ranks == 1:
        return Portion.even(spec, 1.0)
    return Portion.of_shard(spec, divide(spec, ranks, experts=experts)[rank])


def test_all_in_memory_is_the_plan_in_memory() -> None:
    for name, spec in MODELS.items():
        sizes = block_bytes(spec)
        memory, here = Memory(wanted(spec), Sizes.of(spec, sizes)), machine("here", 100)
        held = memory.held(Portion.even(spec, 1.0), here)
        plan = least_in_ram(wanted(spec, threads=here.threads), sizes)
        assert isinstance(held, Held), name
        assert held.needed_bytes == pytest.approx(plan.peak_bytes, rel=1e-3)
        assert memory.whole_bytes() == pytest.approx(plan.peak_bytes, rel=1e-2)
        assert not held.streams


def test_of_a_model_that_is_too_large_the_least_is_told() -> None:
    spec = model()
    held = Memory(wanted(spec), Sizes.of(spec, block_bytes(spec))).held(
        Portion.even(spec, 1.0), machine("a", 2)
    )
    assert isinstance(held, int)
    assert held == pytest.approx(5.4 * GB, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (2, 4)])
def test_a_part_in_memory_is_the_plan_of_its_shard(name: str, rank: int, ranks: int) -> None:
    spec = MODELS[name]
    if ranks > spec.kv_heads:
        return
    portion, here = portion_of(spec, rank, ranks), machine("here", 100)
    held = Memory(wanted(spec), Sizes.of(spec, block_bytes(spec))).held(portion, here, exact=True)
    assert isinstance(held, Held)
    plan = least_in_ram(wanted(portion.spec(), threads=here.threads), block_bytes(portion.spec()))
    assert held.needed_bytes == pytest.approx(plan.peak_bytes, rel=0.01)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    part=st.sampled_from([(0, 1), (0, 2), (1, 2), (0, 4), (2, 4)]),
    fit=st.floats(0.2, 1),
    kv_tokens=st.sampled_from([None, 4608]),
)
def test_streaming_is_estimated_as_it_is_planned(
    name: str, part: tuple[int, int], fit: float, kv_tokens: int | None
) -> None:
    """Where a rank is said to stream, there is a plan that does. It reads no more than was said, and not much less."""
    spec = MODELS[name]
    sizes = Sizes.of(spec, block_bytes(spec))
    memory, portion = Memory(wanted(spec, kv_tokens=kv_tokens), sizes), portion_of(spec, *part, "whole")
    whole = memory.held(portion, machine("here", 100), exact=True)
    assert isinstance(whole, Held)
    here = machine("here", fit * whole.needed_bytes / GB, disk=1)
    held = memory.held(portion, here)
    if isinstance(held, int) or not held.streams:
        return
    asked = wanted(portion.spec(), kv_tokens=kv_tokens, threads=here.threads)
    extents = block_bytes(portion.spec())
    plan = plan_streamed(asked, extents, 0, memory_bytes=here.memory_bytes)
    assert isinstance(plan, Plan)
    said = held.streamed_bytes
    if moe := portion.spec().moe:
        active = sizes.experts * portion.experts * moe.active / moe.experts  # of this rank, by its share
        said += int(held.missing_experts * active)
    assert plan.streamed_bytes <= 1.02 * said
    largest = max(nbytes for it, nbytes in extents.items() if it.kind != "embed")
    assert said <= 1.1 * plan.streamed_bytes + 4 * largest


@given(st.sampled_from(sorted(MODELS)), st.floats(0.1, 8), st.floats(1, 2))
def test_more_memory_never_streams_more(name: str, memory_gb: float, more: float) -> None:
    spec = MODELS[name]
    memory = Memory(wanted(spec), Sizes.of(spec, block_bytes(spec)))
    before, after = (
        memory.held(Portion.even(spec, 1.0), machine("a", gb, disk=1)) for gb in (memory_gb, more * memory_gb)
    )
    if isinstance(before, int):
        return
    assert isinstance(after, Held)
    assert after.streamed_bytes <= before.streamed_bytes + 1
    assert after.missing_experts <= before.missing_experts + 1e-9
