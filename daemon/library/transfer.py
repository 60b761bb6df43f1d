"""Moving a model's bytes into the store: they are hashed on the way, and a full disk is told in one clear line.

Knows files, hashes and free space. Does not know where bytes come from, nor what a model is.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from shoal.daemon.errors import NO_ROOM, DaemonError, more_room
from shoal.daemon.progress import Progress
from shoal.models.regular_files import open_regular
from shoal.partition.amounts import format_bytes

if TYPE_CHECKING:
    from _typeshed import SupportsRead

COPIED_AT_ONCE_BYTES = 1 << 20


class Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def disk_full(directory: Path, needed_bytes: int, what: str, number: int = errno.ENOSPC) -> DaemonError:
    """The error for a disk without room; `needed_bytes` 0 = not known. `number`: of `NO_ROOM`."""
    needed = f"{what} needs {format_bytes(needed_bytes)}" if needed_bytes else f"{what} does not fit"
    free = shutil.disk_usage(directory).free
    return DaemonError(
        "resources",
        f"{'a file is too large' if number == errno.EFBIG else 'the disk is full'}: {needed}, {directory} has "
        f"{format_bytes(free)} free",
        f"{more_room(number)} or set SHOAL_HOME to another disk",
    )


def disk_bytes(directory: Path) -> int:
    """What the files in a directory take on the disk. Raises OSError."""
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir() if file.is_file())


def check_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raises DaemonError `resources` when the disk of `directory` has less than `needed_bytes` free."""
    if shutil.disk_usage(directory).free < needed_bytes:
        raise disk_full(directory, needed_bytes, what)


@contextmanager
def disk_errors(directory: Path, needed_bytes: int, what: str) -> Iterator[None]:
    """Within it, an OSError becomes a DaemonError: `resources` when the disk is full, else `internal`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise disk_full(directory, needed_bytes, what, error.errno) from error
        place = error.filename or directory
        raise DaemonError("internal", f"{what}: {place}: {error.strerror or error}") from error


def copy_hashed(
    source: SupportsRead[bytes],
    target: BinaryIO | None,
    copied: Callable[[int], None],
    digest: Hash | None = None,
) -> str:
    """Copy to the end of `source`; without a `target`, only hash it. Returns the sha256 in hex, which goes on from what
    `digest` has had. After each chunk `copied` gets the number of bytes so far."""
    digest = digest or hashlib.sha256()
    done = 0
    while chunk := source.read(COPIED_AT_ONCE_BYTES):
        if target is not None:
            target.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        copied(done)
    return digest.hexdigest()


def hash_file(path: Path, progress: Progress, what: str) -> str:
    """The sha256 of a file, in hex. `what` is what `progress` calls it. Raises OSError."""
    total = path.stat().st_size
    with open_regular(path) as file:
        return copy_hashed(file, None, lambda done: progress(what, done, total))
