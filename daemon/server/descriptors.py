"""File descriptors: how many the process may have, and a few that are kept for the moment when there are none.

Knows limits and numbers. Does not know what descriptors are used for.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

USEFUL = 1 << 16  # more would help nobody
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # why the system gives none
KEPT = 512  # for models, packs, stores and logs, where the limit allows it


def raise_limit() -> int:
    """Raise the process's soft limit as far as it may go by itself. → the limit"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = USEFUL if hard == resource.RLIM_INFINITY else min(hard, USEFUL)
    if soft == resource.RLIM_INFINITY:
        return USEFUL
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def soft_limit() -> int:
    """How many the process may have now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return USEFUL if soft == resource.RLIM_INFINITY else soft


def margin(limit: int) -> int:
    """How many have to be free when libzmq is to take one: it does that a moment later, and must not fail."""
    return min(64, limit // 8)


def left_for_clients(limit: int) -> int:
    """How many descriptors connections may use: what is left of `limit` when the rest of the daemon has its part."""
    return limit - min(KEPT, limit // 2)


class Reserve:
    """Descriptors that are open for nothing, so that one can be had when the process has no more."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._spare: list[int] = []
        self.fill()

    def fill(self) -> bool:
        """Have all of them again. False when the process has no more to give."""
        try:
            while len(self._spare) < self._count:
                self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return False
        return True

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block, one descriptor more is free than before."""
        if self._spare:
            os.close(self._spare.pop())
        try:
            yield
        finally:
            self.fill()

    def check(self, count: int) -> None:
        """OSError unless the process can have so many besides."""
        if not self.fill():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        with ExitStack() as probe:
            for _ in range(count):
                probe.callback(os.close, os.dup(self._spare[0]))

    def close(self) -> None:
        while self._spare:
            os.close(self._spare.pop())
