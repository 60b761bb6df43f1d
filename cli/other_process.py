"""Another process, to be ended: found once, so that a later process with the same number is never meant."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Protocol

import psutil

POLL_S = 0.02


class OtherProcess(Protocol):
    """Raises ProcessLookupError where there is no such process, PermissionError where it is another user's."""

    def signal(self, number: signal.Signals) -> None: ...

    def gone(self, limit_s: float = 0.0) -> bool:
        """Whether it has ended, at the latest after so long."""

    def close(self) -> None: ...


def find_process(pid: int) -> OtherProcess:
    """Raises ProcessLookupError."""
    return _ByDescriptor(pid) if hasattr(os, "pidfd_open") else _ByStart(pid)


class _ByDescriptor:
    """On Linux, which keeps a process's number for as long as somebody holds it."""

    def __init__(self, pid: int) -> None:
        self._descriptor = os.pidfd_open(pid)

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._descriptor, number)

    def gone(self, limit_s: float = 0.0) -> bool:
        return bool(select.select([self._descriptor], [], [], limit_s)[0])

    def close(self) -> None:
        os.close(self._descriptor)


class _ByStart:
    """Elsewhere: a process is known by its number and when it began, which psutil compares before each signal."""

    def __init__(self, pid: int) -> None:
        try:
            self._process = psutil.Process(pid)
        except psutil.NoSuchProcess as error:
            raise ProcessLookupError(pid) from error

    def signal(self, number: signal.Signals) -> None:
        try:
            self._process.send_signal(number)
        except psutil.NoSuchProcess as error:
            raise ProcessLookupError(self._process.pid) from error
        except psutil.AccessDenied as error:
            raise PermissionError(self._process.pid) from error

    def gone(self, limit_s: float = 0.0) -> bool:
        until_s = time.monotonic() + limit_s
        while not (ended := self._ended()) and time.monotonic() < until_s:
            time.sleep(POLL_S)
        return ended

    def close(self) -> None:
        """There is nothing to close."""

    def _ended(self) -> bool:
        try:
            return not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
