"""A device whose kernels are those of torch, in the CPU's memory: what a graphics card computes, without one. Where
there is one, the same tests run on it (`bench/gpu.sh`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from shoal.devices.device import DeviceArray, DeviceEvent, DeviceMemory, StagedPart
from shoal.devices.device_home import DeviceHome
from shoal.devices.on_device import OnDevice
from shoal.devices.opening import device_home
from shoal.devices.sim_device import SimDevice
from shoal.devices.torch_kernels import TorchKernels
from shoal.kernels.arrays import Array
from shoal.kernels.compute_home import HERE


class TorchOnHost(SimDevice):
    """As the simulated device; what is inside of its handles are tensors."""

    def within(self, memory: DeviceMemory, inside: Any) -> DeviceArray:
        tensor = inside if isinstance(inside, torch.Tensor) else torch.from_numpy(inside)
        array = tensor.numpy()
        return DeviceArray(memory, tensor, array.dtype, array.shape, array.strides)

    def copy_in(self, source: Array, target: DeviceArray, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy("in", [(source, target.inside.numpy())], after)

    def bring_in(self, parts: Sequence[StagedPart], after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy("in", [(it.source, it.target.inside.numpy()) for it in parts], after)

    def stage_in(
        self,
        parts: Sequence[StagedPart],
        after: Sequence[DeviceEvent] = (),
        lent: AbstractContextManager[object] = HERE,
    ) -> DeviceEvent:
        return self._copy("stage", [(it.source, it.target.inside.numpy()) for it in parts], after, lent)

    def copy_out(self, source: DeviceArray, target: Array, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy("out", [(source.inside.numpy(), target)], after)


def torch_home() -> DeviceHome:
    """On the CPU; or on the card that SHOAL_TEST_DEVICE names."""
    if name := os.environ.get("SHOAL_TEST_DEVICE"):
        home = device_home(name)
        home.device.pin()
        return home
    return home_with(TorchKernels())


def home_with(kernels: OnDevice) -> DeviceHome:
    """On the CPU, computed by these; or by them on the card that SHOAL_TEST_DEVICE names."""
    if name := os.environ.get("SHOAL_TEST_DEVICE"):
        return DeviceHome(device_home(name).device, kernels)
    return DeviceHome(TorchOnHost("sim:test", 1 << 30), kernels)
