"""What `CudaDevice` calls of `torch.cuda`, played in the CPU's memory: its logic without a card.

Copies are made at the last moment, which is when somebody waits for them (asks, and then pauses): until then their
targets are poisoned, and what is changed in their source is copied. What is computed is computed at once, as soon as
what it waits for is there. From `hang` on nothing that was begun ends any more, as on a card that hangs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from shoal.devices import cuda_device, page_locked, waiting
from shoal.devices.cuda_device import CudaDevice
from shoal.devices.page_locked import SYSTEM_PAGE_BYTES

FREE_BYTES = 1 << 30
POISON = 0xFF  # bytes of which any float is NaN

_copy = torch.Tensor.copy_
_lock = threading.RLock()  # of all streams
_thread = threading.local()  # whose `stream` is current, and what it `asked` about last
LONGEST_TEST_S = 60.0


class Copy(NamedTuple):
    """Under way."""

    target: torch.Tensor
    source: torch.Tensor

    def __call__(self) -> None:
        _copy(self.target, self.source)


class Stream:
    """`computes`: at once."""

    def __init__(self, number: int) -> None:
        self.computes = False
        self.begun: deque[Callable[[], None]] = deque()

    def query(self) -> bool:
        _thread.asked = self
        return not self.begun

    def reach(self) -> None:
        """Everything in it has happened."""
        with _lock:
            while self.begun and not Event.hang:
                self.begun.popleft()()

    def synchronize(self) -> None:
        raise AssertionError("a wait without a limit")

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "nothing was recorded"
        with _lock:
            if self.computes:
                event.reach()
            else:
                self.begun.append(event.reach)


class Event:
    """`fails`: what the driver says to whoever asks for any event. `hang`: none ends any more."""

    fails: Exception | None = None
    hang = False

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.ended = False

    def record(self, stream: Stream) -> None:
        with _lock:
            self.stream = stream
            stream.begun.append(self._end)

    def reach(self) -> None:
        """Everything before it has happened."""
        with _lock:
            while not (self.ended or Event.hang):
                assert self.stream is not None
                self.stream.begun.popleft()()

    def synchronize(self) -> None:
        raise AssertionError("a wait without a limit")

    def query(self) -> bool:
        self._ask()
        _thread.asked = self
        return self.ended

    def _end(self) -> None:
        self.ended = True

    def _ask(self) -> None:
        if Event.fails is not None:
            raise Event.fails


def _begun(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`copy_` of torch; what does not block is between host and device."""
    stream: Stream | None = getattr(_thread, "stream", None)
    if not non_blocking or stream is None or target.shape != source.shape:  # which torch refuses
        return _copy(target, source)
    assert not stream.computes, "a copy in the queue that computes"
    if not any(runtime().has(it) for it in (target, source)):
        _waits_in_driver()
    with _lock:
        if target.is_contiguous() and target.numel():
            target.view(-1).view(torch.uint8).fill_(POISON)
        stream.begun.append(Copy(target, source))
    return target


def _waits_in_driver() -> None:
    """As whoever copies to or from memory that is not page-locked: for ever, if the card hangs."""
    ends_s = time.monotonic() + LONGEST_TEST_S
    while Event.hang:
        assert time.monotonic() < ends_s
        time.sleep(1e-3)


def _pause(seconds: float) -> None:
    """Of who waits for what it has asked about."""
    if Event.hang:
        time.sleep(seconds)
    else:
        _thread.asked.reach()


class Runtime:
    """What page-locks memory, up to `most` bytes: `held` has how many from which address on. `streams`: of the card."""

    def __init__(self) -> None:
        self.most = 1 << 40
        self.held: dict[int, int] = {}
        self.streams: list[Stream] = []

    def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:  # noqa: N802
        pages = start % SYSTEM_PAGE_BYTES or nbytes % SYSTEM_PAGE_BYTES
        twice = any(at < start + nbytes and start < at + its for at, its in self.held.items())
        if pages or twice or sum(self.held.values()) + nbytes > self.most:
            return 1 if pages else 712 if twice else 2
        self.held[start] = nbytes
        return 0

    def has(self, memory: torch.Tensor) -> bool:
        """Whether all of it is page-locked."""
        at, nbytes = memory.data_ptr(), memory.numel() * memory.element_size()
        return any(start <= at and at + nbytes <= start + its for start, its in self.held.items())

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        assert not Event.hang, "the driver would wait for a card that hangs"
        nbytes = self.held.pop(start, 0)
        under_way = [it for stream in self.streams for it in stream.begun if isinstance(it, Copy)]
        for host in (end for copy in under_way for end in copy):
            assert not start <= host.data_ptr() < start + nbytes, "somebody copies from there, or to there"
        return 0 if nbytes else 713

    def cudaGetErrorString(self, said: int) -> str:  # noqa: N802
        return {2: "out of memory"}.get(said, f"error {said}")


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    before, _thread.stream = getattr(_thread, "stream", None), stream
    try:
        yield
    finally:
        _thread.stream = before


def runtime() -> Runtime:
    """Of the card that was made last."""
    found = cuda_device._cuda.cudart()
    assert isinstance(found, Runtime)
    return found


def cuda(monkeypatch: pytest.MonkeyPatch, limit_bytes: int | None = None) -> CudaDevice:
    """A card with `FREE_BYTES`."""
    monkeypatch.setattr(Event, "fails", None)
    monkeypatch.setattr(Event, "hang", False)
    monkeypatch.setattr(waiting, "sleep", _pause)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(name="played", total_memory=2 * FREE_BYTES),
        "mem_get_info": lambda device: (FREE_BYTES, 2 * FREE_BYTES),
        "stream": _stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_device, "_probe", lambda device: None)
    its = Runtime()

    def stream(number: int) -> Stream:
        its.streams.append(Stream(number))
        return its.streams[-1]

    fake = SimpleNamespace(Stream=stream, Event=Event, cudart=lambda: its)
    monkeypatch.setattr(cuda_device, "_cuda", fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", None)  # it would end the process after a loss
    monkeypatch.setattr(torch.Tensor, "copy_", _begun)
    device = CudaDevice("cuda:0", 0, limit_bytes)
    device._device = torch.device("cpu")
    computing: Any = device._computing
    computing.computes = True
    return device


LOCKED = ("none", "little", "much")  # page-locked memory


def card(monkeypatch: pytest.MonkeyPatch, locked: str) -> CudaDevice:
    """One that is used. `little`: of two packets a queue, which are smaller than most that is copied."""
    if locked == "little":
        monkeypatch.setattr(cuda_device, "PACKET_BYTES", SYSTEM_PAGE_BYTES)
        monkeypatch.setattr(cuda_device, "PINNED_BYTES", 3 * 2 * SYSTEM_PAGE_BYTES)
        monkeypatch.setattr(page_locked, "LOCKED_AT_ONCE_BYTES", 3 * SYSTEM_PAGE_BYTES)
    device = cuda(monkeypatch)
    if locked != "none":
        device.pin()
        assert device.pinned_bytes
    return device
