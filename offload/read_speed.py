"""Measures how fast a disk streams weights, by several large direct reads at a time for a moment.

Reads as `window.readers` do. The caller decides what the figure is for.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal.kernels.huge_pages import Arena
from shoal.offload.window.readers import READ_BYTES, READERS

from .direct_io import DirectFile
from .errors import StoreError

SECONDS = 0.5


def read_speed(path: Path, seconds: float = SECONDS, read_bytes: int = READ_BYTES) -> float:
    """Bytes per second of reading `path` at this moment, so many bytes at a time; 0 if the file is too short to tell.
    Raises StoreError."""
    file = DirectFile(path)
    places = path.stat().st_size // read_bytes
    stride = max(1, places // READERS)
    until_s = time.monotonic() + seconds

    def read(first: int) -> int:
        memory, count = Arena().take(read_bytes), 0
        while time.monotonic() < until_s and count < places:
            file.read((first + count) % places * read_bytes, memory)
            count += 1
        return count

    try:
        if not places:
            return 0.0
        began_s = time.monotonic()
        with ThreadPoolExecutor(READERS) as pool:
            counts = sum(pool.map(read, range(0, stride * READERS, stride)))
        return counts * read_bytes / max(time.monotonic() - began_s, 1e-3)
    except (OSError, EOFError) as error:
        raise StoreError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    finally:
        file.close()
