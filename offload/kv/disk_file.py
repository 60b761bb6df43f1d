"""The files of KV pages on disk: `pages.kv`, slots of equal size, and `index.kv`, a record for each slot.

Knows bytes and how they may be damaged. A record has a checksum of itself and one of its page, and it is cleared before
its slot is overwritten. So whatever a crash, another program or the disk leaves behind, a page that can be read is the
one that was written. We wait for the disk only to keep little of what is written in memory. `disk_index` decides which
page lies in which slot.

index.kv has a header, then a record of fixed size for each slot; the record of an empty slot is all zeros. Numbers are
little-endian, token ids in the machine's order.
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
from shoal.offload.direct_io import forget_cached, write_all
from shoal.offload.errors import KvFileError

from .disk_index import DIGEST_BYTES, TOKEN_BYTES, Entry

KV_MAGIC = b"shoalkv1"
PAGES, INDEX = "pages.kv", "index.kv"
MOST_USED = 1 << 62  # no counter gets so far: such a record is damaged
SYNC_BYTES = 2 << 20  # after so many bytes the page cache forgets them; until then they are in memory twice
_ALIGN = 4096
_HEADER = struct.Struct(f"<8s{DIGEST_BYTES}sQI")
_USED = struct.Struct("<Q")
_SUM = struct.Struct("<Q")


def checksum(page: Bytes) -> int:
    """xxh3_64 of a page, (bytes of a page,)."""
    return xxhash.xxh3_64_intdigest(page.data)


def slots_within(nbytes: int, page_bytes: int, page_tokens: int) -> int:
    """How many pages the two files can hold in `nbytes` of a disk."""
    return max(0, nbytes - 2 * _ALIGN) // (_slot_bytes(page_bytes) + _record_bytes(page_tokens))


def _slot_bytes(page_bytes: int) -> int:
    return -(-page_bytes // _ALIGN) * _ALIGN


def _body(page_tokens: int) -> struct.Struct:
    return struct.Struct(f"<{DIGEST_BYTES}sQI{page_tokens * TOKEN_BYTES}s")


def _record_bytes(page_tokens: int) -> int:
    return _USED.size + _body(page_tokens).size + _SUM.size


class KvFile:
    """The two files in `directory`, private, and locked while they are open. Files with another header are emptied.

    fingerprint: 32 bytes, different for every model and layout of pages. Raises KvFileError, also when another process
    has the files open.
    """

    def __init__(self, directory: Path, fingerprint: bytes, page_bytes: int, page_tokens: int) -> None:
        self.directory = directory
        self.page_bytes = page_bytes
        self._slot_bytes = _slot_bytes(page_bytes)
        self._body = _body(page_tokens)
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
                    # Read-ahead would fill memory with pages that nobody asked for.
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
        """What the first `slots` slots hold, where their records are intact. The files are cut off after them."""
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
        """Fill `into`, (page_bytes,), with the bytes in a slot; they are not checked. Raises KvFileError."""
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
        """Put a page into its slot. Raises OSError; the slot is empty then."""
        self.clear(entry.slot)
        start = entry.slot * self._slot_bytes
        for done in range(0, len(page), SYNC_BYTES):
            part = page.data[done : done + SYNC_BYTES]
            write_all(self._pages, part, start + done)
            self._unsynced_bytes += len(part)
            if self._unsynced_bytes >= SYNC_BYTES:
                self.sync()
        count = len(entry.tokens) // TOKEN_BYTES
        body = self._body.pack(entry.parent, entry.checksum, count, entry.tokens)
        record = _USED.pack(entry.used) + body + _SUM.pack(xxhash.xxh3_64_intdigest(body))
        write_all(self._index, record, self._record_at(entry.slot))
        entry.stored_used = entry.used

    def clear(self, slot: int) -> None:
        """Mark the slot as empty. Raises OSError."""
        write_all(self._index, bytes(_SUM.size), self._record_at(slot + 1) - _SUM.size)

    def store_used(self, entry: Entry) -> None:
        """Write down when a page was last used. Raises OSError."""
        write_all(self._index, _USED.pack(entry.used), self._record_at(entry.slot))
        entry.stored_used = entry.used

    def sync(self) -> None:
        """Wait until all pages are on the disk, and drop them from the page cache. Raises OSError."""
        self._unsynced_bytes = 0
        os.fsync(self._pages)
        forget_cached(self._pages)

    def close(self) -> None:
        """Later calls raise OSError; they cannot touch a file that got the same descriptor."""
        for descriptor in (self._pages, self._index):
            os.close(descriptor)
        self._pages = self._index = -1

    def _record_at(self, slot: int) -> int:
        return len(self._header) + slot * self._record_bytes

    def _entry(self, slot: int, record: bytes) -> Entry | None:
        """The entry of a record; None if the record is empty or damaged."""
        body = record[_USED.size : -_SUM.size]
        if _SUM.unpack(record[-_SUM.size :])[0] != xxhash.xxh3_64_intdigest(body):
            return None
        parent, sum_, count, tokens = self._body.unpack(body)
        used = _USED.unpack_from(record)[0]  # the checksum leaves it out, because it is also written alone
        if not 0 < count * TOKEN_BYTES <= len(tokens) or used >= MOST_USED:
            return None
        return Entry(slot, parent, tokens[: count * TOKEN_BYTES], sum_, used, used)


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor
