"""Moving a model's bytes into the store: hashed as they pass, with a full disk told in one clear line.

Knows files, hashes and free space. Does not know where bytes come from nor what a model is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from shoal.daemon.errors import DaemonError
from shoal.daemon.progress import Progress, no_progress
from shoal.daemon.sizes import format_bytes

COPIED_AT_ONCE_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def disk_full(directory: Path, needed_bytes: int, what: str) -> DaemonError:
    """The error for a disk without room; `needed_bytes` 0 = not known."""
    needed = f"{what} needs {format_bytes(needed_bytes)}" if needed_bytes else f"{what} does not fit"
    free = shutil.disk_usage(directory).free
    return DaemonError(
        "resources",
        f"the disk is full: {needed}, {directory} has {format_bytes(free)} free",
        "free some space or set SHOAL_HOME to another disk",
    )


def check_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raises DaemonError `resources` when the disk of `directory` has less than `needed_bytes` free."""
    if shutil.disk_usage(directory).free < needed_bytes:
        raise disk_full(directory, needed_bytes, what)


@contextmanager
def disk_errors(directory: Path, needed_bytes: int, what: str) -> Iterator[None]:
    """Errors of the disk inside become DaemonErrors: `resources` when it is full, else `internal`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(directory, needed_bytes, what) from error
        place = error.filename or directory
        raise DaemonError("internal", f"{what}: {place}: {error.strerror or error}") from error


def copy_hashed(
    source: Readable, target: BinaryIO | None, digest: Hash, copied: Callable[[int], None]
) -> None:
    """Copy to the end of `source`, or only hash. `copied` is told after every chunk how many bytes that are so far."""
    done = 0
    while chunk := source.read(COPIED_AT_ONCE_BYTES):
        if target is not None:
            target.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        copied(done)


def sync(file: BinaryIO) -> None:
    """Wait until the disk has what was written."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_file(path: Path, progress: Progress = no_progress, what: str = "") -> str:
    """sha256 of a file, in hex. Raises OSError."""
    digest, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        copy_hashed(file, None, digest, lambda done: progress(what or path.name, done, total))
    return digest.hexdigest()
