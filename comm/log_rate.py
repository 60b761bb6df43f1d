"""A bounded rate for log lines that clients and strangers can cause.

Knows a logger. Does not know what the lines are about.
"""

from __future__ import annotations

import logging
import threading
import time


class SeldomLog:
    """Logs at most one line per `interval_s`; the next line says how many were left out. Thread-safe."""

    def __init__(self, log: logging.Logger, interval_s: float = 10.0) -> None:
        self._log = log
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._next_s = float("-inf")
        self._swallowed = 0

    def warning(self, text: str, *args: object, error: BaseException | None = None) -> None:
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._next_s:
                self._swallowed += 1
                return
            swallowed, self._swallowed = self._swallowed, 0
            self._next_s = now_s + self._interval_s
        suffix = f" (and {swallowed} more like it)" if swallowed else ""
        self._log.warning(text + suffix, *args, exc_info=error)
