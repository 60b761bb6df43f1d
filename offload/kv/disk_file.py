"""The files of KV pages on disk: `pages.kv`, slots of equal size, and `index.kv`, a record for each slot.

Knows bytes and how they may be damaged. A record has a checksum of itself and one of its page, and is cleared before
its slot is overwritten: whatever a crash, another program or the disk leaves behind, a page that can be read is the one
that was written. The disk is waited for only so that little of what is written stays in memory. Which page is where,
and why, is the business of `kv_disk_index`.

index.kv: header, then a record of fixed size for each slot, all zeros where there is none (numbers little-endian, token
ids as the machine has them):
    header  magic 8, fingerprint 32, bytes of a page u64, tokens of a page u32, xxh3_64 of these u64
    record  used u64, parent 32, checksum u64, count of tokens u32, tokens i32 each (filled up with zeros), xxh3_64 of
            all after `used` u64
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

import xxhash

from shoal.kernels.arrays import Bytes
from shoal.offload.direct_io import forget_cached
from shoal.offload.errors import KvFileError

from .disk_index import DIGEST_BYTES, TOKEN_BYTES, Entry

KV_MAGIC = b"shoalkv1"
PAGES, INDEX = "pages.kv", "index.kv"
MOST_USED = 1 << 62  # nobody counts so far
SYNC_BYTES = 2 << 20  # read or written until the system is told to forget it: so long it is in memory twice
_ALIGN = 4096
_HEADER = struct.Struct(f"<8s{DIGEST_BYTES}sQI")
_USED = struct.Struct("<Q")
_FIXED = struct.Struct(f"<{DIGEST_BYTES}sQI")
_SUM = struct.Struct("<Q")


def checksum(page: Bytes) -> int:
    """xxh3_64 of a page, (bytes of a page,)."""
    return xxhash.xxh3_64_intdigest(page.data)


def slots_within(nbytes: int, page_bytes: int, page_tokens: int) -> int:
    """How many pages the two files hold in `nbytes` of a disk."""
    return max(0, nbytes - 2 * _ALIGN) // (_slot_bytes(page_bytes) + _record_bytes(page_tokens))


def _slot_bytes(page_bytes: int) -> int:
    return -(-page_bytes // _ALIGN) * _ALIGN


def _record_bytes(page_tokens: int) -> int:
    return _USED.size + _FIXED.size + page_tokens * TOKEN_BYTES + _SUM.size


class KvFile:
    """The two files in `directory`, private and locked as long as they are open. What does not fit is started anew.

    fingerprint: 32 bytes; pages of another model or layout must have another. Raises KvFileError, also when somebody
    else has them open.
    """

    def __init__(self, directory: Path, fingerprint: bytes, page_bytes: int, page_tokens: int) -> None:
        self.page_bytes = page_bytes
        self._slot_bytes = _slot_bytes(page_bytes)
        self._tokens_bytes = page_tokens * TOKEN_BYTES
        self._record_bytes = _record_bytes(page_tokens)
        header = _HEADER.pack(KV_MAGIC, fingerprint, page_bytes, page_tokens)
        self._unsynced_bytes = 0
        self._header = header + _SUM.pack(xxhash.xxh3_64_intdigest(header))
        self._index_path, self._pages_path = directory / INDEX, directory / PAGES
        with contextlib.ExitStack() as stack:
            try:
                self._index = _open(self._index_path, stack)
                self._pages = _open(self._pages_path, stack)
                if hasattr(os, "posix_fadvise"):
                    # Reading ahead would fill memory with pages that nobody asked for.
                    os.posix_fadvise(self._pages, 0, 0, os.POSIX_FADV_RANDOM)
                fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(self._index), self._index_path.stat()):
                    raise KvFileError(f"{self._index_path}: was removed while it was opened")
                if os.pread(self._index, len(self._header), 0) != self._header:
                    os.ftruncate(self._index, 0)
                    os.ftruncate(self._pages, 0)
                    os.pwrite(self._index, self._header, 0)
                os.utime(self._index)
            except BlockingIOError as error:
                raise KvFileError(f"{self._index_path}: another process uses it") from error
            except OSError as error:
                raise KvFileError(f"{error.filename or self._index_path}: {error.strerror}") from error
            stack.pop_all()

    def entries(self, slots: int) -> list[Entry]:
        """What the first `slots` slots hold, as far as their records are whole; the file is cut after them."""
        size, begin = self._record_bytes, len(self._header)
        try:
            self.cut(slots)
            with self._index_path.open("rb") as stream:
                records = stream.read()[begin:]
        except OSError as error:
            raise KvFileError(f"{self._index_path}: {error.strerror}") from error
        found = (self._entry(slot, records[slot * size :][:size]) for slot in range(len(records) // size))
        return [entry for entry in found if entry is not None]

    def cut(self, slots: int) -> None:
        """Cut the files off after `slots` slots. Raises OSError."""
        os.ftruncate(self._index, min(os.fstat(self._index).st_size, self._record_at(slots)))
        os.ftruncate(self._pages, min(os.fstat(self._pages).st_size, slots * self._slot_bytes))

    def read(self, slot: int, into: Bytes) -> None:
        """Fill `into`, (page_bytes,), with a slot's page, whatever it is. Raises KvFileError."""
        start = slot * self._slot_bytes
        view = into.data
        done = 0
        try:
            while done < len(view):
                got = os.preadv(self._pages, [view[done : done + SYNC_BYTES]], start + done)
                if not got:
                    raise KvFileError(f"{self._pages_path}: ends at byte {start + done}, within slot {slot}")
                forget_cached(self._pages, start + done, SYNC_BYTES)
                done += got
        except OSError as error:
            raise KvFileError(f"{self._pages_path}: slot {slot}: {error.strerror}") from error

    def write(self, entry: Entry, page: Bytes) -> None:
        """Put a page into its slot. Raises OSError, and leaves the slot empty then."""
        self.clear(entry.slot)
        start = entry.slot * self._slot_bytes
        for done in range(0, len(page), SYNC_BYTES):
            part = page.data[done : done + SYNC_BYTES]
            _write(self._pages, part, start + done)
            self._unsynced_bytes += len(part)
            if self._unsynced_bytes >= SYNC_BYTES:
                self.sync()
        tokens = entry.tokens
        body = _FIXED.pack(entry.parent, entry.checksum, len(tokens) // TOKEN_BYTES)
        body += tokens.ljust(self._tokens_bytes, b"\0")
        record = _USED.pack(entry.used) + body + _SUM.pack(xxhash.xxh3_64_intdigest(body))
        _write(self._index, memoryview(record), self._record_at(entry.slot))
        entry.stored_used = entry.used

    def clear(self, slot: int) -> None:
        """The slot holds nothing any more. Raises OSError."""
        at = self._record_at(slot) + self._record_bytes - _SUM.size
        _write(self._index, memoryview(bytes(_SUM.size)), at)

    def store_used(self, entry: Entry) -> None:
        """Note when a page was used last. Raises OSError."""
        _write(self._index, memoryview(_USED.pack(entry.used)), self._record_at(entry.slot))
        entry.stored_used = entry.used

    def sync(self) -> None:
        """Wait until what was written is on the disk, and leave nothing of it in the system's page cache.
        Raises OSError."""
        self._unsynced_bytes = 0
        os.fsync(self._pages)
        forget_cached(self._pages)

    def close(self) -> None:
        """Whatever comes after is an OSError, not another file's trouble."""
        for descriptor in (self._pages, self._index):
            os.close(descriptor)
        self._pages = self._index = -1

    def _record_at(self, slot: int) -> int:
        return len(self._header) + slot * self._record_bytes

    def _entry(self, slot: int, record: bytes) -> Entry | None:
        """None where a record is empty or damaged."""
        body = record[_USED.size : -_SUM.size]
        if _SUM.unpack(record[-_SUM.size :])[0] != xxhash.xxh3_64_intdigest(body):
            return None
        parent, sum_, count = _FIXED.unpack_from(body)
        if not 0 < count * TOKEN_BYTES <= self._tokens_bytes:
            return None
        used = _USED.unpack_from(record)[0]  # not a part of the checksum, as it is written alone
        if used >= MOST_USED:
            return None
        tokens = body[_FIXED.size :][: count * TOKEN_BYTES]
        return Entry(slot, parent, tokens, sum_, used, used)


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
