"""The second tier of the prefix cache: KV pages on disk.

Pages that leave memory are copied, and a thread writes the copies. Nobody waits for this thread: when it lags, pages
are dropped. The thread that wants a page again reads it itself, which takes a few milliseconds. No failure here reaches
a request: the page is computed again, and the log gets a line. This module knows bytes; `prefix_cache` knows what they
mean, and `engine.learn` when reading pays.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.offload.errors import KvFileError

from .disk_file import SYNC_BYTES, KvFile, checksum
from .disk_index import DIGEST_BYTES, Entry, KvIndex, Slot
from .prefix_cache import Put, Save
from .write_behind import WriteBehind, queue_pages

__all__ = ["KvDisk", "buffer_bytes", "queue_pages"]

log = logging.getLogger(__name__)

FLUSH_LIMIT_S = 10.0


def buffer_bytes(page_bytes: int) -> int:
    """Memory that a `KvDisk` takes: the pages that wait, one that is read, and what the system has yet to write."""
    return (queue_pages(page_bytes) + 1) * page_bytes + 2 * SYNC_BYTES


class KvDisk:
    """At most `slots` pages in `file`. One thread places, puts, saves and reads; any thread may call the rest.

    secret: under which other ranks are told digests of texts; b"" if nobody is told any.
    """

    def __init__(self, file: KvFile, slots: int, secret: bytes = b"") -> None:
        self.index = KvIndex(slots, file.entries(slots))
        self.page_bytes = file.page_bytes
        self.pages_read = 0
        self.pages_written = 0
        self.pages_dropped = 0  # because the writer lagged
        self._file = file
        self._secret = secret
        self._own_slots = self._most_slots = slots
        self._reading = np.empty(self.page_bytes, np.uint8)
        self._placed: dict[int, tuple[Entry, Bytes]] = {}  # by slot: what will be put there, and room for it
        self._complained = False
        self.closed = False
        self._writing = threading.Lock()  # held while the files change size
        self._behind = WriteBehind[Save | Entry](self.page_bytes, self._write)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages on disk."""
        return len(self.index) * self.page_bytes

    @property
    def most_reads(self) -> int:
        """How many pages one step may read. The pages that they push out of memory must find room to wait."""
        return max(1, queue_pages(self.page_bytes) // 2)

    def resize(self, slots: int) -> None:
        """Keep at most `slots` pages from now on."""
        with self._writing:
            if not self.closed:
                self._own_slots = slots
                self.index.resize(min(slots, self._most_slots))
                try:
                    self._file.cut(slots)
                except OSError as error:
                    self._complain(error)

    def bound(self, slots: int) -> None:
        """Other ranks have room for `slots` pages now: use no slots beyond, however many there are here. Never waits
        for the disk."""
        if slots != self._most_slots:
            self._most_slots = slots
            self.index.resize(min(slots, self._own_slots))

    def told(self, entry: Entry) -> Slot:
        """Where a page lies, for other ranks. Whoever has no more than that cannot find out what its text is by trying
        texts: what the digest is made with stays here."""
        return Slot(entry.slot, self._sealed(entry.digest))

    def _sealed(self, digest: bytes) -> bytes:
        if not self._secret:
            return digest
        return blake2b(digest, key=self._secret, digest_size=DIGEST_BYTES).digest()

    def place(self, what: Save, wait_s: float = 0.0) -> Put | None:
        """Decide where a page will lie, so that every rank of a group can put its part of it there. None when it is
        there already, or dropped because there was no room for `wait_s`. What is placed has to be `put`."""
        if self.index.touch(what.parent, what.tokens):
            return None
        if (buffer := self._behind.buffer(wait_s)) is None:
            self.pages_dropped += 1
            return None
        if (entry := self.index.claim(what.parent, what.tokens, 0)) is None:
            self._behind.give_back(buffer)
            return None
        self._placed[entry.slot] = entry, buffer
        return Put(what.page, *self.told(entry))

    def put(self, put: Put, page: Bytes, wait_s: float = 0.0) -> None:
        """Copy `page`, (bytes of a page,), for the writer: it was placed, so there is room."""
        entry, buffer = self._placed.pop(put.slot)
        self._behind.push(entry, page, buffer)

    def save(self, what: Save, page: Bytes, wait_s: float = 0.0) -> bool:
        """Copy `page`, (bytes of a page,), for the writer, who finds a place for it. False when the page is dropped,
        because there was no room for `wait_s`."""
        if (buffer := self._behind.buffer(wait_s)) is None:
            self.pages_dropped += 1
            return False
        self._behind.push(what, page, buffer)
        return True

    def disown(self, entry: Entry) -> None:
        """Forget a page that another rank could not read."""
        self.index.forget(entry)

    def read(self, entries: Sequence[Entry], into: Sequence[Bytes]) -> int:
        """Fill pages, (bytes of a page,) each, with the entries of a text in order, until one fails. Returns how many
        pages were filled."""
        count = 0
        for entry, page in zip(entries, into, strict=True):
            if not self._read(entry, page):
                break
            count += 1
        self._touch(entries[:count])
        self.pages_read += count
        return count

    def _read(self, entry: Entry, into: Bytes) -> bool:
        """False when the page cannot be read; `into` is unchanged then."""
        try:
            self._file.read(entry.slot, self._reading)
            if checksum(self._reading) != entry.checksum:
                raise KvFileError(f"slot {entry.slot} of the KV pages on disk has been altered")
        except KvFileError as error:
            if self.index.holds(entry):  # otherwise another page has just taken the slot
                log.warning("%s; the page is computed again", error)
                with contextlib.suppress(OSError):
                    self._file.clear(entry.slot)
                self.index.forget(entry)
            return False
        into[:] = self._reading
        return True

    def worth_keeping(self, known: Sequence[Save]) -> Sequence[Save]:
        """Of the `known` pages of memory, the most recently used first, those that there are slots for. They count as
        used just now, or else writing one might push out another."""
        kept = known[: self.index.slots]
        self._touch(kept)
        return kept

    def close(
        self, known: Sequence[Save], page: Callable[[int], Bytes] | None, limit_s: float = FLUSH_LIMIT_S
    ) -> None:
        """Write the `known` pages of memory, as far as there are slots and time, and close the file. `known` has the
        most recently used first; `page` gives a page's bytes by its number, or is None if all have been put here that
        are to be. Idempotent."""
        with self._writing:
            if self.closed:
                return
            self.closed = True
        kept = self.worth_keeping(known)
        try:
            if page is not None:
                self._save_all(kept, page, limit_s)
        finally:  # also if there are no pages any more
            self._end(kept)

    def _end(self, kept: Sequence[Save]) -> None:
        if not self._behind.end():
            return
        self._touch(kept)
        try:
            self._file.sync()
            for entry in self.index.entries():
                if entry.used != entry.stored_used:
                    self._file.store_used(entry)
        except OSError as error:
            self._complain(error)
        self._file.close()

    def _save_all(self, pages: Sequence[Save], page: Callable[[int], Bytes], limit_s: float) -> None:
        ends_s = time.monotonic() + limit_s
        for save in pages:
            if self.index.touch(save.parent, save.tokens):
                continue
            if not self.save(save, page(save.page), max(0.0, ends_s - time.monotonic())):
                break

    def _touch(self, pages: Sequence[Save | Entry]) -> None:
        """Note that pages were used just now. The last goes first, so that no page is newer than the text before it."""
        for page in reversed(pages):
            self.index.touch(page.parent, page.tokens)

    # --- the writer ----------------------------------------------------------------------------------------

    def _write(self, what: Save | Entry, page: Bytes) -> None:
        with self._writing:
            known = self.index.touch(what.parent, what.tokens)
            if isinstance(what, Entry):
                entry: Entry | None = what
                what.checksum = checksum(page)
                if known or what.slot >= self.index.slots:
                    self.index.release(what)
                    return
            else:
                entry = None if known else self.index.claim(what.parent, what.tokens, checksum(page))
            if entry is None:
                return
            try:
                self._file.write(entry, page)
                self.index.add(entry)
                self.pages_written += 1
            except OSError as error:
                self.index.refuse(entry)
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        """Warns once, since a full disk stays full for a while."""
        if not self._complained:
            self._complained = True
            log.warning(
                "KV pages cannot be written to disk: %s; those that are there are used", error.strerror
            )
