"""One step's input: which tokens of which sequences pass through the model together.

Pure shape-keeping; the scheduler fills it, the transformer reads it. Knows nothing of queues or text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens of one sequence, at rows [first, last) of the step.

    `slots` says where positions [0, start + last - first) of the sequence live in the KV pool: a slice when
    its pages happen to be consecutive, else int64 indices.
    """

    first: int
    last: int
    start: int  # position of row `first` in its sequence
    slots: slice | Tensor

    @property
    def end(self) -> int:
        """Length of the sequence after this step."""
        return self.start + self.last - self.first


@dataclass(frozen=True, eq=False)
class Step:
    """A batch of T tokens. Positions are per sequence, from 0."""

    tokens: Tensor  # int64 (T,)
    positions: Tensor  # int64 (T,)
    segments: tuple[Segment, ...]
    rows: Tensor  # int64 (R,): rows whose hidden state is wanted at the end

    @classmethod
    def build(
        cls, chunks: Iterable[tuple[list[int], int, slice | Tensor, bool]], every_row: bool = False
    ) -> Step:
        """From (token ids, start position, KV slots, is the last row wanted?) per sequence.

        `every_row` asks for all rows instead.
        """
        segments: list[Segment] = []
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for ids, start, slots, wanted in chunks:
            segments.append(Segment(len(tokens), len(tokens) + len(ids), start, slots))
            tokens += ids
            positions += range(start, start + len(ids))
            if wanted:
                rows.append(len(tokens) - 1)
        if every_row:
            rows = list(range(len(tokens)))
        return cls(
            torch.tensor(tokens),
            torch.tensor(positions),
            tuple(segments),
            torch.tensor(rows, dtype=torch.int64),
        )


class KvCache(Protocol):
    """What attention needs of a KV store (offload.kv has it)."""

    def extend(self, layer: int, segment: Segment, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (T, kv_heads, head_dim) of the segment's rows; return all of the sequence's K and V,
        each (kv_heads, segment.end, head_dim), in f32 or the pool's type."""
        ...
