"""One daemon per socket: a locked file beside the socket, with the holder's pid in it.

Knows flock and stale socket files. Does not know ZeroMQ. The lock file is never removed: if it were, two processes
could hold locks on two files of the same name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.daemon.errors import DaemonError


def lock_path(socket_path: Path) -> Path:
    return socket_path.with_name(socket_path.name + ".lock")


@contextmanager
def socket_lock(socket_path: Path) -> Iterator[None]:
    """Within it, this process alone may listen at `socket_path`. The kernel frees the lock however the process ends.

    Removes the socket's file that a dead daemon left, and at the end its own. DaemonError when somebody listens there.
    """
    path = lock_path(socket_path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DaemonError("resources", f"cannot open {path}: {error.strerror}") from error
    try:
        _lock(descriptor, socket_path)
        _clear_stale_socket(socket_path)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            hint = "free some space, or set SHOAL_HOME to another disk"
            raise DaemonError("resources", f"cannot write {path}: {error.strerror}", hint) from error
        try:
            yield
        finally:
            socket_path.unlink(missing_ok=True)
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder_pid(socket_path: Path) -> int | None:
    """The pid of the daemon that holds the socket, or None when none is alive."""
    try:
        descriptor = os.open(lock_path(socket_path), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _pid_in(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, socket_path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _pid_in(descriptor)
        who = f" (pid {holder})" if holder else ""
        raise DaemonError(
            "busy", f"a daemon already listens at {socket_path}{who}", "`shoal stop` ends it"
        ) from error


def _clear_stale_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise DaemonError("bad_request", f"{path} exists and is not a socket", "remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        with contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise DaemonError("busy", f"something that is no Shoal daemon listens at {path}")
    path.unlink(missing_ok=True)


def _pid_in(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None
