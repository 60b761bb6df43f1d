"""Writing pages behind: whoever saves one copies it into a buffer and goes on; a thread writes it later.

There are few buffers, so little memory waits for the disk. Knows neither files nor what pages mean.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from shoal.kernels.arrays import Bytes

log = logging.getLogger(__name__)

QUEUE_BYTES = 32 << 20  # of pages copied and not written yet
QUEUE_PAGES = (2, 16)  # least and most
_WAIT_S = 60.0  # for the writer to end; after that we take its disk for hung

What = TypeVar("What")


def queue_pages(page_bytes: int) -> int:
    """How many pages may wait to be written."""
    return min(max(QUEUE_BYTES // page_bytes, QUEUE_PAGES[0]), QUEUE_PAGES[1])


class WriteBehind(Generic[What]):
    """`write` is called in a thread, with what was pushed and the page's bytes."""

    def __init__(self, page_bytes: int, write: Callable[[What, Bytes], None]) -> None:
        self.pages = queue_pages(page_bytes)
        self._write = write
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for _ in range(self.pages):
            self._free.put(np.empty(page_bytes, np.uint8))
        self._jobs: queue.Queue[tuple[Bytes, What] | None] = queue.Queue(self.pages + 1)
        self._thread = threading.Thread(target=self._write_all, name="shoal-kv-disk", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether everything has been written."""
        return self._free.qsize() == self.pages

    def buffer(self, wait_s: float = 0.0) -> Bytes | None:
        """Room for one page, to be pushed or given back; None if there is none for `wait_s`."""
        try:
            return self._free.get(timeout=wait_s)
        except queue.Empty:
            return None

    def give_back(self, buffer: Bytes) -> None:
        self._free.put(buffer)

    def push(self, what: What, page: Bytes, buffer: Bytes) -> None:
        """Copy `page`, (bytes of a page,), into a buffer, for the writer."""
        buffer[:] = page
        self._jobs.put_nowait((buffer, what))

    def end(self) -> bool:
        """Wait until all is written; False if that does not end. Nothing may be pushed any more."""
        self._jobs.put_nowait(None)
        self._thread.join(_WAIT_S)
        if self._thread.is_alive():
            log.warning("writing KV pages to disk does not end; what has been written is kept")
            return False
        return True

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            buffer, what = job
            try:
                self._write(what, buffer)
            except Exception:  # our bug, but later pages are worth a try
                log.exception("a KV page was not written")
            self._free.put(buffer)
