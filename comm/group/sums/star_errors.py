"""How an order ends early in a star of ranks.

GroupError
├── Departed   another rank failed, or is gone
└── GivenUp    rank 0 gave the order up
"""

from __future__ import annotations

from ..errors import GroupError


class Departed(GroupError):
    """A rank that the group cannot go on with. `failed`: it said so itself. `unheard_by`: the rank that does not hear
    it any more, though rank 0 may; 0 = none."""

    def __init__(self, rank: int, reason: str, failed: bool = False, unheard_by: int = 0) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason
        self.failed = failed
        self.unheard_by = unheard_by


class GivenUp(GroupError):
    """Nobody goes on with this order."""
