"""`blocks.bin` while it is written: extent after extent through two buffers, one hashed and written by a thread while
the other is filled.

Writes past the page cache where the system can (O_DIRECT): more than twice as fast as writing and waiting for the disk,
and nothing stays in memory that a budget would be charged for. Does not know what is in an extent.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from shoal.kernels.arrays import Bytes
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.direct_io import forget_cached, open_direct
from shoal.partition.spec import BlockId

from .manifest import PAGE_BYTES
from .pack import Pack

BUFFER_BYTES = 8 << 20


class PackFile:
    """The file at `path`, made if there is none, `nbytes` long and with room for them on the disk.

    Everything raises OSError when the disk fails or is full.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._descriptor, self._direct = open_direct(path, os.O_RDWR | os.O_CREAT)
        self._buffer, self._other = _pages(BUFFER_BYTES), _pages(BUFFER_BYTES)
        self._thread = ThreadPoolExecutor(1, "pack")
        self._pending: Future[None] | None = None
        try:
            if hasattr(os, "posix_fallocate") and nbytes:
                os.posix_fallocate(self._descriptor, 0, nbytes)  # a full disk shows now, not in an hour
            os.ftruncate(self._descriptor, nbytes)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, nbytes: int, parts: Iterable[Bytes]) -> str:
        """Writes `parts`, one after the other from `offset` on, and zeros after them up to `nbytes`, both
        multiples of 4096. → xxh3_64 of all in hex
        """
        digest = xxhash.xxh3_64()
        done = filled = 0
        for part in parts:
            while len(part):
                taken = min(len(part), BUFFER_BYTES - filled)
                self._buffer[filled : filled + taken] = part[:taken]
                part, filled = part[taken:], filled + taken
                if filled == BUFFER_BYTES:
                    self._flush(offset + done, filled, digest)
                    done, filled = done + filled, 0
        rest = nbytes - done
        assert filled <= rest < filled + PAGE_BYTES, (filled, rest)
        self._buffer[filled:rest] = 0
        self._flush(offset + done, rest, digest)
        self._wait()
        return digest.hexdigest()

    def checksum(self, offset: int, nbytes: int) -> str:
        """xxh3_64, in hex, of what the file has there. Raises OSError."""
        return stored_checksum(self._descriptor, self._direct, self._buffer, offset, nbytes)

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        os.close(self._descriptor)

    def __enter__(self) -> PackFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self, offset: int, nbytes: int, digest: xxhash.xxh3_64) -> None:
        self._wait()
        if nbytes:
            self._pending = self._thread.submit(self._put, self._buffer[:nbytes], offset, digest)
            self._buffer, self._other = self._other, self._buffer

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _put(self, chunk: Bytes, offset: int, digest: xxhash.xxh3_64) -> None:
        view = chunk.data
        digest.update(view)
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], offset + done)
        if not self._direct:
            os.fdatasync(self._descriptor)
            forget_cached(self._descriptor, offset, len(view))


def stored_checksum(descriptor: int, direct: bool, buffer: Bytes, offset: int, nbytes: int) -> str:
    """xxh3_64, in hex, of what a file has there, read through `buffer`. Raises OSError."""
    digest = xxhash.xxh3_64()
    for start in range(offset, offset + nbytes, len(buffer)):
        view = buffer[: min(len(buffer), offset + nbytes - start)].data
        if os.preadv(descriptor, [view], start) != len(view):
            raise OSError(errno.EIO, "the file ends too early")
        if not direct:
            forget_cached(descriptor, start, len(view))
        digest.update(view)
    return digest.hexdigest()


def damaged_blocks(pack: Pack, progress: BytesDone = unheard) -> list[BlockId]:
    """Reads all of a pack: the blocks whose bytes are not those that were written, or cannot be read. `progress(bytes
    done, in all)`. A tied embedding is its head's slices. Raises OSError where it cannot be opened.
    """
    descriptor, direct = open_direct(pack.path, os.O_RDONLY)
    buffer = _pages(BUFFER_BYTES)
    damaged = []
    try:
        for item in pack.manifest.blocks:
            progress(item.offset, pack.manifest.nbytes)
            if item.block.kind == "embed" and pack.tied:
                continue
            try:
                found = stored_checksum(descriptor, direct, buffer, item.offset, item.nbytes)
            except OSError:
                found = None
            if found != item.checksum:
                damaged.append(item.block)
    finally:
        os.close(descriptor)
    return damaged


def _pages(nbytes: int) -> Bytes:
    """Memory that begins at a page, as direct writes want it."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
