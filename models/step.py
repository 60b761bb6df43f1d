"""One step's input: which tokens of which sequences pass through the model together.

It only keeps arrays in shape: the scheduler decides what is in it, the transformer reads it. The rows of a long step
are cut into parts, which a block computes one after the other; this bounds the memory that a block takes besides its
result. Knows nothing of queues or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from shoal.kernels.arrays import Ids
from shoal.kernels.attention_operands import Segments

ALL_ROWS = 1 << 30  # rows: more than any step has


class Segment(NamedTuple):
    """Consecutive tokens of one text, from position `start` on. `pages` hold its K and V from position 0 on. Logits are
    wanted after the last `rows_wanted` of the tokens. `length`: for which length of text the ropes of its keys are
    chosen (`partition.spec.length_class`)."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    rows_wanted: int
    length: int = 0


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive rows of a step. A part's attention needs the K and V of the parts before it."""

    positions: Ids  # (rows,)
    lengths: list[
        tuple[int, int]
    ]  # runs of rows: for which length of text their ropes are chosen, how many rows
    segments: Segments  # which rows belong to one sequence, and where its KV is


@dataclass(frozen=True, eq=False)
class Step:
    """A batch of T tokens. Positions are per sequence, from 0."""

    tokens: Ids  # (T,)
    parts: tuple[Part, ...]  # of `part_tokens` rows each; the last has what is left
    part_tokens: int
    rows: Ids  # (R,): rows whose hidden state is wanted at the end

    @classmethod
    def build(
        cls,
        segments: Iterable[Segment | tuple[Sequence[int], int, Sequence[int], int]],
        part_tokens: int = ALL_ROWS,
        *,
        alike: bool = False,
    ) -> Step:
        """From the segments of a step, one for each sequence. `alike`: their order is such that two parts have about as
        much of everything."""
        its = [Segment(*segment) for segment in segments]
        parts: list[list[_Rows]] = [[]]
        room = part_tokens
        tokens: list[int] = []
        wanted_of: dict[int, range] = {}
        for place in _dealt(its) if alike else range(len(its)):
            ids, start, pages, wanted, length = its[place]
            tokens += ids
            wanted_of[place] = range(len(tokens) - wanted, len(tokens))
            done = 0
            while done < len(ids):
                if not room:
                    parts.append([])
                    room = part_tokens
                count = min(room, len(ids) - done)
                parts[-1].append(_Rows(count, start + done, pages, length))
                done += count
                room -= count
        return cls(
            np.array(tokens, np.int64),
            tuple(_part(segments) for segments in parts),
            part_tokens,
            np.array([row for place in range(len(its)) for row in wanted_of[place]], np.int64),
        )

    def split(self, rows: int) -> list[slice]:
        """Rows [0, rows) of hidden states, cut into slices of as many rows as are computed together."""
        starts = range(0, max(rows, 1), self.part_tokens)
        return [slice(start, start + self.part_tokens) for start in starts]


def _dealt(segments: Sequence[Segment]) -> list[int]:
    """Their places in an order that rises and falls again: those with most rows are in the middle, where the order is
    cut."""
    rising = sorted(
        range(len(segments)), key=lambda place: (len(segments[place].tokens), segments[place].start)
    )
    return [*rising[::2], *reversed(rising[1::2])]


class _Rows(NamedTuple):
    """Rows of one segment."""

    rows: int
    start: int
    pages: Sequence[int]
    length: int


def _part(rows: Sequence[_Rows]) -> Part:
    positions = [np.arange(it.start, it.start + it.rows, dtype=np.int64) for it in rows]
    runs = groupby(rows, key=lambda it: it.length)
    lengths = [(length, sum(it.rows for it in run)) for length, run in runs]
    segments = Segments.build([(it.rows, it.start, it.pages) for it in rows])
    return Part(np.concatenate(positions), lengths, segments)
