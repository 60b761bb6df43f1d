"""A sequence: one request's tokens on their way through the engine.

Knows token ids, its sampler and how far it has come. Text, stop strings and messages are its sink's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from shoal.comm.messages import FinishReason
from shoal.models.sampling import Sampled, Sampler

from .speculation import Guesser


class Sink(Protocol):
    """Where a sequence's tokens go. Called by the engine's thread; must not block."""

    def begin(self, sequence: Sequence) -> None:
        """The sequence has been queued."""
        ...

    def accept(self, sampled: Sampled) -> FinishReason | None:
        """Take the next token; a reason ends the sequence."""
        ...

    def finish(self, reason: FinishReason, times: Times) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass
class Times:
    """Clock readings in seconds, 0 = has not happened; and how many tokens were guessed and guessed right."""

    arrived_s: float = 0.0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    stall_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(eq=False)
class Sequence:
    """`tokens` are the prompt and what was generated; KV of the first `computed` of them is stored."""

    tokens: list[int]
    limit: int  # length at which it ends, prompt included
    sampler: Sampler
    sink: Sink
    times: Times = field(default_factory=Times)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    ended: bool = False
    guesser: Guesser = field(init=False)

    def __post_init__(self) -> None:
        self.guesser = Guesser(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens that have to pass through the model before the next one can be sampled."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, eq=False)
class Chunk:
    """Part of a step: tokens [start, end) of one sequence, and after them `draft`, which is only guessed."""

    sequence: Sequence
    start: int
    end: int
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.end], *self.draft]

    @property
    def rows_wanted(self) -> int:
        """Of how many of its last tokens the logits are needed."""
        return 1 + len(self.draft) if self.samples else 0

    @property
    def samples(self) -> bool:
        """Does this chunk reach the end, so that a next token comes out of it?"""
        return self.end == len(self.sequence.tokens)
