"""A disk on a simulated device's virtual clock: blocks come from it through the window that streaming has, one read
after the other, and are copied to the device when they are here. Their bytes are in memory all the time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from fakes.on_device import ROOMY

from shoal.devices import sim_device
from shoal.devices.device import DeviceEvent, StagedPart
from shoal.devices.device_home import DeviceHome
from shoal.devices.sim_device import SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.kernels.compute_home import HERE
from shoal.kernels.homes import cpu
from shoal.offload.block_store import BlockStore, Coming
from shoal.offload.window.window import Extent, Passage, Window
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId


class ClockedDisk:
    """Reads so many bytes a second, in pieces of `piece_bytes`, what a plan has on disk, since it is first asked."""

    def __init__(self, plan: Plan, device: SimDevice, bytes_per_s: float, piece_bytes: int) -> None:
        self._device = device
        cycle = [it for it in plan.blocks if it.tier == "disk" and it.passes]
        self.on_disk = {it.block for it in cycle}
        self._window = Window(plan.window_bytes, [Extent(it.block, 0, it.nbytes) for it in cycle])
        self._bytes_per_s, self._piece_bytes = bytes_per_s, piece_bytes
        self._now_s = -1.0
        self._read: dict[BlockId, Passage] = {}
        self._leaving: deque[tuple[float, Passage]] = deque()

    def arrival(self, block: BlockId) -> float:
        """When all of it is in the window, if reading never waits for anything but its place there."""
        if self._now_s < 0:
            self._now_s = self._device.now_s
        while (passage := self._read.get(block)) is None or not passage.here:
            read = self._window.next_read(self._piece_bytes)
            if read is None:
                left_s, gone = self._leaving.popleft()
                self._now_s = max(self._now_s, left_s)
                self._window.leave(gone)
                del self._read[gone.block]
            else:
                self._now_s += read.nbytes / self._bytes_per_s
                read.passage.landed += read.nbytes
                self._read[read.passage.block] = read.passage
        return self._now_s

    def leave(self, block: BlockId, at_s: float) -> None:
        self._leaving.append((at_s, self._read[block]))


class _Lent:
    """A block for its copy; entering it takes no time here."""

    def __init__(self, disk: ClockedDisk, block: BlockId) -> None:
        self.block, self.disk = block, disk

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class ClockedStore:
    """What passes from disk is lent as it would be from there; all else is the other store's."""

    def __init__(self, store: BlockStore, disk: ClockedDisk) -> None:
        self._store, self._disk = store, disk

    def coming(self, block: BlockId) -> Coming:
        coming = self._store.coming(block)
        if block not in self._disk.on_disk:
            return coming
        return Coming(coming.weights, _Lent(self._disk, block))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class SimBehindDisk(SimDevice):
    """Copies of blocks that a clocked disk lends begin when they have been read."""

    def stage_in(
        self, parts: Sequence[StagedPart], after: Sequence[DeviceEvent] = (), lent: Any = HERE
    ) -> DeviceEvent:
        if not isinstance(lent, _Lent):
            return super().stage_in(parts, after, lent)
        here = sim_device._Begun("stage", lent.disk.arrival(lent.block))
        copied = super().stage_in(parts, (*after, here), lent)
        assert isinstance(copied, sim_device._Begun)
        lent.disk.leave(lent.block, copied.end_s)
        return copied


def sim_behind_disk(link_bytes_per_s: float) -> tuple[SimDevice, DeviceHome]:
    device = SimBehindDisk("sim:test", ROOMY, link_bytes_per_s)
    return device, DeviceHome(device, SimKernels(cpu()))
