"""One step's input: which tokens of which sequences pass through the model together.

It only keeps arrays in shape: the scheduler decides what is in it, the transformer reads it. The rows of a long step
are cut into parts, which a block computes one after the other; this bounds the memory that a block takes besides its
result. Knows nothing of queues or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.kernels.arrays import Ids
from shoal.kernels.attention_operands import Segments

ALL_ROWS = 1 << 30  # rows: more than any step has


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive rows of a step. A part's attention needs the K and V of the parts before it."""

    positions: Ids  # (rows,)
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
        cls, chunks: Iterable[tuple[Sequence[int], int, Sequence[int], int]], part_tokens: int = ALL_ROWS
    ) -> Step:
        """From (token ids, start position, KV pages, how many of the last rows are wanted) per sequence."""
        parts: list[list[tuple[int, int, Sequence[int]]]] = [[]]
        room = part_tokens
        tokens: list[int] = []
        rows: list[int] = []
        for ids, start, pages, wanted in chunks:
            tokens += ids
            rows += range(len(tokens) - wanted, len(tokens))
            done = 0
            while done < len(ids):
                if not room:
                    parts.append([])
                    room = part_tokens
                count = min(room, len(ids) - done)
                parts[-1].append((count, start + done, pages))
                done += count
                room -= count
        return cls(
            np.array(tokens, np.int64),
            tuple(_part(segments) for segments in parts),
            part_tokens,
            np.array(rows, np.int64),
        )

    def split(self, rows: int) -> list[slice]:
        """Rows [0, rows) of hidden states, cut into slices of as many rows as are computed together."""
        starts = range(0, max(rows, 1), self.part_tokens)
        return [slice(start, start + self.part_tokens) for start in starts]


def _part(segments: Sequence[tuple[int, int, Sequence[int]]]) -> Part:
    positions = [np.arange(start, start + count, dtype=np.int64) for count, start, _ in segments]
    return Part(np.concatenate(positions), Segments.build(segments))
