"""Reads and writes that bypass the page cache, so that they cost no memory but their target.

Knows O_DIRECT (macOS: F_NOCACHE). Where a file system refuses it, reads are buffered and their pages are given back at
once. Offsets, sizes and addresses are multiples of 4 KiB. `preadv` releases the interpreter lock, so threads overlap;
the caller decides which reads run at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import warnings
from pathlib import Path

from shoal.kernels.arrays import Bytes

from .errors import StoreError

DIRECT_ALIGN_BYTES = 4096


class DirectFile:
    """A file that is open for direct reads, for any thread. Raises StoreError when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file, self.direct = open_direct(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        if not self.direct:
            warnings.warn(
                f"{path}: its file system has no direct reads; reading through the page cache, which is slower",
                RuntimeWarning,
                stacklevel=2,
            )

    def read(self, offset: int, into: Bytes) -> None:
        """Fills `into`, (n,), from byte `offset`. Raises OSError, or EOFError when the file ends too early."""
        target = into.data
        done = 0
        while done < len(target):
            got = os.preadv(self._file, [target[done:]], offset + done)
            if got <= 0:
                raise EOFError(f"the file ends at byte {offset + done}")
            done += got
            if self.direct and done % DIRECT_ALIGN_BYTES and done < len(target):
                raise EOFError(f"the file ends at byte {offset + done}")
        if not self.direct:
            forget_cached(self._file, offset, len(target))

    def written_ns(self) -> int:
        """When the file was last written to. Raises OSError."""
        return os.fstat(self._file).st_mtime_ns

    def close(self) -> None:
        """To be called once, when no read is under way."""
        os.close(self._file)


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor, and whether it bypasses the page cache. A file that is made is private. Raises OSError."""
    flags |= os.O_CLOEXEC
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        with contextlib.suppress(OSError):  # the file system may not have it
            file = os.open(path, flags | direct, 0o600)
            try:  # some file systems take the flag and refuse the reads
                with mmap.mmap(-1, DIRECT_ALIGN_BYTES) as page:
                    os.preadv(file, [page], 0)
                return file, True
            except OSError:
                os.close(file)
    file = os.open(path, flags, 0o600)
    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        return file, True
    return file, False


def forget_cached(descriptor: int, offset: int = 0, nbytes: int = 0) -> None:
    """Takes bytes of a file out of the page cache, where the system can do that; 0 bytes mean up to the file's end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at byte `offset` of a file. Raises OSError."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
