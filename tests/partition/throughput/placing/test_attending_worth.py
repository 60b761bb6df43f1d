"""For whose rows a device attends through which weights pass: where it is quicker than the host and what is copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes.throughput.throughput_cases import FREE, device, spec, wanted, weighed
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.plan import Plan
from shoal.partition.spec import MoeSpec
from shoal.partition.throughput.cost import steady_batch
from shoal.partition.throughput.laws import Rows, attention
from shoal.partition.throughput.placing.attending_worth import LEAST_ROWS, attends_from
from shoal.partition.throughput.placing.device_choice import mixed_rate, plan_with_device
from shoal.partition.throughput.placing.device_ways import coming_one, ways_through_device
from shoal.partition.throughput.placing.passing_step import _Passing
from shoal.partition.throughput.placing.rooms import room_of
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import Accelerator
from shoal.partition.throughput.weights_of import Weighed

MODEL = weighed(spec(moe=MoeSpec(64, 4, 1024, True), ffn=0))
MACHINE = replace(device(), overheads=FREE, measured=True)
MEMORY = 1 << 36
MOST = 8192


def card(**more: Any) -> Accelerator:
    figures: dict[str, Any] = {
        "name": "gpu",
        "memory_bytes": 3e9,
        "memory_bytes_per_s": 5e11,
        "flops": 2e13,
        "host_bytes_per_s": 1.2e10,
    }
    return Accelerator(**(figures | more))


def rows_of(there: Accelerator, model: Weighed = MODEL) -> int:
    return attends_from(model, MACHINE, there, "f16", MOST)


def test_prompts_are_for_what_multiplies_quickly() -> None:
    assert rows_of(card()) == LEAST_ROWS
    assert rows_of(card(flops=MACHINE.flops / 10)) == 0
    # Where the link is slow, only many rows are worth K and V of what is before them.
    slow = rows_of(card(host_bytes_per_s=2e8))
    assert LEAST_ROWS < slow <= MOST


speeds = st.floats(1e8, 1e14)


@given(flops=speeds, link=st.floats(1e7, 1e11), more=st.floats(1, 100))
def test_a_quicker_device_attends_for_no_fewer(flops: float, link: float, more: float) -> None:
    rows = rows_of(card(flops=flops, host_bytes_per_s=link))
    assert rows == 0 or (rows >= LEAST_ROWS and rows & (rows - 1) == 0)
    quicker = rows_of(card(flops=more * flops, host_bytes_per_s=link))
    assert not rows or 0 < quicker <= rows


ASKED = wanted(MODEL.spec, context_tokens=4096, sequences=64, chunk_tokens=MOST, kv_tokens=64 * 4096)


def passing(there: Accelerator) -> list[Plan]:
    """Without and with."""
    ways = [*ways_through_device(MODEL, [ASKED], room_of(there, coming_one(MODEL)), MEMORY, MACHINE)]
    assert [way.name for way in ways] == ["through gpu", "through gpu, where prompts attend"][: len(ways)]
    return [way.made for way in ways if isinstance(way.made, Plan)]


def rate(plan: Plan, there: Accelerator, prompt: int) -> float:
    return steady_batch(MODEL, plan, replace(MACHINE, accelerators=(there,)), Job(prompt, 64)).tokens_per_s


def test_long_prompts_are_many_times_as_quick() -> None:
    there = card()
    plain, attending = passing(there)
    assert (plain.attending_rows, attending.attending_rows) == (0, LEAST_ROWS)
    assert rate(attending, there, 4000) > 3 * rate(plain, there, 4000)
    # It has room for fewer experts.
    assert attending.device_experts < plain.device_experts
    assert rate(plain, there, 100) > rate(attending, there, 100) > 0.5 * rate(plain, there, 100)
    # Then a step takes no less than the device for its attention, and no longer than the host before.
    streams = 1 / rate(attending, there, 4000)
    layers, one = len(MODEL.spec.layers), attention(there.computing, MODEL.spec, "f16", 4000, 0, None)
    assert streams > layers * one.seconds / 64


def test_what_comes_and_leaves_by_hand() -> None:
    """A prompt of 128 rows behind 1,000 others, beside 64 answers behind 500: two groups of a layer."""
    there, plan = card(copy_s=0.0), passing(card())[1]
    rows = [Rows(64, 1, 500.0), Rows(2, 128, 1000.0)]
    step = _Passing(MODEL, plan, MACHINE, there, rows, 66, None)
    turn = step._turn(MODEL.kind_of(0), (64 + 256) / 2, 2, fed=False)
    looking, link = turn.looking, there.host_bytes_per_s
    assert looking is not None
    page_bytes = 2 * 4 * 64 * 64 * 2  # K and V of 4 heads of 64 for 64 tokens
    assert looking.comes_s == pytest.approx(16 * page_bytes / link)  # of one of both prompts
    assert looking.leaves_s == pytest.approx(2 * page_bytes / link)
    assert looking.stored_s == pytest.approx(2 * page_bytes / MACHINE.laid_out_bytes_per_s)
    each = attention(there.computing, MODEL.spec, "f16", 128, 1000.0, None).seconds
    assert looking.looks_s == pytest.approx(each)
    assert turn.leaves_s == pytest.approx(4 * 32 * (16 + 2 * 4) * 64 / link)  # of 32 answers
    assert turn.back_s == pytest.approx(4 * 32 * 16 * 64 / link)
    assert turn.attends_s == pytest.approx(32 * attention(MACHINE, MODEL.spec, "f16", 1, 500.0, None).seconds)
    only = _Passing(MODEL, plan, MACHINE, there, rows[1:], 2, None)._turn(MODEL.kind_of(0), 128, 2, fed=False)
    assert only.looking is not None
    assert only.looking.alone


def test_an_answers_row_is_the_hosts() -> None:
    there = card()
    plain, attending = (replace(passing(there)[1], attending_rows=rows) for rows in (0, 64))
    short = Job(63, 64)  # whose prompts have fewer rows than that
    host = replace(MACHINE, accelerators=(there,))
    assert steady_batch(MODEL, attending, host, short).tokens_per_s == pytest.approx(
        steady_batch(MODEL, plain, host, short).tokens_per_s
    )


def test_who_chooses_takes_what_is_predicted_to_be_quicker() -> None:
    """Where a device is as busy as the processor, that attends for prompts, too."""
    chosen = []
    for flops in (2e13, 1e12, 3e11):
        there = card(flops=flops)
        plans, here = passing(there), replace(MACHINE, accelerators=(there,))
        found = plan_with_device(
            MODEL, [ASKED], room_of(there, coming_one(MODEL)), MEMORY, MACHINE, many=True
        )
        assert isinstance(found, Plan)
        rates = [mixed_rate(MODEL, plan, here, 4096) for plan in plans]
        if found.passes:
            assert found == plans[rates.index(max(rates))]
        chosen.append((found.passes, found.attending_rows > 0))
    assert chosen[0] == (True, True), "it is much quicker than the processor"
    assert not chosen[-1][1]


def test_a_device_without_room_for_it_leaves_it_to_the_processor() -> None:
    """Pages of a layer, and what attention takes."""
    sizes = range(100_000_000, 3_000_000_000, 50_000_000)
    found = [passing(card(memory_bytes=its)) for its in sizes]
    assert [len(plans) for plans in found] == sorted(len(plans) for plans in found)
    assert {len(plans) for plans in found} == {0, 1, 2}
    for plans, memory_bytes in zip(found, sizes, strict=True):
        assert all(plan.device_bytes <= memory_bytes for plan in plans)
