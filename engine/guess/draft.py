"""A draft: tokens that may come next, each with a grade of the evidence for it.

Grades are small integers. Their meaning is up to whoever proposes; how often tokens of a grade are right is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Draft:
    """Token i is proposed for the case that all before it are right; `grades[i]` says how good the evidence is then."""

    tokens: tuple[int, ...] = ()
    grades: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.grades)

    def first(self, count: int) -> Draft:
        """Its first `count` tokens."""
        return Draft(self.tokens[:count], self.grades[:count])
