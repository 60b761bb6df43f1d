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
# Reading into the same few megabytes again and again never leaves the processor's cache, and is a fifth faster than
# reading can be for anybody who keeps what is read.
TARGET_BYTES = 64 << 20


def read_speed(
    path: Path, seconds: float = SECONDS, read_bytes: int = READ_BYTES, first_bytes: int = 1 << 62
) -> float:
    """Bytes per second of reading `path` at this moment, so many bytes at a time, of its `first_bytes` at most; 0 if
    the file is too short to tell. No byte is read twice, since whatever is behind a disk may keep it. Raises
    StoreError."""
    file = DirectFile(path)
    places = min(path.stat().st_size, first_bytes) // read_bytes
    stride = max(1, places // READERS)
    own = max(1, min(places, TARGET_BYTES // read_bytes // READERS))  # reads that a reader has memory for
    try:
        if not places:
            return 0.0
        memory = Arena().take(READERS * own * read_bytes).reshape(READERS, own, read_bytes)
        memory[:] = 0  # every page has to be there
        began_s = time.monotonic()
        until_s = began_s + seconds

        def read(reader: int) -> int:
            count = 0
            while time.monotonic() < until_s and count < stride and reader * stride + count < places:
                file.read((reader * stride + count) * read_bytes, memory[reader, count % own])
                count += 1
            return count

        with ThreadPoolExecutor(READERS) as pool:
            counts = sum(pool.map(read, range(READERS)))
        return counts * read_bytes / max(time.monotonic() - began_s, 1e-3)
    except (OSError, EOFError) as error:
        raise StoreError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    finally:
        file.close()
