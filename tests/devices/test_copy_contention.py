"""What copies and computing keep of their speed beside each other is found by trying, on a clock of the test's own, and
counts in what steps are predicted to take."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.on_device import sim

from shoal.devices.device_timing import HOST_TRIED_BYTES, _beside, copy_contention
from shoal.devices.expert_timing import Shape
from shoal.kernels.types import Q4_K
from shoal.partition.throughput.profile import CopyContention


class Sharing:
    """A device whose copies and whose host slow each other while both are at work, each to a share of its speed."""

    def __init__(self, copies_s: float, work_s: float, copies_keep: float, work_keeps: float) -> None:
        self.now_s = 0.0
        self._copies_s, self._work_s = copies_s, work_s
        self._copies_keep, self._work_keeps = copies_keep, work_keeps
        self._left_s = 0.0  # of the copies, if they go on alone

    def come(self) -> Any:
        self._left_s += self._copies_s
        return SimpleNamespace()

    def work(self) -> None:
        both_s = min(self._work_s / self._work_keeps, self._left_s / self._copies_keep)
        self._left_s -= both_s * self._copies_keep
        self.now_s += both_s + self._work_s - both_s * self._work_keeps

    def wait(self, event: object) -> None:
        self.now_s += self._left_s
        self._left_s = 0.0


@pytest.mark.parametrize("work_s", [0.004, 0.07])
@pytest.mark.parametrize(("copies_keep", "work_keeps"), [(1.0, 1.0), (0.9, 0.6), (0.5, 0.95), (0.7, 0.7)])
def test_what_each_keeps_beside_the_other(work_s: float, copies_keep: float, work_keeps: float) -> None:
    device: Any = Sharing(0.2, work_s, copies_keep, work_keeps)
    found = _beside(device, device.come, device.work)
    assert found.work == pytest.approx(work_keeps, rel=0.03)
    assert found.copies == pytest.approx(copies_keep, rel=0.03)


def test_a_clock_of_its_own_shares_nothing() -> None:
    _, home = sim(link_bytes_per_s=1e9)
    assert copy_contention(home, Shape(Q4_K, 64, 256), 1e9) == CopyContention()


def test_on_this_machines_clock_something_is_found() -> None:
    """The device is played by the processor, so it keeps no more than all of its speed, and something."""
    device, home = sim()
    clock: Any = type(
        "OnTheClock", (type(device),), {"now_s": property(lambda it: _now_s(), lambda it, value: None)}
    )
    device.__class__ = clock
    tracemalloc.start()
    try:
        found = copy_contention(home, Shape(Q4_K, 64, 256), 1e8)
        assert tracemalloc.get_traced_memory()[1] < 1.1 * HOST_TRIED_BYTES
    finally:
        tracemalloc.stop()
    assert all(0.05 <= it <= 1 for it in (found.host_keeps, found.device_keeps, found.link_keeps))
    assert device.budget.held_bytes == 0


def _now_s() -> float:
    import time

    return time.perf_counter()
