"""A batch: what the scheduler has decided to do in the next step, and for which sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from shoal.offload.kv.prefix_cache import Found, Move

from .order import Order, Reading, Segment
from .sequence import Sequence


@dataclass(frozen=True, eq=False)
class Chunk:
    """Part of a step: compute tokens [start, end) of one sequence, and after them `draft`, which is only guessed.

    It has a list of `pages` of its own, because a sequence that is cancelled during the step gives its pages away.
    """

    sequence: Sequence
    start: int
    end: int
    pages: tuple[int, ...]
    length: int  # that the ropes of its keys are chosen for
    draft: tuple[int, ...] = ()

    @classmethod
    def of(cls, sequence: Sequence, tokens: int, draft: tuple[int, ...] = ()) -> Chunk:
        """The next `tokens` tokens of a sequence, then `draft`. The sequence has the pages for them."""
        start = sequence.computed
        holding = sequence.holding
        return cls(sequence, start, start + tokens, tuple(holding.pages), holding.length, draft)

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.end], *self.draft]

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the end of the text, so that the next token is sampled after it."""
        return self.end == len(self.sequence.tokens)

    @property
    def rows(self) -> int:
        return self.end - self.start + len(self.draft)

    @property
    def rows_wanted(self) -> int:
        """After how many of its last tokens logits are needed, to sample from."""
        return 1 + len(self.draft) if self.samples else 0


@dataclass(frozen=True, eq=False)
class Recall:
    """Part of a step: read pages of one sequence from disk, in this order, until one fails."""

    sequence: Sequence
    found: tuple[Found, ...]
    pages: tuple[int, ...]  # one for each found

    @classmethod
    def of(cls, sequence: Sequence, found: list[Found]) -> Recall:
        """Read what was found after the sequence's shared pages. The sequence has the pages for it."""
        first = len(sequence.holding.path)
        return cls(sequence, tuple(found), tuple(sequence.holding.pages[first : first + len(found)]))


@dataclass(frozen=True, eq=False)
class Batch:
    """A step that begins at the clock reading `began_s`: first pages are moved, then `recalls` are read, then chunks
    are computed. The first `decodes` chunks belong to answers, the others to prompts."""

    began_s: float
    chunks: list[Chunk]
    recalls: list[Recall]
    moves: list[Move]
    decodes: int

    @classmethod
    def of(
        cls, began_s: float, decodes: list[Chunk], prompts: Iterable[Chunk | Recall], moves: list[Move]
    ) -> Batch:
        """Put a batch together, without the parts of sequences that have been preempted since."""
        left = [part for part in prompts if part.sequence.running]
        chunks = [part for part in left if isinstance(part, Chunk)]
        recalls = [part for part in left if isinstance(part, Recall)]
        return cls(began_s, [*decodes, *chunks], recalls, moves, len(decodes))

    def done(self, sequence: Sequence, share: float) -> int:
        """How many tokens of a sequence are computed when that share of the step is; 0 if it has no chunk here."""
        chunk = next((chunk for chunk in self.chunks if chunk.sequence is sequence), None)
        return chunk.start + int(share * (chunk.end - chunk.start)) if chunk else 0

    @property
    def order(self) -> Order:
        """The same step in terms of tokens and pages, for every rank."""
        return Order(
            [Segment(it.tokens, it.start, it.pages, it.rows_wanted, it.length) for it in self.chunks],
            self.moves,
            [Reading([found.entry for found in recall.found], recall.pages) for recall in self.recalls],
        )

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.moves or self.recalls)

    @cached_property
    def sequences(self) -> list[Sequence]:
        """The sequences that the step is for. `over` is asked for twice in every layer, so they are gathered once."""
        parts: list[Chunk | Recall] = [*self.chunks, *self.recalls]
        return [part.sequence for part in parts]

    @property
    def over(self) -> bool:
        """Whether all of its sequences have ended meanwhile."""
        return all(sequence.ended for sequence in self.sequences)

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)
