"""A graphics card, through torch. It is imported when such a device is opened, and torch with it.

Knows streams, events and torch's errors; `torch_kernels` computes.

Memory is the computing stream's. Both ends of a copy are kept until it has ended, so torch need not be told which other
streams use them (`record_stream`): if it was, it asks the driver when memory is given back, and where the card is lost
by then, that ends the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from shoal.kernels.arrays import Array

from .device import PACKET_BYTES, DeviceArray, DeviceBudget, DeviceEvent, DeviceMemory, DeviceWork
from .errors import DeviceLost, NoSuchDevice

OF_FREE_MEMORY = 0.9  # of the free memory, if no size was named: libraries take some, too

_cuda: Any = torch.cuda  # which has no types for streams and events


class _Copy(NamedTuple):
    """A copy under way, and its ends."""

    ended: Any
    source: torch.Tensor
    target: torch.Tensor


class CudaDevice:
    """Card `number`, of whose memory at most `limit_bytes` are used. It is an OpenDevice. Raises NoSuchDevice."""

    def __init__(self, name: str, number: int, limit_bytes: int | None) -> None:
        try:
            there = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if number >= there:
                raise NoSuchDevice(
                    f"device {name} is not there: torch {torch.__version__} finds {there} cards"
                )
            torch.cuda.set_device(number)
            usable = int(OF_FREE_MEMORY * torch.cuda.mem_get_info(number)[0])
            limit_bytes = usable if limit_bytes is None else min(usable, limit_bytes)
            self._computing, self._coming, self._staging, self._going = (
                _cuda.Stream(number) for _ in range(4)
            )
        except (RuntimeError, AssertionError) as error:  # a driver that is too old, no kernels for the card
            raise NoSuchDevice(f"device {name} cannot be used: {_line(error)}") from error
        self.name = name
        self.budget = DeviceBudget(name, limit_bytes)
        self.lost = ""
        self._device = torch.device("cuda", number)
        self._copies: list[_Copy] = []
        self._lock = threading.Lock()  # of the copies

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

    def copy_in(self, source: Array, target: DeviceArray, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy(self._coming, torch.from_numpy(source), target.inside, after)

    def stage_in(self, source: Array, target: DeviceArray, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy(self._staging, torch.from_numpy(source), target.inside, after, PACKET_BYTES)

    def copy_out(self, source: DeviceArray, target: Array, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return self._copy(self._going, source.inside, torch.from_numpy(target), after)

    def compute(
        self, what: str, work: DeviceWork, run: Callable[[], Any], after: Sequence[DeviceEvent]
    ) -> tuple[Any, DeviceEvent]:
        return self._on(self._computing, after, run)

    def wait(self, event: DeviceEvent) -> None:
        with self._calling():
            event.synchronize()  # type: ignore[attr-defined]
            self._forget_ended()

    def _copy(
        self,
        stream: torch.cuda.Stream,
        source: torch.Tensor,
        target: torch.Tensor,
        after: Sequence[DeviceEvent],
        together: int | None = None,
    ) -> DeviceEvent:
        """`together`: so many numbers, of arrays that have one dimension; None: all."""

        def run() -> None:
            step = together or max(1, len(source))
            for start in range(0, len(source), step):
                part = slice(start, start + step)
                target[part].copy_(source[part], non_blocking=True)

        _, ended = self._on(stream, after, run)
        with self._lock:
            self._copies.append(_Copy(ended, source, target))
        return ended

    def _forget_ended(self) -> None:
        with self._lock:
            self._copies = [copy for copy in self._copies if not copy.ended.query()]

    def _on(
        self, stream: torch.cuda.Stream, after: Sequence[DeviceEvent], run: Callable[[], Any]
    ) -> tuple[Any, DeviceEvent]:
        with self._calling():
            # Of this thread: else torch comes back to card 0, and opens it.
            torch.cuda.set_device(self._device)
            with torch.cuda.stream(stream):
                for event in after:
                    stream.wait_event(event)  # type: ignore[arg-type]
                made = run()
                ended = _cuda.Event()
                ended.record(stream)
                return made, ended

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Torch's errors as ours. One that is not for lack of memory leaves nothing to go on with in this process."""
        if self.lost:
            raise DeviceLost(self.name, self.lost)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self.budget.full() from error
        except RuntimeError as error:
            if "CUDA" not in str(error) and "cuda" not in str(error):
                raise
            self.lost = _line(error)
            raise DeviceLost(self.name, self.lost) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
