"""KV pages are written in the background and read back bitwise the same, within bounds; no fault becomes an error."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.kernels.arrays import Bytes
from shoal.offload.kv.disk_file import PAGES, SYNC_BYTES, KvFile
from shoal.offload.kv.disk_index import NO_TEXT, Entry, chained, packed
from shoal.offload.kv.disk_pages import KvDisk, buffer_bytes, queue_pages
from shoal.offload.kv.prefix_cache import Save

PAGE_BYTES = 3 << 20  # ten of them may wait
WAITING = queue_pages(PAGE_BYTES)
POOL = np.random.default_rng(0).integers(0, 256, (30, PAGE_BYTES), np.uint8)


def store(path: Path, slots: int = 40) -> KvDisk:
    return KvDisk(KvFile(path, bytes(32), PAGE_BYTES, 4), slots)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KvDisk]:
    opened = store(tmp_path)
    yield opened
    end(opened)


def end(disk: KvDisk, known: list[Save] | None = None) -> None:
    disk.close(known or [], lambda number: POOL[number])


def chain(count: int, first: int = 0) -> list[Save]:
    """A text of that many pages, which are the pool's pages from `first` on."""
    saves, digest = [], NO_TEXT
    for number in range(first, first + count):
        tokens = packed([number, 1, 2, 3])
        saves.append(Save(number, digest, tokens))
        digest = chained(digest, tokens)
    return saves


def entries(disk: KvDisk, saves: list[Save]) -> list[Entry]:
    found = (disk.index.find(save.parent, save.tokens) for save in saves)
    return [entry for entry in found if entry is not None]


def read(disk: KvDisk, saves: list[Save]) -> int:
    """How many pages come back. Those that do are as they were written."""
    there = entries(disk, saves)
    into = [np.full(PAGE_BYTES, 77, np.uint8) for _ in there]
    count = disk.read(there, into)
    for save, page in zip(saves[:count], into, strict=False):
        assert np.array_equal(page, POOL[save.page])
    for page in into[count:]:
        assert (page == 77).all()
    return count


def test_pages_come_back_bitwise_after_a_restart(tmp_path: Path) -> None:
    disk, saves = store(tmp_path), chain(4)
    for save in reversed(saves):
        assert disk.save(save, POOL[save.page])
    end(disk)
    assert (disk.pages_written, disk.pages_dropped) == (4, 0)
    disk = store(tmp_path)
    assert disk.nbytes == 4 * PAGE_BYTES
    assert read(disk, saves) == 4
    assert disk.pages_read == 4
    end(disk)


def test_closing_keeps_what_is_in_memory_most_recently_used_first(tmp_path: Path) -> None:
    disk = store(tmp_path, slots=3)
    end(disk, chain(2))
    disk = store(tmp_path, slots=3)
    other = chain(2, first=10)
    end(disk, other + chain(2))  # one page too many: the end of the older text
    end(disk)  # twice does no harm
    disk = store(tmp_path, slots=3)
    assert (read(disk, other), read(disk, chain(2))) == (2, 1)
    assert disk.pages_written == 0
    end(disk)


def test_the_bound_is_kept_and_the_oldest_go(tmp_path: Path) -> None:
    disk, texts = store(tmp_path, slots=4), [chain(2, first) for first in range(0, 20, 2)]
    for text in texts:
        for save in reversed(text):
            disk.save(save, POOL[save.page], wait_s=10)
    end(disk)
    assert disk.nbytes == 4 * PAGE_BYTES
    assert (tmp_path / PAGES).stat().st_size <= 4 * PAGE_BYTES
    disk = store(tmp_path, slots=4)
    assert [read(disk, text) for text in texts] == [0] * 8 + [2, 2]
    end(disk)


def test_nobody_waits_for_the_writer(disk: KvDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write = threading.Event(), disk._file.write

    def slow(entry: Entry, page: Bytes) -> None:
        assert go_on.wait(30)
        write(entry, page)

    monkeypatch.setattr(disk._file, "write", slow)
    saves = chain(WAITING + 3)
    assert [disk.save(save, POOL[save.page]) for save in saves] == [True] * WAITING + [False] * 3
    go_on.set()
    end(disk)
    assert (disk.pages_written, disk.pages_dropped) == (WAITING, 3)
    assert buffer_bytes(PAGE_BYTES) == (WAITING + 1) * PAGE_BYTES + 2 * SYNC_BYTES


def test_what_is_there_is_not_written_again(disk: KvDisk) -> None:
    saves = chain(2)
    longer = Save(1, saves[1].parent, packed([1, 1, 2, 3]))
    shorter = Save(2, saves[1].parent, packed([1, 1]))
    for save in (*saves, *saves, shorter, longer):
        disk.save(save, POOL[save.page], wait_s=10)
    end(disk)
    assert disk.pages_written == 2


@pytest.mark.parametrize("fault", ["altered", "cut", "read error"])
def test_a_page_that_cannot_be_read_is_a_miss_and_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    disk, saves = store(tmp_path), chain(3)
    end(disk, saves)
    disk = store(tmp_path)
    last = entries(disk, saves)[2]
    if fault == "altered":
        with (tmp_path / PAGES).open("r+b") as stream:
            stream.seek(last.slot * PAGE_BYTES + 12345)
            stream.write(b"xyz")
    elif fault == "cut":
        os.truncate(tmp_path / PAGES, last.slot * PAGE_BYTES + 12345)
    else:
        preadv = os.preadv

        def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if offset == last.slot * PAGE_BYTES:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", failing)
    with caplog.at_level(logging.WARNING):
        assert read(disk, saves) == 2
        assert entries(disk, saves[2:]) == []
        assert read(disk, saves) == 2
    monkeypatch.undo()
    assert len(caplog.records) == 1
    assert "computed again" in caplog.text
    end(disk, saves)
    disk = store(tmp_path)
    assert read(disk, saves) == 3
    end(disk)


def test_a_full_disk_stops_growth_and_is_reported_once(
    disk: KvDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pwrite = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 2 * PAGE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    saves = chain(6)
    with caplog.at_level(logging.WARNING):
        for save in saves:
            disk.save(save, POOL[save.page], wait_s=10)
        end(disk)
    assert [record.message for record in caplog.records] == [
        "KV pages cannot be written to disk: No space left on device; those that are there are used"
    ]
    assert len(disk.index) == 2
    assert disk.index.slots == 2
