"""Directories for this user alone, what is kept in small files of them, and what only one process at a time may do.

Knows permissions, JSON and flock; the kernel frees a lock when its holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from .errors import DaemonError

log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=Struct)


def private_dir(path: Path) -> Path:
    """Create `path` for this user alone (0700). Raises DaemonError when others could write to it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise DaemonError("resources", f"cannot create {path}: {error.strerror}", "set SHOAL_HOME") from error
    if info.st_uid != os.getuid():
        raise DaemonError(
            "bad_request", f"{path} belongs to another user", "set SHOAL_HOME to your own directory"
        )
    if stat.S_IMODE(info.st_mode) & 0o077:
        path.chmod(0o700)
    return path


@contextmanager
def alone(lock: Path, doing: str) -> Iterator[None]:
    """Within the block no other process holds `lock`, a file that stays afterwards.

    Raises DaemonError `busy` if one does; `doing` says what it does, for the message.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DaemonError("busy", f"another process is {doing}", "try again when it is done") from error
        yield


def kept(path: Path, kind: type[_Kind]) -> _Kind | None:
    """What `keep` has left there; None if there is nothing, or nothing of that kind."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None


def keep(path: Path, found: Struct) -> None:
    """Leave in a file, whole or not at all, what has been found out. If that fails, it is logged: it will be found out
    again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(msgspec.json.encode(found))
        fresh.replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
