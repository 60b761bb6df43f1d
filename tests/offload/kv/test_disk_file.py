"""The files of KV pages on disk: we read what we wrote, whatever happens to the files in between."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.arrays import Bytes
from shoal.offload.errors import KvFileError
from shoal.offload.kv.disk_file import INDEX, MOST_USED, PAGES, SYNC_BYTES, KvFile, checksum
from shoal.offload.kv.disk_index import DIGEST_BYTES, Entry, packed
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.prefix_cache import Save

KEY = bytes(range(32))
PAGE_BYTES = 96
PAGE_TOKENS = 4


def opened(directory: Path, key: bytes = KEY, page_bytes: int = PAGE_BYTES) -> KvFile:
    return KvFile(directory, key, page_bytes, PAGE_TOKENS)


def page(seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, PAGE_BYTES, np.uint8)


def entry(slot: int, seed: int) -> Entry:
    tokens = packed([seed, -1, seed + 1, 4][: 1 + seed % PAGE_TOKENS])
    return Entry(slot, bytes([seed]) * DIGEST_BYTES, tokens, checksum(page(seed)), used=seed)


def facts(entry: Entry) -> tuple[int, bytes, bytes, int, int]:
    return entry.slot, entry.parent, entry.tokens, entry.checksum, entry.used


def test_what_was_written_is_there_again_for_this_user_alone(tmp_path: Path) -> None:
    file = opened(tmp_path)
    for slot, seed in ((0, 5), (2, 6), (3, 7), (3, 8)):
        file.write(entry(slot, seed), page(seed))
    file.clear(0)
    renewed = entry(2, 6)
    renewed.used = 99
    file.store_used(renewed)
    file.close()
    again = opened(tmp_path)
    assert [facts(one) for one in again.entries(10)] == [facts(renewed), facts(entry(3, 8))]
    into = np.zeros(PAGE_BYTES, np.uint8)
    again.read(3, into)
    assert np.array_equal(into, page(8))
    again.sync()
    again.close()
    for name in (INDEX, PAGES):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_fewer_slots_cut_the_file(tmp_path: Path) -> None:
    file = opened(tmp_path)
    for slot in range(4):
        file.write(entry(slot, slot), page(slot))
    assert [one.slot for one in file.entries(2)] == [0, 1]
    file.close()
    assert (tmp_path / PAGES).stat().st_size <= 2 * 4096
    file = opened(tmp_path)
    assert [one.slot for one in file.entries(4)] == [0, 1]
    file.close()


@pytest.mark.parametrize(("key", "page_bytes"), [(bytes(32), PAGE_BYTES), (KEY, 2 * PAGE_BYTES)])
def test_pages_of_something_else_are_not_used(tmp_path: Path, key: bytes, page_bytes: int) -> None:
    file = opened(tmp_path)
    file.write(entry(0, 1), page(1))
    file.close()
    file = opened(tmp_path, key, page_bytes)
    assert file.entries(9) == []
    file.close()


def test_two_never_share_a_store(tmp_path: Path) -> None:
    file = opened(tmp_path)
    with pytest.raises(KvFileError, match=r"index\.kv: another process uses it"):
        opened(tmp_path)
    file.close()
    opened(tmp_path).close()


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(KvFileError, match=r"nowhere.*No such file"):
        opened(tmp_path / "nowhere")
    (tmp_path / INDEX).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KvFileError, match=r"index\.kv"):
        opened(tmp_path)
    (tmp_path / INDEX).unlink()
    file = opened(tmp_path)
    with pytest.raises(KvFileError, match=r"pages\.kv: ends at byte 4096, within slot 1"):
        file.read(1, page(0))
    file.close()


def check(directory: Path, known: dict[int, list[int]]) -> None:
    """Every page that can still be read is one that was written into its slot, as `known` lists them."""
    file = opened(directory)
    into = np.zeros(PAGE_BYTES, np.uint8)
    for one in file.entries(8):
        seeds = [seed for seed in known[one.slot] if facts(one)[:4] == facts(entry(one.slot, seed))[:4]]
        assert len(seeds) == 1
        try:
            file.read(one.slot, into)
        except KvFileError:
            continue
        assert checksum(into) != one.checksum or np.array_equal(into, page(seeds[0]))
    file.close()


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from([INDEX, PAGES]),
    place=st.integers(0, 1 << 20),
    flip=st.integers(1, 255),
    cut=st.booleans(),
)
def test_altered_files_give_no_altered_page(name: str, place: int, flip: int, cut: bool) -> None:
    with TemporaryDirectory() as directory:
        file = opened(Path(directory))
        for slot in range(3):
            file.write(entry(slot, slot), page(slot))
        file.close()
        path = Path(directory) / name
        data = bytearray(path.read_bytes())
        place %= len(data)
        if cut:
            del data[place:]
        else:
            data[place] ^= flip
        path.write_bytes(data)
        check(Path(directory), {slot: [slot] for slot in range(3)})


@settings(deadline=None, max_examples=60)
@given(
    slots=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    dies_after=st.integers(0, 40),
    part=st.integers(0, 99),
)
def test_a_process_that_dies_anywhere_leaves_a_usable_store(
    slots: list[int], dies_after: int, part: int
) -> None:
    """Slots are written and overwritten until a write stops in the middle."""
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        file = opened(Path(directory))
        known: dict[int, list[int]] = {slot: [] for slot in range(8)}
        patch.setattr(os, "pwrite", dying(dies_after, part))
        try:
            for seed, slot in enumerate(slots):
                known[slot].append(seed)
                file.write(entry(slot, seed), page(seed))
        except OSError:
            pass
        patch.undo()
        file.close()
        check(Path(directory), known)


def dying(after: int, part: int) -> Callable[[int, bytes, int], int]:
    """A pwrite that works `after` times; then it writes at most `part` bytes and fails."""
    pwrite, count = os.pwrite, 0

    def write(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            pwrite(descriptor, data[:part], offset)
            raise OSError(5, "killed")
        return pwrite(descriptor, data, offset)

    return write


@settings(deadline=None, max_examples=40)
@given(used=st.integers(0, 2**64 - 1), count=st.integers(0, 2**32 - 1), slot=st.integers(0, 7))
def test_records_made_up_by_somebody_are_used_or_left_alone(used: int, count: int, slot: int) -> None:
    """Their checksums are right, because anybody can calculate one."""
    with TemporaryDirectory() as directory:
        opened(Path(directory)).close()
        body = struct.pack(f"<{DIGEST_BYTES}sQI", bytes(DIGEST_BYTES), checksum(page(0)), count)
        body += packed(range(PAGE_TOKENS))
        record = struct.pack("<Q", used) + body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
        with (Path(directory) / INDEX).open("ab") as stream:
            stream.write(bytes(slot * len(record)) + record)
        disk = KvDisk(opened(Path(directory)), 8)
        known = [Save(seed, bytes([seed]) * DIGEST_BYTES, packed([seed, 2, 3, 4])) for seed in range(1, 10)]
        disk.close(known, page)
        assert disk.pages_written == 8
        again = KvDisk(opened(Path(directory)), 8)
        assert [entry.tokens for entry in again.index.entries()][::-1] == [save.tokens for save in known[:8]]
        again.close([], page)


def test_little_of_what_is_written_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system keeps written pages in memory until they are on the disk."""
    waiting, most = 0, 0
    write, sync = os.pwrite, os.fsync

    def written(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal waiting, most
        waiting += (count := write(descriptor, data, offset))
        most = max(most, waiting)
        return count

    def synced(descriptor: int) -> None:
        nonlocal waiting
        waiting = 0
        sync(descriptor)

    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(os, "fsync", synced)
    file = KvFile(tmp_path, bytes(32), 3 * SYNC_BYTES // 2, 4)
    large = np.zeros(file.page_bytes, np.uint8)
    for slot in range(4):
        file.write(entry(slot, slot), large)
    file.sync()
    file.close()
    assert waiting == 0
    assert most < 2 * SYNC_BYTES


def test_nothing_of_what_is_read_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not read ahead either: that would be megabytes beyond each page, which no budget counts."""
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *advice: told.append(advice))
    file = KvFile(tmp_path, bytes(32), 3 * SYNC_BYTES // 2, 4)
    assert told == [(0, 0, os.POSIX_FADV_RANDOM)]
    large = np.ones(file.page_bytes, np.uint8)
    for slot in range(2):
        file.write(entry(slot, slot), large)
    file.sync()
    told.clear()
    file.read(1, into := np.zeros_like(large))
    file.close()
    assert np.array_equal(into, large)
    start = file.page_bytes
    assert told == [(at, SYNC_BYTES, os.POSIX_FADV_DONTNEED) for at in (start, start + SYNC_BYTES)]


def test_a_use_that_nobody_counted_to_is_damage(tmp_path: Path) -> None:
    file = opened(tmp_path)
    for slot, used in enumerate((MOST_USED - 1, MOST_USED)):
        one = entry(slot, 6)
        one.used = used
        file.write(one, page(6))
    file.close()
    again = opened(tmp_path)
    assert [(one.slot, one.used) for one in again.entries(10)] == [(0, MOST_USED - 1)]
    again.close()
