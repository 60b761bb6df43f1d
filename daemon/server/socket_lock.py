"""One daemon per socket: a file lock held for life beside the socket, with the holder's pid in it.

Knows flock and stale socket files. Does not know ZeroMQ. The lock file is never removed: removing it
would let two processes hold locks on two files of one name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from shoal.daemon.errors import DaemonError


def lock_path(socket_path: Path) -> Path:
    return socket_path.with_name(socket_path.name + ".lock")


class SocketLock:
    """The right to listen at `socket_path`. The kernel frees it when the process ends, however it ends."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock and clear a dead daemon's socket away. DaemonError when somebody listens there."""
        path = lock_path(self._socket_path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise DaemonError("resources", f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _pid_in(descriptor)
            os.close(descriptor)
            who = f" (pid {holder})" if holder else ""
            raise DaemonError(
                "busy", f"a daemon already listens at {self._socket_path}{who}", "`shoal stop` ends it"
            ) from error
        try:
            self._clear_stale_socket()
        except (DaemonError, OSError):
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Remove the socket's file, which nobody listens at any more, and free the lock. Idempotent."""
        if self._descriptor is not None:
            self._socket_path.unlink(missing_ok=True)
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _clear_stale_socket(self) -> None:
        path = self._socket_path
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


def holder_pid(socket_path: Path) -> int | None:
    """The pid of the daemon that holds the socket, or None when none lives."""
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


def _pid_in(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None
