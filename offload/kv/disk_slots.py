"""KV pages on disk of a rank that does not decide: rank 0 says in which slots they lie.

A rank has the K and V of its own heads, in a file of its own, at the slots of rank 0's. A digest tells what a slot
holds. So a page that this rank has lost, or not written yet, is one that it cannot read, and then no rank counts it as
read. Knows neither texts nor token ids.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.offload.errors import KvFileError

from .disk_file import KvFile, checksum
from .disk_index import Entry, Slot, packed
from .prefix_cache import Put, Save
from .write_behind import WriteBehind

log = logging.getLogger(__name__)

_NO_TOKENS = packed([0])  # a record has at least one; the digest says all that we know


class KvSlots:
    """At most `slots` pages in `file`. One thread calls `put` and `read`, any thread the rest. `resized` is called
    when `slots` has changed."""

    def __init__(self, file: KvFile, slots: int) -> None:
        self.slots = self._most_slots = slots
        self.resized: Callable[[], None] = lambda: None
        self.page_bytes = file.page_bytes
        self.closed = False
        self.pages_read = self.pages_written = self.pages_dropped = 0
        self._file = file
        self._held = {entry.slot: entry for entry in file.entries(slots)}
        self._reading = np.empty(file.page_bytes, np.uint8)
        self._behind = WriteBehind[Slot](file.page_bytes, self._write)
        self._complained = False
        self._writing = threading.Lock()  # held while the files change size

    @property
    def nbytes(self) -> int:
        """Bytes of the pages on disk."""
        return len(self._held) * self.page_bytes

    def resize(self, slots: int) -> None:
        """Have `slots` slots from now on, but no more than there were at first."""
        slots = min(slots, self._most_slots)
        with self._writing:
            if self.closed or slots == self.slots:
                return
            self.slots = slots
            for slot in [slot for slot in [*self._held] if slot >= slots]:
                self._held.pop(slot, None)
            with contextlib.suppress(OSError):
                self._file.cut(slots)
        self.resized()

    def worth_keeping(self, known: Sequence[Save]) -> Sequence[Save]:
        raise AssertionError("rank 0 decides what is kept")

    def place(self, what: Save, wait_s: float = 0.0) -> Put | None:
        raise AssertionError("rank 0 decides where pages lie")

    def put(self, put: Put, page: Bytes, wait_s: float = 0.0) -> None:
        """Copy a page, (bytes of a page,), for the writer; it is dropped if there is no room for `wait_s`."""
        buffer = self._behind.buffer(wait_s) if put.slot < self.slots else None
        if buffer is None:
            self.pages_dropped += 1
        else:
            self._behind.push(Slot(put.slot, put.digest), page, buffer)

    def read(self, places: Sequence[Slot | Entry], into: Sequence[Bytes]) -> int:
        """Fill pages, (bytes of a page,) each, in order, until one fails. Returns how many were filled."""
        for count, (place, page) in enumerate(zip(places, into, strict=True)):
            if not self._read(place, page):
                return count
            self.pages_read += 1
        return len(places)

    def _read(self, place: Slot | Entry, into: Bytes) -> bool:
        held = self._held.get(place.slot)
        if held is None or held.parent != place.digest:
            return False
        try:
            self._file.read(place.slot, self._reading)
            if checksum(self._reading) != held.checksum:
                raise KvFileError(f"slot {place.slot} of the KV pages on disk has been altered")
        except KvFileError as error:
            if self._held.get(place.slot) is held:  # otherwise another page has just taken the slot
                log.warning("%s; the page is computed again", error)
                self._held.pop(place.slot, None)
                with contextlib.suppress(OSError):
                    self._file.clear(place.slot)
            return False
        into[:] = self._reading
        return True

    def disown(self, entry: Slot | Entry) -> None:
        """Rank 0 forgets such a page. Here the next one in its slot replaces it."""

    def close(self, known: Sequence[Save], page: Callable[[int], Bytes] | None, limit_s: float = 0.0) -> None:
        """Write what waits and close the file. Idempotent. Rank 0 has said before what else is worth keeping."""
        with self._writing:
            if self.closed:
                return
            self.closed = True
        if self._behind.end():
            with contextlib.suppress(OSError):
                self._file.sync()
            self._file.close()

    def _write(self, place: Slot, page: Bytes) -> None:
        with self._writing:
            if place.slot >= self.slots:
                return
            self._held.pop(place.slot, None)
            entry = Entry(place.slot, place.digest, _NO_TOKENS, checksum(page))
            try:
                self._file.write(entry, page)
            except OSError as error:
                self._complain(error)
            else:
                self._held[place.slot] = entry
                self.pages_written += 1
                return
        self.resize(max(self._held, default=-1) + 1)  # the file does not grow any more

    def _complain(self, error: OSError) -> None:
        """Warns once, since a full disk stays full for a while."""
        if not self._complained:
            self._complained = True
            log.warning(
                "KV pages cannot be written to disk: %s; those that are there are used", error.strerror
            )
