"""How an order ends early in a star of ranks.

GroupError
├── Departed   another rank failed, or is gone
└── GivenUp    rank 0 gave the order up
"""

from __future__ import annotations

from ..errors import GroupError


class Departed(GroupError):
    """A rank that the group cannot go on with. `failed`: it said so itself."""

    def __init__(self, rank: int, reason: str, failed: bool = False) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason
        self.failed = failed


class GivenUp(GroupError):
    """Nobody goes on with this order."""
