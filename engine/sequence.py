"""A sequence: one request's tokens on their way through the engine.

Knows token ids, its sampler and how far it has come. Text, stop strings and messages are its sink's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

from shoal.engine.guess.speculation import Guesser
from shoal.models.sampling import Sampled, Sampler
from shoal.offload.kv.prefix_cache import Found, Holding, Move

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class Sink(Protocol):
    """Where a sequence's tokens go. Called by the engine's thread; must not block."""

    def begin(self, sequence: Sequence) -> None:
        """The sequence has been queued."""
        ...

    def accept(self, sampled: Sampled) -> FinishReason | None:
        """Take the next token; a reason ends the sequence."""
        ...

    def finish(self, reason: FinishReason, sequence: Sequence) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass
class Times:
    """Clock readings in seconds; 0 = has not happened."""

    arrived_s: float = 0.0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    stall_s: float = 0.0


@dataclass(eq=False)
class Sequence:
    """`tokens` are the prompt and what was generated; KV of the first `computed` of them is stored.

    client: whose request it is. priority: higher goes first. deadline_s: clock reading at which it ends anyhow.
    """

    tokens: list[int]
    limit: int  # length at which it ends, prompt included
    sampler: Sampler
    sink: Sink
    client: str = ""
    priority: int = 0
    deadline_s: float = math.inf
    times: Times = field(default_factory=Times)
    computed: int = 0
    holding: Holding = field(default_factory=Holding)
    number: int = 0  # in order of arrival
    cached_tokens: int = 0  # of the prompt, that did not have to be computed
    drafted_tokens: int = 0  # guessed ahead
    accepted_tokens: int = 0  # of these, guessed right
    preemptions: int = 0
    running: bool = False  # else it waits, or has ended
    ended: bool = False
    prompt_tokens: int = field(init=False)
    guesser: Guesser = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self.guesser = Guesser(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        """Tokens that have to pass through the model before the next one can be sampled."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, eq=False)
class Chunk:
    """Part of a step: tokens [start, end) of one sequence, and after them `draft`, which is only guessed.

    Has its `pages`: they stay if it is cancelled meanwhile.
    """

    sequence: Sequence
    start: int
    end: int
    pages: tuple[int, ...]
    draft: tuple[int, ...] = ()

    @classmethod
    def of(cls, sequence: Sequence, tokens: int, draft: tuple[int, ...] = ()) -> Chunk:
        """The next so many tokens, then `draft`; the sequence has the pages for them."""
        start = sequence.computed
        return cls(sequence, start, start + tokens, tuple(sequence.holding.pages), draft)

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.end], *self.draft]

    @property
    def samples(self) -> bool:
        """Does this chunk reach the end, so that a next token comes out of it?"""
        return self.end == len(self.sequence.tokens)

    @property
    def rows(self) -> int:
        return self.end - self.start + len(self.draft)

    @property
    def rows_wanted(self) -> int:
        """How many of its last tokens need logits, because what follows them is sampled."""
        return 1 + len(self.draft) if self.samples else 0


@dataclass(frozen=True, eq=False)
class Recall:
    """Part of a step: pages of one sequence that are read from disk, in this order, until one fails."""

    sequence: Sequence
    found: tuple[Found, ...]
    pages: tuple[int, ...]  # one for each found

    @classmethod
    def of(cls, sequence: Sequence, found: list[Found]) -> Recall:
        """What was found to continue the sequence's shared pages; it has the pages for it."""
        first = len(sequence.holding.path)
        return cls(sequence, tuple(found), tuple(sequence.holding.pages[first : first + len(found)]))


@dataclass(frozen=True, eq=False)
class Batch:
    """A step to be made: first move pages, in this order, then read `recalls`, then compute the chunks; `decodes` of
    them are no prompts."""

    chunks: list[Chunk]
    moves: list[Move]
    decodes: int
    recalls: list[Recall] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.moves or self.recalls)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that it is for."""
        return [part.sequence for part in self.chunks] + [part.sequence for part in self.recalls]

    @property
    def over(self) -> bool:
        """Whether all that it is for has ended meanwhile."""
        return all(sequence.ended for sequence in self.sequences)

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)
