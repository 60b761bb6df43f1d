"""A batch: what the next step does for which sequences, as the scheduler decides it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.offload.kv.prefix_cache import Found, Move

from .order import Order, Reading, Segment
from .sequence import Sequence


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
    """A step to be made from the clock reading `began_s` on: first pages are moved, then `recalls` are read, then the
    chunks are computed, of which the first `decodes` are no prompts."""

    began_s: float
    chunks: list[Chunk]
    recalls: list[Recall]
    moves: list[Move]
    decodes: int

    @classmethod
    def of(
        cls, began_s: float, decodes: list[Chunk], prompts: Iterable[Chunk | Recall], moves: list[Move]
    ) -> Batch:
        """Without what is for sequences that have lost their pages meanwhile."""
        left = [part for part in prompts if part.sequence.running]
        chunks = [part for part in left if isinstance(part, Chunk)]
        recalls = [part for part in left if isinstance(part, Recall)]
        return cls(began_s, [*decodes, *chunks], recalls, moves, len(decodes))

    @property
    def order(self) -> Order:
        """What every rank is to do."""
        return Order(
            [Segment(chunk.tokens, chunk.start, chunk.pages, chunk.rows_wanted) for chunk in self.chunks],
            self.moves,
            [Reading([found.entry for found in recall.found], recall.pages) for recall in self.recalls],
        )

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.moves or self.recalls)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that it is for."""
        parts: list[Chunk | Recall] = [*self.chunks, *self.recalls]
        return [part.sequence for part in parts]

    @property
    def over(self) -> bool:
        """Whether all that it is for has ended meanwhile."""
        return all(sequence.ended for sequence in self.sequences)

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)
