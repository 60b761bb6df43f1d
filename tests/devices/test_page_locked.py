"""Memory that is page-locked where it lies: each page once, as far as the system lets, and given back."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fakes.on_device import sim

from shoal.devices import page_locked
from shoal.devices.device import StagedPart
from shoal.devices.errors import NotPageLocked
from shoal.devices.page_locked import SYSTEM_PAGE_BYTES, LockedRanges, PageLocked
from shoal.devices.sim_device import LAUNCH_S, SimDevice
from shoal.kernels.arrays import Bytes
from shoal.kernels.huge_pages import mapped
from shoal.partition.placement import PINNED_BYTES


def device(pinnable: int | None) -> SimDevice:
    made = SimDevice("sim:test", 1 << 24, 1e9, 4e8, pinnable)
    made.pin()
    return made


@pytest.mark.parametrize("seed", range(5))
def test_each_page_is_locked_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(seed)
    monkeypatch.setattr(page_locked, "LOCKED_AT_ONCE_BYTES", 4 * SYSTEM_PAGE_BYTES)
    here, memory = device(None), mapped(64 * SYSTEM_PAGE_BYTES)
    arrays: list[Bytes] = []
    for _ in range(10):
        start, size = generator.randrange(60 * SYSTEM_PAGE_BYTES), generator.randrange(3 * SYSTEM_PAGE_BYTES)
        arrays.append(memory[start : start + size])
    pages = {
        page
        for it in arrays
        if it.nbytes
        for page in range(
            it.ctypes.data // SYSTEM_PAGE_BYTES, (it.ctypes.data + it.nbytes - 1) // SYSTEM_PAGE_BYTES + 1
        )
    }
    locked = PageLocked(here, arrays)
    assert not locked.trouble
    assert locked.nbytes == here.locked_bytes == SYSTEM_PAGE_BYTES * len(pages)
    for it in arrays:
        assert here._ranges.some(it.ctypes.data, it.nbytes) or not it.nbytes
    for _ in range(2):
        locked.release()
        assert (locked.nbytes, here.locked_bytes) == (0, 0)


def test_as_much_as_the_system_lets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_locked, "LOCKED_AT_ONCE_BYTES", 4 * SYSTEM_PAGE_BYTES)
    memory = mapped(10 * SYSTEM_PAGE_BYTES)[: 10 * SYSTEM_PAGE_BYTES]
    for more, locked_pages in ((0, 0), (7, 4), (9, 8), (10, 10)):
        here = device(PINNED_BYTES + more * SYSTEM_PAGE_BYTES)
        locked = PageLocked(here, [memory])
        assert locked.nbytes == here.locked_bytes == locked_pages * SYSTEM_PAGE_BYTES
        assert bool(locked.trouble) == (locked_pages < 10)
        if locked.trouble:
            said = (
                "weights that pass through device sim:test are page-locked where they lie, and the processor"
            )
            assert said in locked.trouble
            assert "may be page-locked" in locked.trouble
            assert "\n" not in locked.trouble
        locked.release()
        assert here.locked_bytes == 0


def test_pages_that_are_locked_already_are_refused() -> None:
    here, memory = device(None), mapped(4 * SYSTEM_PAGE_BYTES)
    first = PageLocked(here, [memory[:100]])
    assert "locked already" in PageLocked(here, [memory[200:300]]).trouble
    with pytest.raises(NotPageLocked):
        here.lock(memory.ctypes.data, SYSTEM_PAGE_BYTES, memory)
    first.release()
    assert not PageLocked(here, [memory[200:300]]).trouble


def test_what_nobody_refers_to_is_unlocked() -> None:
    here, memory = device(None), mapped(4 * SYSTEM_PAGE_BYTES)
    PageLocked(here, [memory])
    assert here.locked_bytes == 0


def test_a_device_that_is_lost_unlocks_too() -> None:
    here, memory = device(None), mapped(4 * SYSTEM_PAGE_BYTES)
    locked = PageLocked(here, [memory])
    here.lose("it was pulled out")
    locked.release()
    assert here.locked_bytes == 0


def test_copies_from_there_have_the_links_speed() -> None:
    """Though there is none for others."""
    here, memory = (
        SimDevice("sim:test", 1 << 24, 1e9, 4e8, 8 * SYSTEM_PAGE_BYTES),
        mapped(16 * SYSTEM_PAGE_BYTES),
    )
    here.lock(memory.ctypes.data, 8 * SYSTEM_PAGE_BYTES, memory)
    for start, speed in ((0, 1e9), (4, 4e8), (8, 4e8)):
        source = memory[start * SYSTEM_PAGE_BYTES : (start + 8) * SYSTEM_PAGE_BYTES]
        there = here.allocate(source.shape, np.dtype(np.uint8))
        before_s = here.now_s
        here.wait(here.stage_in([StagedPart(source, there)]))
        assert here.now_s - before_s == pytest.approx(8 * SYSTEM_PAGE_BYTES / speed + LAUNCH_S)


def test_without_other_page_locked_memory_nothing_is() -> None:
    """Drivers copy nothing that is locked in part, and what lies beside locked pages has to go somehow."""
    _, home = sim()
    assert home.lock([mapped(SYSTEM_PAGE_BYTES)]) is None


def test_ranges() -> None:
    """Each byte of an array has to be in one of them, as drivers see it."""
    ranges = LockedRanges()
    assert not ranges.some(0, 1000)
    assert not ranges.whole(0, 1)
    for start in (150, 100, 300):  # in any order
        ranges.add(start, 50)
    held = [*range(100, 200), *range(300, 350)]
    for start in range(90, 360):
        for nbytes in (1, 2, 49, 50, 51, 100, 120):
            touched = [it for it in held if start <= it < start + nbytes]
            assert ranges.some(start, nbytes) == bool(touched)
            inside = len(touched) == nbytes and len({it // 50 for it in touched}) == 1
            assert ranges.whole(start, nbytes) == inside
    assert (ranges.remove(100), ranges.remove(100), ranges.nbytes) == (50, 0, 100)
    assert not ranges.some(100, 50)
