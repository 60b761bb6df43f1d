"""Errors of a group.

CommError
├── Departed             another rank failed, or is gone
├── GivenUp              rank 0 gave the order up
└── GroupProtocolError   bytes that are not what was to come
"""

from __future__ import annotations

from shoal.comm.errors import CommError


class Departed(CommError):
    """A rank that the group cannot go on with. `failed`: it said so itself."""

    def __init__(self, rank: int, reason: str, failed: bool = False) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason
        self.failed = failed


class GivenUp(CommError):
    """Nobody goes on with this order."""


class GroupProtocolError(CommError):
    """A frame or message of the wrong kind, size or place."""
