"""Memory for weights and KV, in huge pages where the system has them.

Reading at the speed of memory needs huge pages: with pages of 4 KB the processor walks page tables and its
prefetchers stop at every page's end. Knows how to ask for them; not what the memory is for.
"""

import contextlib
import mmap
import threading

import numpy as np

from shoal.kernels.arrays import Bytes

HUGE_BYTES = 2 << 20
CHUNK_BYTES = 32 << 20
ALIGN_BYTES = 64


class Arena:
    """Hands out memory that is taken from the system in large chunks; only what is written costs anything. A chunk
    is given back when the last array in it goes. For any thread.
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Bytes:
        """Zeros, uint8 (nbytes,), aligned to lines of the cache."""
        with self._lock:
            if nbytes > len(self._chunk):
                self._chunk = mapped(max(CHUNK_BYTES, nbytes))
            taken, self._chunk = self._chunk[:nbytes], self._chunk[-(-nbytes // ALIGN_BYTES) * ALIGN_BYTES :]
            return taken


def mapped(nbytes: int) -> Bytes:
    """Fresh memory, zeros, uint8 (at least `nbytes`,) from a huge page on; only what is written costs anything."""
    whole = -(-nbytes // HUGE_BYTES) * HUGE_BYTES
    pages = mmap.mmap(-1, whole + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    return memory[-memory.ctypes.data % HUGE_BYTES :][:whole]
