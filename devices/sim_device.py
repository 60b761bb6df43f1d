"""A device that the CPU plays, stricter than any real one, so that what is wrong on a device is wrong in every test.

- What is copied is not there until somebody has waited for the copy's event. Until then, and before anything is written
  at all, memory has NaN in it, whatever type of number is looked for.
- A copy takes what is in its source when somebody waits for it: if that was changed meanwhile, the copy is wrong.
- It has a budget of its own.
- Copies have the link's speed if they go through page-locked memory or come from such, else another one; and it may
  have little of that, or none.
- A virtual clock says when everything would begin and end, by the device's link, memory and arithmetic. `schedule` has
  it all, in the order in which it was begun. The host's own work takes no time there. A copy in waits for the packet of
  staged weights that is on the link; what it takes from those behind is so little that it is not counted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np

from shoal.kernels.arrays import Array, Bytes
from shoal.kernels.compute_home import HERE
from shoal.partition.amounts import format_bytes
from shoal.partition.placement import PINNED_BYTES

from .device import (
    PACKET_BYTES,
    DeviceArray,
    DeviceBudget,
    DeviceEvent,
    DeviceMemory,
    DeviceWork,
    StagedPart,
)
from .device_names import SIM_LINK_BYTES_PER_S
from .errors import DeviceLost, NotPageLocked
from .page_locked import LockedRanges

Queue = Literal["in", "stage", "compute", "out"]

POISON = 0xFF  # bytes of which any float is NaN, and any scale
LAUNCH_S = 5e-6  # from the end of one thing in a queue to the begin of the next
SIM_MEMORY_BYTES_PER_S = 500e9
SIM_FLOPS = 20e12
SCHEDULE_ENTRIES = 1 << 16  # entries of the schedule


class Scheduled(NamedTuple):
    """One entry of a schedule, in virtual seconds."""

    queue: Queue
    what: str
    nbytes: int
    begin_s: float
    end_s: float


@dataclass(eq=False)
class _Begun(DeviceEvent):
    """Something in a queue. `land` carries a copy out, and is None when that has been done; `failed`: in vain."""

    queue: Queue
    end_s: float
    after: Sequence[DeviceEvent] = ()  # of a copy that has not landed
    land: Callable[[], None] | None = None
    failed: Exception | None = None


@dataclass(eq=False)
class _QueueState:
    free_s: float = 0.0  # when the next thing may begin
    flying: deque[_Begun] = field(default_factory=deque)  # copies that nobody has waited for, in their order


class SimDevice:
    """`limit_bytes` of memory behind a link of so many bytes per second each way; `unpinned_bytes_per_s` without
    page-locked memory (None: as many), of which there are `pinnable_bytes` in all (None: any). It is an OpenDevice."""

    def __init__(
        self,
        name: str,
        limit_bytes: int,
        link_bytes_per_s: float = SIM_LINK_BYTES_PER_S,
        unpinned_bytes_per_s: float | None = None,
        pinnable_bytes: int | None = None,
    ) -> None:
        self.name = self.facts = name
        self.budget = DeviceBudget(name, limit_bytes)
        self.pinned_bytes, self.unpinned = 0, ""
        self._pinned_bytes_per_s, self._pinnable_bytes = link_bytes_per_s, pinnable_bytes
        self._unpinned_bytes_per_s = unpinned_bytes_per_s or link_bytes_per_s
        self._ranges = LockedRanges()
        self.now_s = 0.0  # on the virtual clock
        self.schedule: deque[Scheduled] = deque(maxlen=SCHEDULE_ENTRIES)
        self.lost = ""
        self._queues: dict[Queue, _QueueState] = {
            "in": _QueueState(),
            "stage": _QueueState(),
            "compute": _QueueState(),
            "out": _QueueState(),
        }
        # Copies that have not passed whole, and the bytes of a packet of each.
        self._staged: deque[tuple[Scheduled, int]] = deque()
        self._lock = threading.RLock()  # a computation may reserve memory

    def lose(self, why: str) -> None:
        """From now on it is lost."""
        self.lost = why

    def reserve(self, nbytes: int) -> DeviceMemory:
        with self._lock:
            self._look()
            return self.budget.reserve(nbytes)

    def within(self, memory: DeviceMemory, inside: Array) -> DeviceArray:
        return DeviceArray(memory, inside, inside.dtype, inside.shape, inside.strides)

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        memory = self.reserve(prod(shape) * dtype.itemsize)
        poisoned = np.full(memory.nbytes, POISON, np.uint8)
        return self.within(memory, poisoned.view(dtype).reshape(shape))

    @property
    def link_bytes_per_s(self) -> float:
        """As it is now, from memory that is not locked."""
        return self._pinned_bytes_per_s if self.pinned_bytes else self._unpinned_bytes_per_s

    @property
    def locked_bytes(self) -> int:
        return self._ranges.nbytes

    def pin(self) -> None:
        if self.pinned_bytes:
            return
        self._look()
        self.unpinned = self._not_lockable(PINNED_BYTES)
        self.pinned_bytes = 0 if self.unpinned else PINNED_BYTES

    def unpin(self) -> None:
        self.pinned_bytes = 0

    def lock(self, start: int, nbytes: int, owner: object) -> None:
        with self._lock:
            self._look()
            twice = "some of these pages are locked already" if self._ranges.some(start, nbytes) else ""
            if why := twice or self._not_lockable(nbytes):
                raise NotPageLocked(why)
            self._ranges.add(start, nbytes)

    def unlock(self, start: int) -> None:
        with self._lock:
            self._ranges.remove(start)

    def _not_lockable(self, nbytes: int) -> str:
        """Why so much more may not be page-locked; "" if it may."""
        most, held = self._pinnable_bytes, self.pinned_bytes + self.locked_bytes
        if most is None or held + nbytes <= most:
            return ""
        more = f" more than {format_bytes(held)}" if held else ""
        return f"{format_bytes(nbytes)}{more} were asked for, and at most {format_bytes(most)} may be page-locked"

    def copy_in(self, source: Array, target: DeviceArray, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy("in", [(source, target.inside)], after)

    def bring_in(self, parts: Sequence[StagedPart], after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy("in", [(it.source, it.target.inside) for it in parts], after)

    def stage_in(
        self,
        parts: Sequence[StagedPart],
        after: Sequence[DeviceEvent] = (),
        lent: AbstractContextManager[object] = HERE,
    ) -> DeviceEvent:
        return self._copy("stage", [(it.source, it.target.inside) for it in parts], after, lent)

    def settle(self) -> None:
        with self._lock:
            for state in self._queues.values():
                if self.lost:
                    for copy in state.flying:
                        copy.failed, copy.land, copy.after = DeviceLost(self.name, self.lost), None, ()
                    state.flying.clear()
                elif state.flying:
                    with suppress(Exception):
                        self._reach(state.flying[-1])

    def copy_out(self, source: DeviceArray, target: Array, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy("out", [(source.inside, target)], after)

    def compute(
        self, what: str, work: DeviceWork, run: Callable[[], Any], after: Sequence[DeviceEvent]
    ) -> tuple[Any, DeviceEvent]:
        with self._lock:
            self._look()
            for event in after:
                self._reach(event)
            seconds = max(work.nbytes / SIM_MEMORY_BYTES_PER_S, work.flops / SIM_FLOPS)
            begun = self._begin("compute", what, work.nbytes, seconds, after)
            return run(), begun

    def wait(self, event: DeviceEvent) -> None:
        with self._lock:
            self._look()
            self._reach(event)
            assert isinstance(event, _Begun)
            self.now_s = max(self.now_s, event.end_s)

    def _copy(
        self,
        queue: Queue,
        parts: Sequence[tuple[Array, Array]],
        after: Sequence[DeviceEvent],
        lent: AbstractContextManager[object] = HERE,
    ) -> DeviceEvent:
        """From the first to the second of each part."""
        for source, target in parts:
            assert (source.shape, source.dtype) == (target.shape, target.dtype), "a copy changes nothing"

        def land() -> None:
            with lent:
                for source, target in parts:
                    target[...] = source

        with self._lock:
            self._look()
            for _, target in parts:
                _bytes_of(target)[...] = POISON
            seconds = sum(source.nbytes / self._bytes_per_s(queue, source) for source, _ in parts)
            largest = max((it.nbytes for it, _ in parts), default=0)
            nbytes = sum(it.nbytes for it, _ in parts)
            packet_bytes = max(1, min(largest, PACKET_BYTES))
            begun = self._begin(queue, "copy", nbytes, seconds, after, packet_bytes)
            begun.after, begun.land = tuple(after), land
            self._queues[queue].flying.append(begun)
            return begun

    def _bytes_per_s(self, queue: Queue, source: Array) -> float:
        comes = queue != "out" and self._ranges.whole(source.ctypes.data, source.nbytes)
        return self._pinned_bytes_per_s if comes else self.link_bytes_per_s

    def _begin(
        self,
        queue: Queue,
        what: str,
        nbytes: int,
        seconds: float,
        after: Sequence[DeviceEvent],
        packet_bytes: int = PACKET_BYTES,
    ) -> _Begun:
        state = self._queues[queue]
        begin_s = max(
            [self.now_s, state.free_s, *(event.end_s for event in after if isinstance(event, _Begun))]
        )
        if queue == "in":
            begin_s = self._between_packets(begin_s)
        state.free_s = end_s = begin_s + LAUNCH_S + seconds
        begun = Scheduled(queue, what, nbytes, begin_s, end_s)
        self.schedule.append(begun)
        if queue == "stage":
            self._staged.append((begun, packet_bytes))
        return _Begun(queue, end_s)

    def _between_packets(self, at_s: float) -> float:
        """When a copy in may begin that could at `at_s`, if the link had no packet on it."""
        while self._staged and self._staged[0][0].end_s <= self.now_s:
            self._staged.popleft()
        for it, packet_bytes in self._staged:
            if it.begin_s < at_s < it.end_s:
                packet_s = packet_bytes / self.link_bytes_per_s
                packets = ceil((at_s - it.begin_s - LAUNCH_S) / packet_s - 1e-9)
                return max(at_s, min(it.end_s, it.begin_s + LAUNCH_S + packets * packet_s))
        return at_s

    def _reach(self, event: DeviceEvent) -> None:
        """Everything up to this event has happened."""
        assert isinstance(event, _Begun)
        flying = self._queues[event.queue].flying
        while event.land is not None:
            first = flying.popleft()
            assert first.land is not None
            try:
                for earlier in first.after:
                    self._reach(earlier)
                first.land()
            except Exception as error:  # whoever needs this copy gets it, and no other
                first.failed = error.with_traceback(None)
            first.land, first.after = None, ()
        if event.failed is not None:
            raise type(event.failed)(*event.failed.args)

    def _look(self) -> None:
        if self.lost:
            raise DeviceLost(self.name, self.lost)


def _bytes_of(array: Array) -> Bytes:
    """The same memory; contiguous."""
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat
