"""Memory for weights and KV, in huge pages where the system has them.

Only huge pages are read as fast as memory allows: with pages of 4 KB the processor walks page tables, and its
prefetchers stop at the end of every page. Knows how to ask for huge pages; not what the memory is for.
"""

import contextlib
import mmap
import threading

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.partition.memory_layout import HUGE_BYTES

CHUNK_BYTES = 32 << 20
ALIGN_BYTES = 64


class Arena:
    """Takes memory from the system in large chunks and hands out parts of them. Only memory that is written to costs
    anything, in whole huge pages: of a chunk's last one, what the next array has no room in is wasted. A chunk is
    given back when the last array in it is gone. Threads may share an Arena.
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Bytes:
        """Zeros, uint8 (nbytes,), aligned to cache lines."""
        with self._lock:
            if nbytes > len(self._chunk):
                self._chunk = mapped(max(CHUNK_BYTES, nbytes))
            taken, self._chunk = self._chunk[:nbytes], self._chunk[-(-nbytes // ALIGN_BYTES) * ALIGN_BYTES :]
            return taken

    def reserve(self, nbytes: int) -> None:
        """The next arrays, of so many bytes together, get one chunk, so that nothing is wasted between them."""
        with self._lock:
            self._chunk = mapped(max(CHUNK_BYTES, nbytes))


def mapped(nbytes: int) -> Bytes:
    """Fresh memory of zeros, uint8 (at least `nbytes`,), that begins at a huge page. Only memory that is written to
    costs anything."""
    whole = -(-nbytes // HUGE_BYTES) * HUGE_BYTES
    pages = mmap.mmap(-1, whole + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    return memory[-memory.ctypes.data % HUGE_BYTES :][:whole]
