"""`OpenDevice`: memory of an accelerator within a budget, copies to and from it, computations, and events between them.

Copies in, copies of weights that come and go, computations and copies out are four queues. Each does one thing after
the other, and beside the other queues; only events put what is in different queues in order. The host goes on at once,
unless it waits for an event.
Whatever runs on the simulated device (`sim_device`) runs on a real one (`cuda_device`): the former is stricter.

Knows bytes, not what they mean. Shapes and dtypes are those of NumPy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from shoal.kernels.arrays import Array
from shoal.kernels.compute_home import HERE
from shoal.partition.amounts import format_bytes

from .errors import DeviceFull

PACKET_BYTES = 1 << 20  # of staged weights, for which another copy waits at most
FULL_S = 600.0  # for so long a device that was full is taken to have no more room than it had
LEFT_SHARE = 1 / 8  # of what a device held when it was full, which may come and go


class DeviceEvent(Protocol):
    """Something that was begun on a device. When it has ended is known to the device alone."""


class DeviceWork(NamedTuple):
    """What a computation is expected to take: bytes that it reads and writes, and operations on numbers (a
    multiplication and an addition are two)."""

    nbytes: int = 0
    flops: int = 0


class DeviceMemory:
    """`nbytes` of a device's memory, which it has again when nobody refers to them any more, or after `free`. `ready`:
    the last thing that was begun to write to them; `used`: the last computation that was begun with what is there."""

    __slots__ = ("__weakref__", "_give_back", "nbytes", "ready", "used")

    def __init__(self, nbytes: int, give_back: Callable[[int], None]) -> None:
        self.nbytes = nbytes
        self.ready: DeviceEvent | None = None
        self.used: DeviceEvent | None = None
        self._give_back = give_back

    def free(self) -> None:
        """Idempotent."""
        taken, self.nbytes = self.nbytes, 0
        if taken:
            self._give_back(taken)

    def __del__(self) -> None:
        self.free()


class Leaving(NamedTuple):
    """A copy on its way out: the numbers on the host are `here` when `ended` has. `joined`: what is copied, if it was
    put together for that."""

    here: Array
    ended: DeviceEvent
    joined: DeviceArray | None = None


class DeviceArray:
    """A handle of an array in a device's memory, or of a part of one. Its form is known to everybody, what is in it to
    the device alone: `inside` is what that computes with. `leaving`: a copy that was begun before somebody asked for
    it."""

    __slots__ = ("dtype", "inside", "leaving", "memory", "shape", "strides")
    __array_ufunc__ = None
    flags = SimpleNamespace(c_contiguous=True, writeable=True)

    def __init__(
        self,
        memory: DeviceMemory,
        inside: Any,
        dtype: np.dtype[Any],
        shape: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        self.memory = memory
        self.inside = inside
        self.dtype = dtype
        self.shape = tuple(shape)
        self.strides = tuple(strides)
        self.leaving: Leaving | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)

    def _refused(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("what is in a device's memory can only be computed with there")

    __array__ = __bool__ = __len__ = __iter__ = __getitem__ = _refused


class StagedPart(NamedTuple):
    """Numbers of the host, (n,), contiguous, and where in a device's memory they are copied to."""

    source: Array
    target: DeviceArray


class DeviceBudget:
    """Of the memory of device `name`, at most `limit_bytes` are held at a time. `peak_bytes`: the most that ever were.
    Any thread may call it."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = self.peak_bytes = 0
        self._name = name
        self._room_bytes, self._until_s = limit_bytes, 0.0  # as it was found, and how long that holds
        self._lock = threading.RLock()  # memory may be given back anywhere, by the thread in here, too

    @property
    def room_bytes(self) -> int:
        """Of the limit, as much as a plan may count with: less for a while where the device was full."""
        with self._lock:
            full = time.monotonic() < self._until_s
            return min(self.limit_bytes, self._room_bytes) if full else self.limit_bytes

    @property
    def trouble(self) -> str:
        """Why that is less than the limit, in one line; "" if it is not."""
        there, whole = self.room_bytes, self.limit_bytes
        if there == whole:
            return ""
        return (
            f"device {self._name} was full lately, so at most {format_bytes(there)} of its {format_bytes(whole)} are "
            f"used; a model that is loaded {FULL_S / 60:.0f} minutes after that may have all of it"
        )

    def reserve(self, nbytes: int) -> DeviceMemory:
        """Raises DeviceFull."""
        with self._lock:
            if self.held_bytes + nbytes > self.limit_bytes:
                raise self.full(nbytes)
            self.held_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return DeviceMemory(nbytes, self._given_back)

    def full(self, nbytes: int = 0) -> DeviceFull:
        """The error for so many bytes more; 0: for something that does not say how many. For a while `room_bytes` is
        what there was room for, less what then was too much; or half of that, if it has been full lately."""
        with self._lock:
            lately = time.monotonic() < self._until_s
            over = max(0, self.held_bytes + nbytes - self.limit_bytes)
            room = min(self.held_bytes, self.limit_bytes - over)
            room = min(int(room * (1 - LEFT_SHARE)), self._room_bytes // 2 if lately else room)
            self._room_bytes, self._until_s = max(0, room), time.monotonic() + FULL_S
            return DeviceFull(self._name, nbytes, self.held_bytes, self.limit_bytes)

    def _given_back(self, nbytes: int) -> None:
        with self._lock:
            self.held_bytes -= nbytes


class OpenDevice(Protocol):
    """Any thread may call it. Every call raises DeviceLost when the device is gone, or has hung for so long that it is
    taken to be."""

    name: str
    budget: DeviceBudget  # of all that is allocated on it, together
    lost: str  # why, once it is gone
    pinned_bytes: int  # of page-locked memory, through which its copies go; 0: through memory of the driver's
    unpinned: str  # why not, where `pin` failed

    @property
    def facts(self) -> str:
        """What its speed depends on, as text."""
        ...

    @property
    def now_s(self) -> float:
        """Seconds on the clock by which it computes and copies."""
        ...

    @property
    def locked_bytes(self) -> int:
        """Of the host's memory, page-locked where it lies; of a device that hangs, with what copies went through."""
        ...

    def reserve(self, nbytes: int) -> DeviceMemory:
        """Room for a result, which `within` makes an array. Raises DeviceFull."""
        ...

    def within(self, memory: DeviceMemory, inside: Any) -> DeviceArray:
        """A handle of an array, or a view of one, that a computation left in this memory."""
        ...

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """An array with anything in it. Raises DeviceFull."""
        ...

    def pin(self) -> None:
        """Have copies go through PINNED_BYTES of page-locked memory from now on. If the system gives none, they go
        without it, more slowly. Idempotent."""
        ...

    def unpin(self) -> None:
        """Give that memory back when all that goes through it has landed; see `unlock`. Idempotent."""
        ...

    def lock(self, start: int, nbytes: int, owner: object) -> None:
        """Page-lock memory of the host where it lies: whole pages from this address on, of which none is locked.
        Copies from there need no other memory. `owner`, which it is given back with, is kept until `unlock`. Raises
        NotPageLocked."""
        ...

    def unlock(self, start: int) -> None:
        """What was locked from this address on is not any more, as soon as copies from there have ended. A device that
        hangs may still copy, so there it stays as it is for good. Idempotent."""
        ...

    def copy_in(self, source: Array, target: DeviceArray, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """Begin to copy a contiguous array of the host, when all `after` have ended. Until the copy has ended, nobody
        may change the source or look at the target."""
        ...

    def bring_in(self, parts: Sequence[StagedPart], after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """As `copy_in` of each part, one after the other, whose arrays may have any number of dimensions. Who asks for
        it goes on at once, however much it is."""
        ...

    def stage_in(
        self,
        parts: Sequence[StagedPart],
        after: Sequence[DeviceEvent] = (),
        lent: AbstractContextManager[object] = HERE,
    ) -> DeviceEvent:
        """As `copy_in` of each part, one after the other, in the queue for weights that come and go, and in packets of
        `PACKET_BYTES`: other copies in pass between two of them. `lent` is entered before a source is looked at, which
        may take as long as reading it from a disk does, and left when all have been. What that raises is raised by
        whoever needs the copy."""
        ...

    def settle(self) -> None:
        """Wait for all copies that were begun. Of what lies on the host nothing is kept for them any more, also where
        the device is lost and they never end; but where it hangs, they may still go on. What went wrong with one is
        raised by whoever needs it, not here."""
        ...

    def copy_out(self, source: DeviceArray, target: Array, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """Begin to copy to a contiguous array of the host, when all `after` have ended. Until the copy has ended,
        nobody may change the source or look at the target."""
        ...

    def compute(
        self, what: str, work: DeviceWork, run: Callable[[], Any], after: Sequence[DeviceEvent]
    ) -> tuple[Any, DeviceEvent]:
        """Begin to compute, when all `after` have ended. `run` is called at once and returns what kernels leave; it
        only begins what takes long."""
        ...

    def wait(self, event: DeviceEvent) -> None:
        """Wait on the host until it has ended."""
        ...
