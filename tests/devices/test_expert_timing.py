"""What an expert takes a device, found by trying: of the simulated one the figures are known."""

from __future__ import annotations

import pytest
from fakes.on_device import sim
from fakes.torch_on_host import torch_home

from shoal.devices.device_home import DeviceHome
from shoal.devices.device_timing import device_speed
from shoal.devices.errors import DeviceFull, DeviceLost
from shoal.devices.expert_timing import TRIED_BYTES, Shape, expert_times, tried_bytes
from shoal.devices.sim_device import LAUNCH_S, SIM_MEMORY_BYTES_PER_S, SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.kernels.homes import cpu
from shoal.kernels.types import BF16, Q4_K, Q8_0, WeightType
from shoal.partition.placement import PINNED_BYTES


def expert(kind: WeightType, ffn: int, hidden: int) -> list[Shape]:
    return [Shape(kind, ffn, hidden), Shape(kind, ffn, hidden), Shape(kind, hidden, ffn)]


@pytest.mark.parametrize("kind", [BF16, Q8_0, Q4_K], ids=lambda kind: kind.name)
def test_it_finds_what_is_so(kind: WeightType) -> None:
    shapes = expert(kind, 256, 512)
    device, home = sim(link_bytes_per_s=2e9)
    found = expert_times(home, shapes)
    nbytes = 3 * kind.matrix_bytes(256, 512)
    assert found.nbytes == nbytes
    assert found.come_s == pytest.approx(nbytes / 2e9 + LAUNCH_S, rel=1e-9)
    assert nbytes / SIM_MEMORY_BYTES_PER_S < found.computed_s < 1e-4
    assert device.budget.held_bytes == 0
    assert device.budget.peak_bytes <= tried_bytes(shapes)
    assert expert_times(torch_home(), shapes).nbytes == nbytes


def test_large_ones_are_tried_in_part() -> None:
    shapes = expert(BF16, 4096, 4096)
    device, home = sim()
    found = expert_times(home, shapes)
    assert device.budget.peak_bytes <= tried_bytes(shapes) < 2 * TRIED_BYTES
    assert found.nbytes == 3 * 2 * 4096 * 4096
    assert found.come_s == pytest.approx(found.nbytes / device.link_bytes_per_s, rel=0.05)


def test_a_device_that_is_full_or_lost() -> None:
    device, home = sim(limit_bytes=1000)
    with pytest.raises(DeviceFull):
        expert_times(home, expert(BF16, 32, 64))
    assert device.budget.held_bytes == 0
    device.lose("somebody pulled it out")
    with pytest.raises(DeviceLost):
        expert_times(home, expert(BF16, 32, 64))


class SlowPackets(SimDevice):
    """What passes through other memory packet by packet does so at half of the link's speed, as a processor copies."""

    @property
    def link_bytes_per_s(self) -> float:
        return 1e9


@pytest.mark.parametrize("pinnable", [None, PINNED_BYTES, 0])
def test_both_ways_over_the_link_are_tried(pinnable: int | None) -> None:
    """By packets, and from where weights are page-locked; where the system gives no memory for that, or none at all,
    nothing passes in the second way. What was locked for it is given back."""
    device = SlowPackets("sim:test", 1 << 30, 2e9, pinnable_bytes=pinnable)
    device.pin()
    home, shapes = DeviceHome(device, SimKernels(cpu())), expert(Q8_0, 512, 1024)
    speed, times = device_speed(home, shapes), expert_times(home, shapes)
    assert speed.link_bytes_per_s == pytest.approx(1e9, rel=0.02)
    assert times.come_s == pytest.approx(times.nbytes / 1e9, rel=0.02)
    assert speed.locked_bytes_per_s == pytest.approx(0.0 if pinnable is not None else 2e9, rel=0.02)
    assert times.locked_s == pytest.approx(0.0 if pinnable is not None else times.nbytes / 2e9, rel=0.02)
    assert device.locked_bytes == 0
