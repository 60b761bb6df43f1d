"""The simulated device: a budget that holds, copies that are there only after their event, and a virtual clock."""

from __future__ import annotations

import operator
import subprocess
import sys
import time

import numpy as np
import pytest

from shoal.devices.device import FULL_S, DeviceWork
from shoal.devices.device_names import DeviceName, DeviceNameError, read_name
from shoal.devices.errors import DeviceFull, DeviceLost
from shoal.devices.sim_device import LAUNCH_S, SIM_MEMORY_BYTES_PER_S, SimDevice
from shoal.partition.placement import PINNED_BYTES

F32 = np.dtype(np.float32)
NUMBERS = np.arange(1000, dtype=np.float32)


def device(limit_bytes: int = 1 << 20) -> SimDevice:
    return SimDevice("sim:test", limit_bytes, link_bytes_per_s=1e6)


def test_memory_has_nothing_in_it_before_something_was_written() -> None:
    for kind in (np.float16, np.float32, np.float64):
        assert np.isnan(device().allocate((5,), np.dtype(kind)).inside).all()


def test_what_is_copied_is_there_only_after_its_event() -> None:
    here = device()
    there, back = here.allocate((1000,), F32), np.zeros(1000, np.float32)
    came = here.copy_in(NUMBERS, there)
    assert np.isnan(there.inside).all()
    went = here.copy_out(there, back, [came])
    assert np.isnan(back).all()
    here.wait(went)
    assert np.array_equal(back, NUMBERS)


def test_a_copy_that_was_not_told_what_to_wait_for_copies_poison() -> None:
    here = device()
    there, back = here.allocate((1000,), F32), np.zeros(1000, np.float32)
    here.copy_in(NUMBERS, there)
    here.wait(here.copy_out(there, back))
    assert np.isnan(back).all()


def test_a_source_must_stay_as_it_is() -> None:
    here = device()
    there, source = here.allocate((1000,), F32), NUMBERS.copy()
    came = here.copy_in(source, there)
    source[:] = 7
    here.wait(came)
    assert (there.inside == 7).all()  # as a real device may have it


def test_copies_of_a_queue_end_in_their_order() -> None:
    here = device()
    first, second = here.allocate((1000,), F32), here.allocate((1000,), F32)
    here.copy_in(NUMBERS, first)
    here.wait(here.copy_in(NUMBERS, second))
    assert np.array_equal(first.inside, NUMBERS)


def test_computations_wait_for_what_they_are_told_to() -> None:
    here = device()
    there = here.allocate((1000,), F32)
    came = here.copy_in(NUMBERS, there)
    total, _ = here.compute("early", DeviceWork(), lambda: there.inside.sum(), [])
    assert np.isnan(total)
    total, _ = here.compute("in time", DeviceWork(), lambda: there.inside.sum(), [came])
    assert total == NUMBERS.sum()


def test_the_clock_overlaps_copies_with_computing() -> None:
    here = device(1 << 24)
    copy_s, compute_s = 1.0, 0.4
    link, work = int(1e6 * copy_s), DeviceWork(nbytes=int(SIM_MEMORY_BYTES_PER_S * compute_s))
    here.budget.limit_bytes = 4 * link
    source = np.zeros(link, np.uint8)
    first, second = (here.allocate((link,), source.dtype) for _ in range(2))
    came = here.copy_in(source, first)
    _, done = here.compute("first", work, lambda: None, [came])
    again = here.copy_in(source, second)  # while the first is computed
    _, last = here.compute("second", work, lambda: None, [again])
    here.wait(done)
    assert here.now_s == pytest.approx(copy_s + compute_s + 2 * LAUNCH_S)
    here.wait(last)
    assert here.now_s == pytest.approx(2 * copy_s + compute_s + 3 * LAUNCH_S)
    told = [(it.queue, it.what, round(it.begin_s, 2), round(it.end_s, 2)) for it in here.schedule]
    assert told == [
        ("in", "copy", 0.0, 1.0),
        ("compute", "first", 1.0, 1.4),
        ("in", "copy", 1.0, 2.0),
        ("compute", "second", 2.0, 2.4),
    ]


def test_copies_have_the_links_speed_from_page_locked_memory() -> None:
    for pinnable, speed in ((None, 1e6), (PINNED_BYTES, 1e6), (PINNED_BYTES - 1, 4e5), (0, 4e5)):
        here = SimDevice("sim:test", 1 << 20, 1e6, 4e5, pinnable)
        there = here.allocate((1000,), F32)
        here.wait(here.copy_in(NUMBERS, there))
        assert here.now_s == pytest.approx(4000 / 4e5 + LAUNCH_S)
        for _ in range(2):
            here.pin()
            before_s = here.now_s
            here.wait(here.copy_in(NUMBERS, there))
            assert here.now_s - before_s == pytest.approx(4000 / speed + LAUNCH_S)
            assert (here.pinned_bytes == PINNED_BYTES) == (speed == 1e6) == (not here.unpinned)
        assert np.array_equal(there.inside, NUMBERS)
    assert here.unpinned == "6.29 MB were asked for, and at most 0 B may be page-locked"


def test_the_budget_holds() -> None:
    here = device(1000)
    first = here.allocate((200,), F32)
    with pytest.raises(
        DeviceFull, match=r"^device sim:test is full: 804 B more .* 800 B of its 1 kB are taken$"
    ):
        here.allocate((201,), F32)
    assert (here.budget.held_bytes, here.budget.peak_bytes) == (800, 800)
    part = here.within(first.memory, first.inside[:5])
    del first
    assert here.budget.held_bytes == 800  # a view keeps it
    part.memory.free()
    part.memory.free()
    assert here.budget.held_bytes == 0


def test_nobody_looks_into_a_handle() -> None:
    there = device().allocate((2, 3), F32)
    assert (there.shape, there.nbytes, there.dtype, there.strides) == ((2, 3), 24, F32, (12, 4))
    for look in (len, iter, bool, np.asarray, operator.itemgetter(0), lambda x: NUMBERS + x):
        with pytest.raises(TypeError):
            look(there)


def test_a_lost_device_answers_nothing() -> None:
    here = device()
    there = here.allocate((1000,), F32)
    came = here.copy_in(NUMBERS, there)
    here.lose("no more power")
    for call in (
        lambda: here.allocate((1,), F32),
        lambda: here.copy_in(NUMBERS, there),
        lambda: here.copy_out(there, NUMBERS.copy()),
        lambda: here.compute("it", DeviceWork(), lambda: None, []),
        lambda: here.wait(came),
        here.pin,
    ):
        with pytest.raises(DeviceLost, match=r"^device sim:test is lost: no more power$"):
            call()


def test_names() -> None:
    assert read_name("cpu") == DeviceName("cpu")
    assert read_name("cuda:1") == DeviceName("cuda", 1)
    assert read_name("cuda:0,16GB") == DeviceName("cuda", 0, 16 * 10**9)
    assert read_name("sim:512MB") == DeviceName("sim", 0, 512 * 10**6)
    assert read_name("sim:1GiB,2GB/s") == DeviceName("sim", 0, 1 << 30, 2e9)
    assert read_name("sim:1GB,2GB/s,1GB/s") == DeviceName("sim", 0, 10**9, 2e9, 1e9)
    assert read_name("sim:1GB,2GB/s,1GB/s,0") == DeviceName("sim", 0, 10**9, 2e9, 1e9, 0)
    for name in (
        "",
        "auto",
        "gpu",
        "cuda",
        "cuda:",
        "cuda:-1",
        "cuda:0,0",
        "cuda:00001",  # is not card 0
        "cuda:" + "1" * 10_000,
        "CUDA:0",
        "cuda:\N{ARABIC-INDIC DIGIT ONE}",
        "sim:\N{ARABIC-INDIC DIGIT ONE}GB",
        "sim:1GB\n",
        "sim:1GB, 2GB/s",
        "sim:",
        "sim:0",
        "sim:1GB,",
        "sim:1GB,x",
        "sim:1GB,0",
        "sim:1GB,2GB/s,x",
        "sim:1GB,2GB/s,0",
        "sim:1GB,2GB/s,1GB/s,x",
        "sim:1GB,2GB/s,1GB/s,0,0",
        "cuda:0,1GB,1GB/s",
        "sim:" + "9" * 10_000,
    ):
        with pytest.raises(DeviceNameError, match="is no device"):
            read_name(name)


def test_who_has_no_device_imports_nothing_of_one() -> None:
    code = "import sys, shoal.daemon.node as it; print(*(m for m in sys.modules if m.startswith('shoal.devices')), "
    code += "'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    names = ("", ".device_names", ".errors", ".opening")
    assert sorted(out.split()) == sorted(["False", *(f"shoal.devices{name}" for name in names)])


def test_what_was_full_has_less_room_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    here, now_s = device(1000), [1e6]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    kept = here.allocate((200,), F32)
    assert (here.budget.room_bytes, here.budget.trouble) == (1000, "")
    with pytest.raises(DeviceFull):
        here.allocate((60,), F32)
    room = here.budget.room_bytes
    assert room == 700  # what was there, less an eighth
    assert here.budget.trouble.startswith(
        "device sim:test was full lately, so at most 700 B of its 1 kB are used"
    )
    here.budget.full()  # again, so soon: nobody tries all sizes
    assert here.budget.room_bytes == room // 2
    kept.memory.free()
    assert here.allocate((250,), F32).nbytes == 1000  # what is there may be used
    now_s[0] += FULL_S
    assert (here.budget.room_bytes, here.budget.trouble) == (1000, "")
