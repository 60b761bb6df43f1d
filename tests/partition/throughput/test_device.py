"""A device with other threads than it was measured with, and what steps teach of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.throughput.throughput_cases import DENSE, device, wanted
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.plan import Plan, plan_in_ram
from shoal.partition.throughput.alone import rival_threads
from shoal.partition.throughput.profile import Corrections, Device, RowsLaw

EIGHT = replace(device(threads=8, measured=True), products=(RowsLaw("BF16", 1e6, (1, 256), (5e-11, 5e-9)),))


def plan_on(threads: int) -> Plan:
    made = plan_in_ram(wanted(DENSE.spec, threads=threads), DENSE.block_bytes, memory_bytes=10**12)
    assert isinstance(made, Plan)
    return made


def test_half_of_the_threads_read_memory_as_fast_and_compute_half_as_fast() -> None:
    (half,), (quarter,) = EIGHT.on(4).products, EIGHT.on(2).products
    assert half.byte_s == pytest.approx((5e-11, 5e-11 + 2 * (5e-9 - 5e-11)))
    assert quarter.byte_s[0] == pytest.approx(1e-10)
    assert EIGHT.on(16) is EIGHT


@pytest.mark.parametrize(
    ("machine", "threads", "rival"),
    [
        (EIGHT, 8, 4),
        (EIGHT, 1, 0),
        (replace(EIGHT, measured=False), 8, 0),
        (replace(EIGHT, products=(RowsLaw("BF16", 1e6, (1,), (5e-10,)),)), 8, 0),  # it computes, rather
    ],
)
def test_fewer_threads_are_worth_a_trial_where_bands_overlap(
    machine: Device, threads: int, rival: int
) -> None:
    assert rival_threads(DENSE, plan_on(threads), machine) == rival


def test_what_steps_teach_changes_only_what_they_were_made_of() -> None:
    before = Corrections(link=1.5)
    after = before.moved({"memory": 0.9, "compute": 0.1}, 2.0)
    assert after.link == 1.5
    assert 1 < after.compute < after.memory < 2
    assert after.disk == 1
    assert set(after.learnt) == {"memory", "compute", "link"}
    assert before.moved({"memory": 0.0}, 2.0) == before
    assert before.moved({"link": 0.1}, 2.0, 0.9).link == pytest.approx(1.5 * 2 ** (0.2 * 0.1))


@given(st.floats(1e-12, 1e-6), st.floats(1e8, 1e12))
def test_what_has_not_changed_is_the_same_to_the_bit(byte_s: float, memory: float) -> None:
    """Or whoever looks each day and finds nothing would write another profile each day."""
    law = RowsLaw("Q8_0", 1e6, (1, 8), (byte_s, 3 * byte_s))
    before = replace(device(), memory_bytes_per_s=memory, products=(law,))
    assert before.slowed(1.0, 1.0) == before
    halved, law = before.slowed(2.0, 2.0), replace(law, byte_s=(2 * byte_s, 2 * 3 * byte_s))
    assert halved.products == (law,)


@pytest.mark.parametrize("changed", [(2.0, 1.0), (1.0, 3.0), (0.01, 100.0), (100.0, 0.01)])
def test_reading_and_computing_change_each_its_part(changed: tuple[float, float]) -> None:
    memory, compute = changed
    law = RowsLaw("Q8_0", 1e6, (1, 8, 64), (0.5e-10, 1e-10, 5e-10))
    before = replace(device(), memory_bytes_per_s=1e10, products=(law,))
    found = before.slowed(memory, compute).products[0].byte_s
    assert found == pytest.approx((0.5e-10 * memory, 1e-10 * memory, 1e-10 * memory + 4e-10 * compute))
