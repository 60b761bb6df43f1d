"""What `CudaDevice` calls of `torch.cuda`, played in the CPU's memory: its logic without a card.

Copies are made at once; the event after one ends when somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from shoal.devices import cuda_device
from shoal.devices.cuda_device import CudaDevice
from shoal.devices.page_locked import SYSTEM_PAGE_BYTES

FREE_BYTES = 1 << 30


class Stream:
    def __init__(self, number: int) -> None:
        self.waited: list[Event] = []

    def synchronize(self) -> None:
        return

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "nothing was recorded"
        self.waited.append(event)


class Event:
    """`fails`: what the driver says to whoever asks for any event."""

    fails: Exception | None = None

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.ended = False

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self._ask()
        self.ended = True

    def query(self) -> bool:
        self._ask()
        return self.ended

    def _ask(self) -> None:
        if Event.fails is not None:
            raise Event.fails


class Runtime:
    """What page-locks memory, up to `most` bytes: `held` has how many from which address on."""

    def __init__(self) -> None:
        self.most = 1 << 40
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:  # noqa: N802
        pages = start % SYSTEM_PAGE_BYTES or nbytes % SYSTEM_PAGE_BYTES
        twice = any(at < start + nbytes and start < at + its for at, its in self.held.items())
        if pages or twice or sum(self.held.values()) + nbytes > self.most:
            return 1 if pages else 712 if twice else 2
        self.held[start] = nbytes
        return 0

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        return 0 if self.held.pop(start, 0) else 713

    def cudaGetErrorString(self, said: int) -> str:  # noqa: N802
        return {2: "out of memory"}.get(said, f"error {said}")


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    yield


def runtime() -> Runtime:
    """Of the card that was made last."""
    found = cuda_device._cuda.cudart()
    assert isinstance(found, Runtime)
    return found


def cuda(monkeypatch: pytest.MonkeyPatch, limit_bytes: int | None = None) -> CudaDevice:
    """A card with `FREE_BYTES`."""
    monkeypatch.setattr(Event, "fails", None)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "mem_get_info": lambda device: (FREE_BYTES, 2 * FREE_BYTES),
        "stream": _stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_device, "_probe", lambda device: None)
    its = Runtime()
    fake = SimpleNamespace(Stream=Stream, Event=Event, cudart=lambda: its)
    monkeypatch.setattr(cuda_device, "_cuda", fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", None)  # it would end the process after a loss
    device = CudaDevice("cuda:0", 0, limit_bytes)
    device._device = torch.device("cpu")
    return device
