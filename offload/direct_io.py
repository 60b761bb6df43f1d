"""Direct reads: bytes of a file into memory past the page cache, so that reading costs no memory but its target.

Knows O_DIRECT (macOS: F_NOCACHE) and what to do where a file system refuses it: buffered reads whose pages are given
back at once. Offsets, sizes and addresses are multiples of 4 KiB. `preadv` releases the interpreter lock, so threads
overlap; which reads are under way together is the caller's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import warnings
from pathlib import Path

from shoal.kernels.arrays import Bytes

from .errors import StoreError

DIRECT_ALIGN_BYTES = 4096


class DirectFile:
    """A file open for direct reads. For any thread. Raises StoreError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
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
        """Fills `into`, (n,), from byte `offset`. Raises OSError; EOFError when the file ends before."""
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
        """When somebody wrote to it last. Raises OSError."""
        return os.fstat(self._file).st_mtime_ns

    def close(self) -> None:
        """Idempotent; no read may be under way."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor, and whether it passes the page cache by; a new file is for this user alone. Raises OSError."""
    flags |= os.O_CLOEXEC
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        with contextlib.suppress(OSError):  # a file system without it, if not worse
            file = os.open(path, flags | direct, 0o600)
            try:  # some take the flag and refuse the reads
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
    """Bytes of a file leave the page cache, as far as the system can; up to its end for 0 bytes."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
