"""What `CudaDevice` makes of torch's streams, events and errors, without a card."""

from __future__ import annotations

import gc
import resource
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from fakes.cuda_on_host import FREE_BYTES, Event, cuda, runtime

from shoal.devices import copy_thread, cuda_device
from shoal.devices.cuda_device import OF_FREE_MEMORY, CudaDevice
from shoal.devices.device import PACKET_BYTES, DeviceWork, StagedPart
from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceFull, DeviceLost, NoSuchDevice
from shoal.devices.page_locked import PageLocked
from shoal.devices.torch_kernels import TorchKernels
from shoal.kernels.arrays import Bytes
from shoal.kernels.huge_pages import mapped
from shoal.kernels.reference import ReferenceHome
from shoal.kernels.self_test import disagreements
from shoal.offload.errors import StoreError
from shoal.partition.placement import PINNED_BYTES

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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_it_may_be_full_where_nothing_says_by_how_much(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others than torch ask the driver for memory: to load kernels, for instance. It goes on after that."""
    device = cuda(monkeypatch)
    with pytest.raises(DeviceFull, match="a computation found no room, though 0 B of its"):
        device.compute("x", WORK, lambda: failing(error), [])
    assert not device.lost
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
    device.wait(device.stage_in([StagedPart(source, target)], [target.memory.ready]))
    assert np.array_equal(target.inside.numpy(), source)
    assert sizes == [PACKET_BYTES, PACKET_BYTES, 10]
    assert not device._copies


def pinned(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """A card with page-locked memory, of which no bit is as it should be before something was copied there."""
    device = cuda(monkeypatch)

    def poisoned(nbytes: int) -> Bytes:
        memory = mapped(nbytes)
        memory.fill(0xFF)
        return memory

    monkeypatch.setattr(cuda_device, "mapped", poisoned)
    device.pin()
    assert (device.pinned_bytes, device.unpinned) == (PINNED_BYTES, "")
    assert [*runtime().held.values()] == [PINNED_BYTES]
    return device


def test_through_page_locked_memory_everything_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    device = pinned(monkeypatch)
    assert disagreements(DeviceHome(device, TorchKernels()), ReferenceHome(), bits=False) == []
    generator = np.random.default_rng(1)
    kept = []
    for size in (0, 1, 1000, PACKET_BYTES // 4, PINNED_BYTES // 4 + 5, PINNED_BYTES):  # more than there is
        source = generator.standard_normal(size, np.float32)
        there, staged = (device.allocate(source.shape, F32) for _ in range(2))
        came = device.copy_in(source, there, [there.memory.ready])
        came = device.stage_in([StagedPart(source, staged)], [staged.memory.ready, came])
        expected = source.copy()
        device.wait(came)
        source[:] = 7
        back = np.full(size, np.nan, np.float32)
        kept.append((back, expected, device.copy_out(staged, back, [came])))
    for back, expected, ended in reversed(kept):
        device.wait(ended)
        assert np.array_equal(back, expected)


def test_small_parts_pass_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun costs who begins it as much as copying a hundred kilobytes: pages of K and V are as small."""
    device, begun = pinned(monkeypatch), []
    real = device._on

    def counted(*args: Any) -> Any:
        begun.append(args[0])
        return real(*args)

    monkeypatch.setattr(device, "_on", counted)
    sources = [np.full(PACKET_BYTES // 8 + place, place, np.uint8) for place in range(20)]
    parts = [StagedPart(it, device.allocate(it.shape, it.dtype)) for it in sources]
    begun.clear()
    device.wait(device.bring_in(parts, [parts[-1].target.memory.ready]))
    assert len(begun) == 3
    assert all(np.array_equal(it.target.inside.numpy(), it.source) for it in parts)


def test_what_leaves_is_here_when_its_event_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    device = pinned(monkeypatch)
    there, numbers = device.allocate((100,), F32), np.arange(100, dtype=np.float32)
    came = device.copy_in(numbers, there)
    first, second = np.full(100, np.nan, np.float32), np.full(100, np.nan, np.float32)
    events = [device.copy_out(there, back, [came]) for back in (first, second)]
    device.wait(came)
    assert np.isnan(first).all()
    device.wait(events[0])
    assert np.array_equal(first, numbers)
    assert np.isnan(second).all()
    device.wait(events[1])
    device.wait(events[0])
    assert np.array_equal(second, numbers)


def test_who_stages_weights_goes_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for two packets only, which are copied when somebody lets them."""
    device, goes_on, has_ended = pinned(monkeypatch), threading.Event(), Event.query

    def slow(self: Event) -> bool:
        return goes_on.wait(10) and has_ended(self)

    monkeypatch.setattr(Event, "query", slow)
    source = np.arange(5 * PACKET_BYTES + 10).astype(np.uint8)
    there = device.allocate(source.shape, source.dtype)
    came = [device.stage_in([StagedPart(source, there)], [there.memory.ready]) for _ in range(2)]
    assert not np.array_equal(there.inside.numpy(), source)
    goes_on.set()
    device.wait(came[1])
    assert np.array_equal(there.inside.numpy(), source)


def test_who_lets_more_than_a_packet_leave_goes_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for two packets only, and what leaves first has not been computed."""
    device, goes_on, has_ended = pinned(monkeypatch), threading.Event(), Event.query
    source = np.arange(5 * PACKET_BYTES + 10).astype(np.uint8)
    there, small = device.allocate(source.shape, source.dtype), np.zeros(100, np.uint8)
    there.inside.copy_(torch.from_numpy(source))
    before = device.copy_out(device.within(there.memory, there.inside[:100]), small)
    slow, backs = threading.Event(), [np.zeros_like(source) for _ in range(2)]

    def computed(self: Event) -> bool:
        if self is not before and threading.current_thread() is not threading.main_thread():
            slow.set()
            assert goes_on.wait(10)
        return has_ended(self)

    monkeypatch.setattr(Event, "query", computed)
    gone = [device.copy_out(there, back) for back in backs]
    assert slow.wait(10)
    device.wait(before)  # whoever needs something else does not wait for that
    assert np.array_equal(small, source[:100])
    assert not any(back[-1] for back in backs)
    goes_on.set()
    for back, ended in reversed([*zip(backs, gone, strict=True)]):
        device.wait(ended)
        assert np.array_equal(back, source)


def test_what_leaves_is_here_when_all_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    device = pinned(monkeypatch)
    source = np.arange(3 * PACKET_BYTES).astype(np.uint8)
    there = device.allocate(source.shape, source.dtype)
    came = device.copy_in(source, there)
    large, small = np.zeros_like(source), np.zeros(100, np.uint8)
    device.copy_out(there, large, [came])
    device.copy_out(device.within(there.memory, there.inside[:100]), small, [came])
    device.settle()
    assert np.array_equal(large, source)
    assert np.array_equal(small, source[:100])


def test_copies_that_nobody_begins_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_thread, "MOST_WAITING", 1)
    device, begins, goes_on = cuda(monkeypatch), threading.Event(), threading.Event()

    @contextmanager
    def lent() -> Iterator[None]:
        begins.set()
        goes_on.wait(10)
        yield

    device.stage_in([], (), lent())
    assert begins.wait(10)
    device.stage_in([], (), lent())
    monkeypatch.setattr(copy_thread, "BEGIN_LIMIT_S", 0.01)
    said = "device cuda:0 is lost: CUDA: of 1 copies that wait none was begun in 0 s"
    with pytest.raises(DeviceLost, match=f"^{said}$"):
        device.stage_in([], (), lent())
    goes_on.set()


def test_what_goes_wrong_while_weights_are_staged_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    device = pinned(monkeypatch)
    source = np.zeros(4 * PACKET_BYTES, np.uint8)
    there = device.allocate(source.shape, source.dtype)
    Event.fails = RuntimeError("CUDA error: the bus is gone")
    came = device.stage_in([StagedPart(source, there)])
    for _ in range(2):
        with pytest.raises(DeviceLost, match="the bus is gone"):
            device.wait(came)
    with pytest.raises(DeviceLost, match="the bus is gone"):
        device.compute("x", WORK, lambda: 7, [came])
    again = pinned(monkeypatch)
    monkeypatch.setattr(torch, "from_numpy", lambda array: torch.zeros(3))  # not as long as what it goes to
    for _ in range(2):
        with pytest.raises(RuntimeError, match="size"):
            again.wait(again.stage_in([StagedPart(source, there)]))
    assert not again.lost


def test_without_page_locked_memory_copies_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch)
    runtime().most = PINNED_BYTES - 1
    told, zeros = [], torch.zeros

    def telling(*operands: Any, **more: Any) -> torch.Tensor:  # as torch does after a call that went wrong
        told.append(operands)
        if len(told) == 1:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return zeros(*operands, **more)

    monkeypatch.setattr(torch, "zeros", telling)
    for limit, more in ((1 << 20, " (this process may lock 1.05 MB: ulimit -l)"), (PINNED_BYTES, "")):
        monkeypatch.setattr(resource, "getrlimit", lambda what, limit=limit: (limit, limit))
        device.pin()
        why = f"of 6.29 MB more the driver says: out of memory{more}"
        assert (device.pinned_bytes, device.unpinned) == (0, why)
    assert len(told) == 2
    there, back = device.allocate((100,), F32), np.zeros(100, np.float32)
    came = device.copy_in(np.ones(100, np.float32), there, [there.memory.ready])
    device.wait(device.copy_out(there, back, [came]))
    assert back.all()
    assert not device.lost


def test_page_locked_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = pinned(monkeypatch)
    source = np.arange(PINNED_BYTES).astype(np.uint8)
    there, back = device.allocate(source.shape, source.dtype), np.zeros_like(source)
    came = device.copy_in(source, there, [there.memory.ready])
    gone = device.copy_out(there, back, [came])
    for _ in range(2):
        device.unpin()
        assert (device.pinned_bytes, runtime().held) == (0, {})
    device.wait(gone)
    assert np.array_equal(back, source)  # what was under way has landed
    device.pin()
    assert (device.pinned_bytes, [*runtime().held.values()]) == (PINNED_BYTES, [PINNED_BYTES])
    device.lost = "the bus is gone"
    device.unpin()
    assert not runtime().held


def test_weights_that_are_locked_where_they_lie_are_copied_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packets that are locked in part go through the other memory, and so does what leaves."""
    device = pinned(monkeypatch)
    ring = [it.memory for it in device._pinned.values()]
    ways, copy = [], torch.Tensor.copy_

    def seen(there: torch.Tensor, here: torch.Tensor, **how: bool) -> torch.Tensor:
        inside = any(it.data_ptr() <= here.data_ptr() < it.data_ptr() + len(it) for it in ring)
        ways.append(("ring" if inside else "there") if how else "host")
        return copy(there, here, **how)

    monkeypatch.setattr(torch.Tensor, "copy_", seen)
    memory = mapped(4 * PACKET_BYTES)
    memory[:] = np.arange(len(memory)).astype(np.uint8)
    whole = memory[: 2 * PACKET_BYTES + 10]
    half = memory[2 * PACKET_BYTES + 10 :]
    locked = PageLocked(device, [memory[: 3 * PACKET_BYTES]])
    assert (locked.nbytes, device.locked_bytes, locked.trouble) == (3 * PACKET_BYTES, 3 * PACKET_BYTES, "")
    for source, expected in ((whole, ["there"] * 3), (half, ["host", "ring"] * 2)):
        there = device.allocate(source.shape, source.dtype)
        ways.clear()
        device.wait(device.stage_in([StagedPart(source, there)], [there.memory.ready]))
        assert np.array_equal(there.inside.numpy(), source)
        assert ways == expected
    locked.release()
    assert (device.locked_bytes, len(runtime().held)) == (0, 1)
    ways.clear()
    there = device.allocate(whole.shape, whole.dtype)
    device.wait(device.stage_in([StagedPart(whole, there)], [there.memory.ready]))
    assert ways == ["host", "ring"] * 3


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_copied_from_is_not_kept(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody has waited for it, or ever can."""
    device = pinned(monkeypatch)
    source = np.zeros(2 * PACKET_BYTES, np.uint8)
    there, kept = device.allocate(source.shape, source.dtype), weakref.ref(source)
    device.stage_in([StagedPart(source, there)])
    assert device._copies_begin.begin(lambda: None).event is None
    del source
    assert kept() is not None
    if lost:
        device.lost = "the bus is gone"
    device.settle()
    assert kept() is None


def test_nothing_is_begun_any_more_when_all_has_settled_after_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other thread is at ends first, and what waits behind it is not asked of the disk any more."""
    device, here, said = pinned(monkeypatch), threading.Event(), []
    source = np.zeros(2 * PACKET_BYTES, np.uint8)
    there, kept = device.allocate(source.shape, source.dtype), weakref.ref(source)

    @contextmanager
    def lent(name: str) -> Iterator[None]:
        said.append(name)
        assert here.wait(10)
        yield
        said.append(f"{name} was given back")

    for name in ("first", "second"):
        device.stage_in([StagedPart(source, there)], (), lent(name))
    del source
    while not said:
        time.sleep(1e-3)
    device.lost = "the bus is gone"
    threading.Timer(0.2, here.set).start()
    device.settle()
    assert here.is_set()
    assert said == ["first"]
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("by", ["any thread", "that of the copies"])
def test_what_is_locked_may_be_given_back_anywhere(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may do that, where copies are looked after, too."""
    device = pinned(monkeypatch)
    locked = PageLocked(device, [mapped(PACKET_BYTES)])
    (ring,) = [its for stream, its in device._pinned.items() if stream is device._going]

    def collect() -> None:
        with device._lock, ring._lock:
            locked.release()

    if by == "any thread":
        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
    else:
        monkeypatch.setattr(copy_thread, "BEGIN_LIMIT_S", 5.0)
        assert device._copies_begin.begin(collect).event is None
    assert (device.locked_bytes, len(runtime().held), device.lost) == (0, 1, "")


def test_what_is_copied_from_locked_memory_has_come_before_that_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, memory = pinned(monkeypatch), mapped(PACKET_BYTES)
    memory[:] = np.arange(len(memory)) % 251
    locked, there = PageLocked(device, [memory]), device.allocate(memory.shape, memory.dtype)
    device.stage_in([StagedPart(memory, there)], [there.memory.ready])
    locked.release()  # the card that is played refuses it while something is copied from there
    assert np.array_equal(there.inside.numpy(), np.arange(len(memory)) % 251)


def test_locked_memory_is_given_back_to_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread that has none yet: torch would open card 0 for it. One that is lost says no more than that."""
    device, cards = pinned(monkeypatch), list[object]()
    locked = [PageLocked(device, [mapped(PACKET_BYTES)]) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    locked[0].release()
    assert cards[-1:] == [device._device]
    device.lost = "the bus is gone"
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: failing(RuntimeError("CUDA error: no bus")))
    locked[1].release()
    assert device.locked_bytes == 0


def test_a_card_that_is_lost_between_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    device = pinned(monkeypatch)
    source = np.zeros(2 * PINNED_BYTES, np.uint8)
    there = device.allocate(source.shape, source.dtype)
    Event.fails = RuntimeError("CUDA error: the bus is gone")
    for copy in (lambda: device.copy_out(there, source), lambda: device.copy_in(source, there)):
        with pytest.raises(DeviceLost, match="the bus is gone"):
            device.wait(copy())


@pytest.mark.parametrize(
    ("patched", "said"),
    [
        ({"_probe": lambda device: failing(RuntimeError("CUDA error: no kernel image"))}, "no kernel image"),
        ({"_probe": lambda device: failing(RuntimeError("64 times 64 times 64 is 7 there"))}, "is 7 there"),
        (
            {"torch.cuda.mem_get_info": lambda device: failing(RuntimeError("driver\nis mad"))},
            "driver is mad",
        ),
        ({"torch.cuda.set_device": lambda device: failing(AssertionError("no CUDA"))}, "no CUDA"),
    ],
)
def test_a_card_that_cannot_compute_is_no_device(
    patched: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kernels for it, without bfloat16, with a driver that fails."""
    cuda(monkeypatch)
    for name, value in patched.items():
        monkeypatch.setattr(f"shoal.devices.cuda_device.{name}", value)
    with pytest.raises(NoSuchDevice, match=f"^device cuda:0 cannot be used: .*{said}") as refused:
        CudaDevice("cuda:0", 0, None)
    assert "\n" not in str(refused.value)


def test_what_torch_notes_of_an_old_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch)

    def none() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", none)
    with pytest.raises(
        NoSuchDevice, match=r"finds 0 cards: CUDA initialization: The NVIDIA driver .* too old$"
    ):
        CudaDevice("cuda:0", 0, None)


def test_the_probe_is_right_where_everything_is() -> None:
    cuda_device._probe(torch.device("cpu"))


@pytest.mark.parametrize("card", [pinned, cuda])
def test_weights_that_come_from_a_disk_are_waited_for_by_another_thread(
    card: Callable[[pytest.MonkeyPatch], CudaDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for a copy goes on; it is made when the bytes are there, and they are given back when they have been
    taken. What cannot be read is the error of who needs it, and not the card's."""
    device = card(monkeypatch)
    source, here, said = np.zeros(3 * PACKET_BYTES + 5, np.uint8), threading.Event(), []
    there = device.allocate(source.shape, source.dtype)

    @contextmanager
    def lent() -> Iterator[None]:
        said.append(threading.current_thread().name)
        assert here.wait(10)
        source[:] = np.arange(len(source)) % 251
        yield
        said.append("given back")
        source[:] = 0

    @contextmanager
    def failing_disk() -> Iterator[None]:
        raise StoreError("block 7 cannot be read")
        yield

    ended = device.stage_in([StagedPart(source, there)], (), lent())
    failed = device.stage_in([StagedPart(source, there)], (), failing_disk())
    other = np.full_like(source, 9)
    elsewhere = device.allocate(source.shape, source.dtype)
    elsewhere.inside.fill_(0)
    again = device.stage_in([StagedPart(other, elsewhere)])  # not before those
    assert not np.array_equal(elsewhere.inside.numpy(), other)
    here.set()
    device.wait(ended)
    assert said == ["shoal-copies-0", "given back"]
    assert np.array_equal(there.inside.numpy(), np.arange(len(source)) % 251)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"^block 7 cannot be read$"):
            device.compute("x", WORK, lambda: 7, [failed])
    assert device.compute("x", WORK, lambda: 7, [ended, again])[0] == 7
    assert not device.lost
