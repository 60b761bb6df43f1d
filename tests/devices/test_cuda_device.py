"""What `CudaDevice` makes of torch's streams, events and errors, without a card."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch
from fakes.cuda_on_host import FREE_BYTES, Event, cuda

from shoal.devices.cuda_device import OF_FREE_MEMORY, CudaDevice
from shoal.devices.device import PACKET_BYTES, DeviceWork
from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceFull, DeviceLost, NoSuchDevice
from shoal.devices.torch_kernels import TorchKernels
from shoal.kernels.reference import ReferenceHome
from shoal.kernels.self_test import disagreements

F32 = np.dtype(np.float32)
WORK = DeviceWork()


def failing(error: Exception) -> None:
    raise error


def test_a_home_over_it_computes_what_the_reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch)
    assert disagreements(DeviceHome(device, TorchKernels()), ReferenceHome(), bits=False) == []
    assert device.budget.peak_bytes > device.budget.held_bytes == 0


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda(monkeypatch).budget.limit_bytes == int(OF_FREE_MEMORY * FREE_BYTES)
    device = cuda(monkeypatch, 1000)
    kept = device.allocate((200,), F32)
    with pytest.raises(
        DeviceFull, match=r"^device cuda:0 is full: 400 B more were asked for, and 800 B of its "
    ):
        device.allocate((100,), F32)
    del kept
    assert device.allocate((250,), F32).nbytes == device.budget.held_bytes == 1000
    with pytest.raises(NoSuchDevice, match="finds 1 cards"):
        CudaDevice("cuda:1", 1, None)


def test_both_ends_of_a_copy_are_kept_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch)
    source, target = np.ones(100, np.float32), device.allocate((100,), F32)
    ends = [weakref.ref(source), weakref.ref(target.inside)]
    ended = device.copy_in(source, target, [target.memory.ready])
    del source, target
    assert all(end() is not None for end in ends)
    device.wait(ended)
    assert [end() for end in ends] == [None, None]


def test_memory_may_be_given_back_while_some_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may run anywhere, and what it finds may be a device's."""
    device = cuda(monkeypatch)
    memory = device.reserve(1000)

    def collect() -> None:
        with device._lock, device.budget._lock:
            memory.free()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert device.budget.held_bytes == 0


def test_it_may_be_full_where_nothing_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch)
    with pytest.raises(DeviceFull, match="a computation found no room, though 0 B of its"):
        device.compute("x", WORK, lambda: failing(torch.OutOfMemoryError("CUDA out of memory")), [])
    assert device.compute("x", WORK, lambda: 7, [])[0] == 7


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_an_error_of_the_card_is_its_loss(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch)
    there = device.allocate((100,), F32)
    came = device.copy_in(np.ones(100, np.float32), there)
    Event.fails = kind("CUDA error: an illegal memory access was encountered\nCompile with …")
    for _ in range(2):
        with pytest.raises(
            DeviceLost, match=r"^device cuda:0 is lost: CUDA error: an illegal memory .* with …$"
        ):
            device.wait(came)
    with pytest.raises(DeviceLost):
        device.compute("x", WORK, lambda: 7, [])
    del there
    assert device.budget.held_bytes == 0  # nothing has to be asked of it for that


def test_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        device.compute("x", WORK, lambda: failing(RuntimeError("shapes differ")), [])
    assert not device.lost


def test_staged_weights_go_in_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch)
    source = np.arange(2 * PACKET_BYTES + 10).astype(np.uint8)
    target = device.allocate(source.shape, source.dtype)
    sizes, copy = [], torch.Tensor.copy_

    def seen(there: torch.Tensor, here: torch.Tensor, **how: bool) -> torch.Tensor:
        sizes.append(len(here))
        return copy(there, here, **how)

    monkeypatch.setattr(torch.Tensor, "copy_", seen)
    device.wait(device.stage_in(source, target, [target.memory.ready]))
    assert np.array_equal(target.inside.numpy(), source)
    assert sizes == [PACKET_BYTES, PACKET_BYTES, 10]
    assert not device._copies
