"""One step's input: which tokens of which sequences pass through the model together.

Pure shape-keeping; the scheduler fills it, the transformer reads it. Knows nothing of queues or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.attention import HeadNorms, Rotation, Segments


@dataclass(frozen=True, eq=False)
class Step:
    """A batch of T tokens. Positions are per sequence, from 0."""

    tokens: Tensor  # int64 (T,)
    positions: Tensor  # int64 (T,)
    segments: Segments  # which tokens are of one sequence, and where its KV is
    rows: Tensor  # int64 (R,): rows whose hidden state is wanted at the end

    @classmethod
    def build(cls, chunks: Iterable[tuple[Sequence[int], int, Sequence[int], int]]) -> Step:
        """From (token ids, start position, KV pages, how many of the last rows are wanted) per sequence."""
        segments: list[tuple[int, int, Sequence[int]]] = []
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for ids, start, pages, wanted in chunks:
            segments.append((len(ids), start, pages))
            tokens += ids
            positions += range(start, start + len(ids))
            rows += range(len(tokens) - wanted, len(tokens))
        return cls(
            torch.tensor(tokens),
            torch.tensor(positions),
            Segments.build(segments),
            torch.tensor(rows, dtype=torch.int64),
        )


class KvCache(Protocol):
    """What attention needs of a KV store (offload.kv has it)."""

    def attend(
        self,
        layer: int,
        step: Step,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotation: Rotation,
        scale: float,
        window: int | None,
        norms: HeadNorms | None,
    ) -> Tensor:
        """Store the step's k and v (T, kv_heads * head_dim), then attend with q (T, heads * head_dim), every token to
        its sequence up to itself; (T, heads * head_dim) f32."""
        ...
