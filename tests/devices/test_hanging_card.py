"""A card that hangs without an error, played: whoever waits for it is told so in time, and it is lost like any other.

It may still copy, so nothing that it may copy from or to is given back.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fakes.cuda_on_host import LOCKED, Event, card, runtime

from shoal.devices import copy_thread, cuda_device, kernel_choice, opening, waiting
from shoal.devices.cuda_device import CudaDevice
from shoal.devices.device import PACKET_BYTES, DeviceArray, DeviceWork, StagedPart
from shoal.devices.device_home import DeviceHome
from shoal.devices.device_timing import device_speed
from shoal.devices.errors import DeviceLost, NoSuchDevice
from shoal.devices.expert_timing import Shape, expert_times
from shoal.devices.page_locked import PageLocked
from shoal.devices.torch_kernels import TorchKernels
from shoal.devices.waiting import SignsOfLife, Stuck
from shoal.kernels.huge_pages import mapped
from shoal.kernels.types import Q8_0

F32 = np.dtype(np.float32)
NUMBERS = PACKET_BYTES  # of four bytes: more than a queue's page-locked memory
SHAPE = Shape(Q8_0, 64, 256)
SAID = r"^device cuda:0 is lost: CUDA: nothing that was begun has ended for 0 s$"
MANY_TIMES_THE_LIMITS_S = 5.0


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "STILL_LIMIT_S", 0.1)
    monkeypatch.setattr(waiting, "LOOK_S", 0.01)
    monkeypatch.setattr(cuda_device, "LEFT_LIMIT_S", 0.1)
    monkeypatch.setattr(copy_thread, "BEGIN_LIMIT_S", 0.5)
    monkeypatch.setattr(cuda_device, "BEGIN_LIMIT_S", 0.5)
    monkeypatch.setattr(cuda_device, "_hanging", [])


@pytest.fixture(params=LOCKED)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    return card(monkeypatch, request.param)


def in_time(act: Callable[[], object]) -> BaseException | None:
    """What it raises, as long as it comes back; a test that does not would never end."""
    said: list[BaseException | None] = []

    def run() -> None:
        try:
            act()
            said.append(None)
        except BaseException as error:
            said.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(MANY_TIMES_THE_LIMITS_S)
    assert said, "it hangs"
    return said[0]


def there(device: CudaDevice, numbers: int = NUMBERS) -> DeviceArray:
    return device.allocate((numbers,), F32)


WAITS: dict[str, Callable[[CudaDevice], object]] = {
    "little that comes": lambda its: its.wait(its.copy_in(np.ones(9, np.float32), there(its, 9))),
    "much that comes": lambda its: its.wait(its.copy_in(np.ones(NUMBERS, np.float32), there(its))),
    "little that leaves": lambda its: its.wait(its.copy_out(there(its, 9), np.ones(9, np.float32))),
    "much that leaves": lambda its: its.wait(its.copy_out(there(its), np.ones(NUMBERS, np.float32))),
    "weights": lambda its: its.wait(its.stage_in([StagedPart(np.ones(NUMBERS, np.float32), there(its))])),
    "computing": lambda its: its.wait(its.compute("x", DeviceWork(), lambda: 7, [])[1]),
    "computing with what comes": lambda its: its.wait(
        its.compute("x", DeviceWork(), int, [its.copy_in(np.ones(NUMBERS, np.float32), there(its))])[1]
    ),
    "what stays": lambda its: home(its).keep_vector(np.ones(9, np.float32)),
    "a page": lambda its: home(its).page_out(home(its).pages((2, 1, 1, 64)), 1),
    "a router's scores": lambda its: home(its).route(home(its).place(np.ones((1, 9), np.float32)), 2, True),
    "trying its speed": lambda its: device_speed(home(its), [SHAPE]),
    "trying an expert": lambda its: expert_times(home(its), [SHAPE]),
}


def home(device: CudaDevice) -> DeviceHome:
    return DeviceHome(device, TorchKernels())


@pytest.mark.parametrize("waits", WAITS)
def test_whoever_waits_is_told_in_time(waits: str, device: CudaDevice) -> None:
    Event.hang = True
    for _ in range(2):
        error = in_time(lambda: WAITS[waits](device))
        assert isinstance(error, DeviceLost)
    assert str(error).startswith("device cuda:0 is lost: CUDA: ")
    assert "\n" not in str(error)
    for end in (device.settle, device.unpin, device.settle):
        assert in_time(end) is None


@pytest.mark.parametrize("end", ["settle", "unpin", "release"])
def test_nobody_has_to_have_waited_before(end: str, device: CudaDevice) -> None:
    """What ends a model is the first to find that the card hangs."""
    memory = mapped(PACKET_BYTES)
    locked = PageLocked(device, [memory]) if device.pinned_bytes else None
    parts = [StagedPart(np.ones(NUMBERS, np.float32), there(device))]
    Event.hang = True
    device.stage_in(parts)
    acts = {
        "settle": device.settle,
        "unpin": device.unpin,
        "release": locked.release if locked is not None else device.settle,
    }
    assert in_time(acts[end]) is None
    if end != "unpin" or device.locked_bytes:
        assert device.lost.startswith("CUDA: ")


@pytest.mark.parametrize("locked", ["little", "much"])
def test_nothing_that_it_may_copy_to_or_from_is_given_back(
    locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = card(monkeypatch, locked)
    (memory,) = device._owners.values()
    ring: Any = weakref.ref(memory)
    weights = mapped(2 * PACKET_BYTES)
    lies = PageLocked(device, [weights])
    held = dict(runtime().held)
    source, target = np.ones(9, np.float32), there(device, 9)
    kept = [weakref.ref(it) for it in (weights, source, target.inside)]
    Event.hang = True
    came = device.copy_in(source, target)
    begun = weakref.ref(came)
    with pytest.raises(DeviceLost, match=SAID):
        device.wait(came)
    lies.release()
    device.settle()
    device.unpin()
    del weights, source, target, came, lies, memory
    device_kept, device = weakref.ref(device), None  # type: ignore[assignment]
    gc.collect()
    assert device_kept() is not None
    assert begun() is not None  # destroying it may wait for it
    assert ring() is not None
    assert all(it() is not None for it in kept)
    assert runtime().held == held  # the played driver would not come back from giving it back
    its: Any = device_kept()
    assert (its.pinned_bytes, its.locked_bytes) == (0, sum(held.values()))


def test_one_that_is_lost_with_an_error_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = card(monkeypatch, "much")
    lies = PageLocked(device, [mapped(PACKET_BYTES)])
    came = device.copy_in(np.ones(9, np.float32), there(device, 9))
    Event.fails = RuntimeError("CUDA error: the bus is gone")
    with pytest.raises(DeviceLost, match="the bus is gone"):
        device.wait(came)
    for stream in runtime().streams:  # after an error drivers do nothing more
        stream.begun.clear()
    lies.release()
    device.unpin()
    assert (runtime().held, cuda_device._hanging) == ({}, [])


class Thing:
    """Ends when it is time."""

    def __init__(self, ends_s: float) -> None:
        self._ends_s = ends_s

    def query(self) -> bool:
        return time.perf_counter() >= self._ends_s


def nothing() -> None:
    return


def test_as_long_as_something_ends_one_may_wait() -> None:
    """Five times the limit, behind much that was begun before, in another queue."""
    progress, now_s = SignsOfLife(), time.perf_counter()
    things = [Thing(now_s + 0.02 * (place + 1)) for place in range(25)]
    for place, it in enumerate(things):
        progress.note("one" if place < 24 else "other", it)
    progress.wait(things[-1].query, nothing)
    assert 0.5 <= time.perf_counter() - now_s < 1.0
    progress.note("one", Thing(now_s + 1e9))
    with pytest.raises(Stuck, match="nothing that was begun has ended for 0 s"):
        progress.wait(Thing(now_s + 1e9).query, nothing)


def test_a_process_that_was_stopped_meanwhile_has_not_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much time has gone by since it asked, and all has ended in it."""
    progress, thing, asked = SignsOfLife(), Thing(0.0), []

    def ended() -> bool:
        asked.append(time.perf_counter())
        if len(asked) == 2:
            time.sleep(0.3)  # after it was told no
            return False
        return len(asked) > 2

    progress.note("one", thing)
    progress.wait(ended, nothing)
    assert len(asked) == 3


def test_what_ends_a_wait_otherwise_is_raised() -> None:
    def lost() -> None:
        raise DeviceLost("cuda:0", "the bus is gone")

    with pytest.raises(DeviceLost, match="the bus is gone"):
        SignsOfLife().wait(lambda: False, lost)


def test_short_waits_are_not_rounded_up() -> None:
    """A decode step has some for each layer. Others get to compute in longer ones."""
    progress, late_s = SignsOfLife(), []
    for _ in range(21):
        ends_s = time.perf_counter() + 3e-5
        progress.wait(Thing(ends_s).query, nothing)
        late_s.append(time.perf_counter() - ends_s)
    assert sorted(late_s)[len(late_s) // 2] < 2e-5


def test_kernels_are_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    device = card(monkeypatch, "much")
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    monkeypatch.setattr("shoal.devices.in_triton.triton_kernels.too_old", lambda: "")
    Event.hang = True
    error = in_time(lambda: kernel_choice.chosen(device))
    assert isinstance(error, DeviceLost)


@pytest.fixture
def nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_opened", {})
    monkeypatch.setattr(opening, "_given_up", {})


def tried_twice(name: str) -> tuple[str, str]:
    """What opening a device says of it the first time, and the second time, at once."""
    first = in_time(lambda: opening.device_home(name))
    began_s = time.perf_counter()
    again = in_time(lambda: opening.device_home(name))
    assert time.perf_counter() - began_s < waiting.STILL_LIMIT_S
    assert isinstance(first, NoSuchDevice)
    assert isinstance(again, NoSuchDevice)
    return str(first), str(again)


@pytest.mark.usefixtures("nothing_open")
def test_a_card_that_hangs_when_it_is_opened_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = cuda_device._probe
    card(monkeypatch, "none")

    class Never:
        def record(self) -> None: ...
        def query(self) -> bool:
            return False

    monkeypatch.setattr(cuda_device, "_probe", probe)
    monkeypatch.setattr(cuda_device._cuda, "Event", Never)
    monkeypatch.setattr(waiting, "sleep", time.sleep)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones(*shape, dtype=dtype))
    first, again = tried_twice("cuda:0")
    assert first == again
    assert first == (
        "device cuda:0 cannot be used: CUDA: nothing that was begun has ended for 0 s; start anew to try it again"
    )


@pytest.mark.usefixtures("nothing_open")
def test_a_card_that_hangs_while_kernels_are_tried_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = card(monkeypatch, "much")
    monkeypatch.setattr(cuda_device, "CudaDevice", lambda *_: device)
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    monkeypatch.setattr("shoal.devices.in_triton.triton_kernels.too_old", lambda: "")
    Event.hang = True
    first, again = tried_twice("cuda:0")
    assert first == again
    assert "SHOAL_DEVICE_KERNELS=torch tries none; start anew to try it again" in first


@pytest.mark.usefixtures("nothing_open")
def test_a_card_that_was_only_full_when_it_was_opened_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "none")

    def full(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as then:
        then.setattr(cuda_device, "_probe", full)
        error = in_time(lambda: opening.device_home("cuda:0"))
        assert isinstance(error, NoSuchDevice)
    monkeypatch.setenv(kernel_choice.VARIABLE, "torch")
    assert opening.device_home("cuda:0").device.name == "cuda:0"
