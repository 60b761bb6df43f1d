"""A graphics card, through torch. It is imported when such a device is opened, and torch with it.

Knows streams, events and torch's errors; `torch_kernels` computes.

Copies go through page-locked memory (`PinnedRing`), if there is any: from other memory torch's copies make the caller
wait, those that come out too, and with no limit, so threads make them (`CopyThread`). A thread fills page-locked memory
with weights that come and go, another one empties it of what leaves and is more than a packet. This memory is asked for
once, so nothing that is copied later can lack it. Weights that are locked where they lie need none of it.

All waits for the card have a limit (`SignsOfLife`). One that hangs is lost like any other, but it may still copy: what
it may copy from and to, and its events, which some drivers destroy only when they have ended, are kept until the
process ends. Calls that only begin something have no limit: a driver may keep who makes them.

Memory is the computing stream's. Both ends of a copy are kept until it has ended, so torch need not be told which other
streams use them (`record_stream`): if it was, it asks the driver when memory is given back, and where the card is lost
by then, that ends the process.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial as bound
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.kernels.arrays import Array
from shoal.kernels.compute_home import HERE
from shoal.kernels.huge_pages import mapped
from shoal.partition.amounts import format_bytes
from shoal.partition.placement import PINNED_BYTES

from .copy_thread import BEGIN_LIMIT_S, CopyThread, recorded
from .device import (
    PACKET_BYTES,
    DeviceArray,
    DeviceBudget,
    DeviceEvent,
    DeviceMemory,
    DeviceWork,
    StagedPart,
)
from .errors import DeviceLost, LostOpening, NoSuchDevice, NotPageLocked, one_line, says_no_memory
from .page_locked import LockedRanges, limit_on_locking
from .pinned_ring import CopyEnds, PinnedRing, begin_copies, bunched, packets
from .waiting import SignsOfLife, Stuck

DRIVER = Path("/proc/driver/nvidia/version")
OF_FREE_MEMORY = 0.9  # of the free memory, if no size was named: libraries take some, too
LEFT_LIMIT_S = 2.0  # for a thread to come back from a card that hangs

_cuda: Any = torch.cuda  # which has no types for streams and events
_hanging: list[CudaDevice] = []  # with all that they keep


class CudaDevice:
    """Card `number`, of whose memory at most `limit_bytes` are used. It is an OpenDevice. Raises NoSuchDevice."""

    def __init__(self, name: str, number: int, limit_bytes: int | None) -> None:
        try:
            with warnings.catch_warnings(record=True) as noted:  # of a driver that is too old, for instance
                warnings.simplefilter("always")
                there = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if number >= there:
                why = "".join(
                    f": {one_line(it.message)}" for it in noted[:1] if isinstance(it.message, Warning)
                )
                raise NoSuchDevice(
                    f"device {name} is not there: torch {torch.__version__} finds {there} cards{why}"
                )
            torch.cuda.set_device(number)
            _probe(torch.device("cuda", number))
            usable = int(OF_FREE_MEMORY * torch.cuda.mem_get_info(number)[0])
            limit_bytes = usable if limit_bytes is None else min(usable, limit_bytes)
            streams = (_cuda.Stream(number) for _ in range(4))
            self._computing, self._coming, self._staging, self._going = streams
        except (RuntimeError, AssertionError) as error:  # a driver that is too old, no kernels for the card
            why = f"device {name} cannot be used: {one_line(error)}"
            raise (LostOpening(why) if isinstance(error, Stuck) else NoSuchDevice(why)) from error
        self.name = name
        self.budget = DeviceBudget(name, limit_bytes)
        self.lost, self._hangs = "", False
        self.pinned_bytes, self.unpinned = 0, ""
        self._pinned: dict[torch.cuda.Stream, PinnedRing] = {}
        self._ranges = LockedRanges()
        self._owners: dict[int, object] = {}  # of what is locked, by its first address
        self._life = SignsOfLife()
        self._copies_begin, self._copies_arrive, self._copies_leave = self._threads = tuple(
            CopyThread(f"shoal-{it}-{number}") for it in ("copies", "arriving", "leaving")
        )
        self._number = number
        self._device = torch.device("cuda", number)
        self._copies: list[tuple[Any, Sequence[CopyEnds]]] = []  # under way: their last events, and of what
        self._lock = threading.RLock()  # of these; where it is held, the garbage collector may settle

    @property
    def facts(self) -> str:
        card = torch.cuda.get_device_properties(self._number)
        return f"{card.name} | {card.total_memory} | {torch.__version__} | {_driver()}"

    @property
    def now_s(self) -> float:
        return time.perf_counter()

    def reserve(self, nbytes: int) -> DeviceMemory:
        return self.budget.reserve(nbytes)

    def within(self, memory: DeviceMemory, inside: torch.Tensor) -> DeviceArray:
        dtype = np.dtype(str(inside.dtype).removeprefix("torch."))
        strides = [step * dtype.itemsize for step in inside.stride()]
        return DeviceArray(memory, inside, dtype, inside.shape, strides)

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        memory = self.reserve(int(np.prod(shape)) * dtype.itemsize)
        kind = torch.from_numpy(np.empty(0, dtype)).dtype

        def run() -> torch.Tensor:
            return torch.empty(*shape, dtype=kind, device=self._device)

        inside, memory.ready = self._on(self._computing, (), run)
        return self.within(memory, inside)

    def pin(self) -> None:
        if self.pinned_bytes:
            return
        memory = torch.from_numpy(mapped(PINNED_BYTES)[:PINNED_BYTES])
        try:
            self.lock(memory.data_ptr(), PINNED_BYTES, memory)
        except NotPageLocked as error:
            self.unpinned = str(error)
            return
        queues = self._staging, self._coming, self._going
        each = PINNED_BYTES // len(queues)
        self._pinned = {
            stream: PinnedRing(memory[place * each : (place + 1) * each])
            for place, stream in enumerate(queues)
        }
        self.pinned_bytes, self.unpinned = PINNED_BYTES, ""

    def unpin(self) -> None:
        pinned, self._pinned, self.pinned_bytes = self._pinned, {}, 0
        if pinned:
            self._finish(pinned)
            self.unlock(min(its.memory.data_ptr() for its in pinned.values()))

    @property
    def locked_bytes(self) -> int:
        return self._ranges.nbytes - self.pinned_bytes

    def lock(self, start: int, nbytes: int, owner: object) -> None:
        with self._calling():
            torch.cuda.set_device(self._device)
            runtime = _cuda.cudart()
            said = runtime.cudaHostRegister(start, nbytes, 0)
        if int(said):
            with suppress(RuntimeError):  # the next call is told of it, so it is one that nobody needs
                torch.zeros(1, device=self._device)
            why = runtime.cudaGetErrorString(said)
            raise NotPageLocked(
                f"of {format_bytes(nbytes)} more the driver says: {why}{limit_on_locking(nbytes)}"
            )
        self._owners[start] = owner
        self._ranges.add(start, nbytes)

    def unlock(self, start: int) -> None:
        if self._hangs or not (nbytes := self._ranges.remove(start)):
            return
        self.settle()  # nothing is copied from there any more
        if self._hangs:
            self._ranges.add(start, nbytes)
            return
        with suppress(RuntimeError):  # a card that is lost may keep it until the process ends
            torch.cuda.set_device(self._device)
            _cuda.cudart().cudaHostUnregister(start)
        self._owners.pop(start, None)

    def copy_in(self, source: Array, target: DeviceArray, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        ends = [CopyEnds(torch.from_numpy(source), target.inside)]
        begin = bound(self._copy, self._coming, ends, tuple(after))
        return begin() if self.pinned_bytes else self._begun_by(self._copies_arrive, begin)

    def bring_in(self, parts: Sequence[StagedPart], after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        ends = [CopyEnds(torch.from_numpy(it.source), it.target.inside) for it in parts]
        return self._begun_by(self._copies_arrive, bound(self._copy, self._coming, ends, tuple(after)))

    def stage_in(
        self,
        parts: Sequence[StagedPart],
        after: Sequence[DeviceEvent] = (),
        lent: AbstractContextManager[object] = HERE,
    ) -> DeviceEvent:
        ends = [CopyEnds(torch.from_numpy(it.source), it.target.inside) for it in parts]

        def begin() -> DeviceEvent:
            self._look()
            with lent:
                begun = self._copy(self._staging, ends, tuple(after), PACKET_BYTES)
                # Nobody says when a driver has read other memory.
                if lent is not HERE and not self.pinned_bytes:
                    self._ended(begun)
                return begun

        return self._begun_by(self._copies_begin, begin)

    def settle(self) -> None:
        self._finish(self._pinned)

    def copy_out(self, source: DeviceArray, target: Array, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        ends = [CopyEnds(source.inside, torch.from_numpy(target))]
        begin = bound(self._copy, self._going, ends, tuple(after))
        # Of more packets whoever asks would have to wait for the first, and so for all that it was computed from.
        at_once = self.pinned_bytes and target.nbytes <= PACKET_BYTES
        return begin() if at_once else self._begun_by(self._copies_leave, begin)

    def compute(
        self, what: str, work: DeviceWork, run: Callable[[], Any], after: Sequence[DeviceEvent]
    ) -> tuple[Any, DeviceEvent]:
        return self._on(self._computing, after, run)

    def wait(self, event: DeviceEvent) -> None:
        with self._calling():
            self._ended(ended := recorded(event))
            if (pinned := self._pinned.get(self._going)) is not None:
                pinned.land(ended)
            self._forget_ended()

    def _begun_by(self, thread: CopyThread, begin: Callable[[], DeviceEvent]) -> DeviceEvent:
        with self._calling():
            return thread.begin(begin)

    def _finish(self, pinned: Mapping[torch.cuda.Stream, PinnedRing]) -> None:
        """All copies that were begun have ended, and what leaves through this memory is where it should be."""
        for thread in self._threads:
            try:
                thread.drain(LEFT_LIMIT_S if self._hangs else BEGIN_LIMIT_S)
            except Stuck as error:
                self._lose(error)
        with self._lock:
            begun, self._copies = self._copies, []
        with suppress(DeviceLost), self._calling():
            for stream in (self._staging, self._coming, self._going):
                self._life.wait(stream.query, self._look)
            for its in pinned.values():
                its.land_all()
        if self._hangs:
            with self._lock:
                self._copies += begun

    def _copy(
        self,
        stream: torch.cuda.Stream,
        all: Sequence[CopyEnds],
        after: Sequence[DeviceEvent],
        together: int | None = None,
    ) -> DeviceEvent:
        """All, one after the other. `together`: so many numbers, of arrays that have one dimension; None: all."""
        pinned = self._pinned.get(stream)
        ended: Any = None
        for whole, some in groupby(all, lambda its: pinned is not None and its.whole):
            if whole:
                assert pinned is not None
                ended = self._packets(stream, pinned, [*some], after)
            else:
                ended = self._plainly(stream, [*some], after, together)
            after = ()
        with self._lock:
            self._copies.append((ended, all))
        return ended  # type: ignore[no-any-return]

    def _plainly(
        self,
        stream: torch.cuda.Stream,
        all: Sequence[CopyEnds],
        after: Sequence[DeviceEvent],
        together: int | None,
    ) -> Any:
        if not self.pinned_bytes:  # then the driver waits, for ever
            for event in after:
                self._ended(recorded(event))

        def run() -> None:
            for source, target in all:
                step = together or max(1, len(source))
                for start in range(0, len(source), step):
                    part = slice(start, start + step)
                    target[part].copy_(source[part], non_blocking=True)

        return self._on(stream, after, run)[1]

    def _packets(
        self,
        stream: torch.cuda.Stream,
        pinned: PinnedRing,
        all: Sequence[CopyEnds],
        after: Sequence[DeviceEvent],
    ) -> Any:
        """Bytes by way of page-locked memory, PACKET_BYTES together; waits where all of that is in use. What is locked
        where it lies needs none of it, and what of that comes together is begun in one call."""
        leaves = stream is self._going
        ended: Any = None
        cut = packets([CopyEnds(*map(_bytes, its)) for its in all], PACKET_BYTES)
        for locked, some in groupby(cut, lambda its: not leaves and self._locked(its.source)):
            if locked:
                _, ended = self._on(stream, after, bound(begin_copies, [*some]))
                after = ()
                continue
            for bunch in bunched(some, PACKET_BYTES):
                with pinned.room(bunch.nbytes, self._ended) as piece:
                    ways, land = bunch.by_way_of(piece, leaves=leaves)
                    _, ended = self._on(stream, after, bound(begin_copies, ways))
                    pinned.take(bunch.nbytes, ended, land)
                after = ()
        return ended

    def _ended(self, event: Any) -> None:
        """Wait for it. Raises DeviceLost, also where that takes for ever."""
        with self._calling():
            self._life.wait(event.query, self._look)

    def _locked(self, packet: torch.Tensor) -> bool:
        return self._ranges.whole(packet.data_ptr(), len(packet))

    def _forget_ended(self) -> None:
        with self._lock:
            self._copies = [copy for copy in self._copies if not copy[0].query()]

    def _on(
        self, stream: torch.cuda.Stream, after: Sequence[DeviceEvent], run: Callable[[], Any]
    ) -> tuple[Any, DeviceEvent]:
        with self._calling():
            # Of this thread: else torch comes back to card 0, and opens it.
            torch.cuda.set_device(self._device)
            with torch.cuda.stream(stream):
                for event in after:
                    stream.wait_event(recorded(event))
                made = run()
                ended = _cuda.Event()
                ended.record(stream)
                self._life.note(stream, ended)
                return made, ended

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Torch's errors as ours. One that is not for lack of memory leaves nothing to go on with in this process."""
        self._look()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or says_no_memory(str(error)):
                raise self.budget.full() from error
            if "CUDA" not in str(error) and "cuda" not in str(error):
                raise
            self._lose(error)
            raise DeviceLost(self.name, self.lost) from error

    def _lose(self, error: RuntimeError) -> None:
        self.lost = self.lost or one_line(error)
        if isinstance(error, Stuck) and not self._hangs:
            self._hangs = True
            _hanging.append(self)

    def _look(self) -> None:
        if self.lost:
            raise DeviceLost(self.name, self.lost)


def _probe(device: torch.device) -> None:
    """Raises RuntimeError unless the card computes what every model needs, and rightly: torch may have no kernels for
    it, or it may know no bfloat16."""
    ones = torch.ones(64, 64, dtype=torch.bfloat16, device=device).float()
    sum = (ones @ ones).sum()
    if device.type == "cuda":
        ended = _cuda.Event()
        ended.record()
        SignsOfLife().wait(ended.query, lambda: None)
    found = float(sum)
    if found != 64**3:
        raise RuntimeError(f"64 times 64 times 64 is {found:g} there")


def _driver() -> str:
    try:
        return DRIVER.read_text(errors="replace").partition("\n")[0]
    except OSError:
        return ""


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """The same memory, (n,); contiguous."""
    return x.view(-1).view(torch.uint8)
