"""A draft: tokens that may come next, each with a grade of the evidence for it.

Grades are small integers whose meaning is the proposer's; how often tokens of a grade turn out right is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Draft:
    """Token i is proposed to follow if all before it do; `grades[i]` stands for the evidence for it then."""

    tokens: tuple[int, ...] = ()
    grades: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.grades)

    def first(self, count: int) -> Draft:
        """Its first `count` tokens."""
        return Draft(self.tokens[:count], self.grades[:count])
