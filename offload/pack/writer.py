"""Writes `blocks.bin`, extent after extent, through two buffers: a thread hashes and writes one while the other is
filled.

Writing bypasses the page cache where the system can do that (O_DIRECT). This is more than twice as fast as writing and
then waiting for the disk, and leaves nothing in memory that a budget would be charged for. The module does not know
what is in an extent.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from shoal.kernels.arrays import Bytes
from shoal.kernels.huge_pages import Arena
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.direct_io import forget_cached, open_direct, write_all
from shoal.partition.spec import BlockId

from .manifest import PAGE_BYTES
from .pack import Pack

BUFFER_BYTES = 8 << 20


class PackFile:
    """The file at `path`, made if there is none. It is `nbytes` long, and the disk has room for all of them.

    Every method raises OSError when the disk fails or is full.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._descriptor, self._direct = open_direct(path, os.O_RDWR | os.O_CREAT)
        memory = Arena()
        self._buffer, self._other = memory.take(BUFFER_BYTES), memory.take(BUFFER_BYTES)
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
        """Writes `parts` one after the other from `offset` on, then zeros until there are `nbytes`. Both numbers are
        multiples of 4096. → xxh3_64 of all these bytes, in hex
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
        """xxh3_64, in hex, of the bytes that the file has there."""
        return stored_checksum(self._descriptor, self._direct, self._buffer, offset, nbytes)

    def sync(self) -> None:
        """Waits until everything is on the disk."""
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
        digest.update(chunk.data)
        write_all(self._descriptor, chunk.data, offset)
        if not self._direct:
            os.fdatasync(self._descriptor)
            forget_cached(self._descriptor, offset, len(chunk))


def stored_checksum(descriptor: int, direct: bool, buffer: Bytes, offset: int, nbytes: int) -> str:
    """xxh3_64, in hex, of the bytes that a file has there. They pass through `buffer`. Raises OSError."""
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
    """Reads all of a pack. → the blocks whose bytes cannot be read or differ from those that were written. A tied
    embedding is not named besides its head's slices. Raises OSError when the pack cannot be opened.
    """
    descriptor, direct = open_direct(pack.path, os.O_RDONLY)
    buffer = Arena().take(BUFFER_BYTES)
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
