"""Things that one process at a time may do, across processes.

Knows flock; the kernel frees a lock when its holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DaemonError


@contextmanager
def alone(lock: Path, doing: str) -> Iterator[None]:
    """Nobody else is within the same `lock`, a file that stays.

    Raises DaemonError `busy`: another process is `doing`.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DaemonError("busy", f"another process is {doing}", "try again when it is done") from error
        yield
