"""Collectives: what the ranks of a group do together in the middle of a step.

Every rank calls the same ones in the same order. Their results are the same bits on every rank that gets one, and the
caller may write to them.
"""

from __future__ import annotations

from typing import Protocol

from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Floats, Hidden


class Collective(Protocol):
    """One rank's side of them."""

    def allreduce(self, home: ComputeHome, partial: Hidden) -> Hidden:
        """The sum of the partials (T, n) of all ranks, added in the order of ranks. Each is in its own rank's home."""
        ...

    def gather(self, columns: Floats) -> Floats:
        """The columns (R, n) of all ranks side by side, in the order of ranks, on rank 0; elsewhere none, (R, 0)."""
        ...

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        """The rows of rank 0, f32 of this shape, on every rank. The other ranks bring none."""
        ...


class Alone:
    """The collective of one rank: the identity."""

    def allreduce(self, home: ComputeHome, partial: Hidden) -> Hidden:
        return partial

    def gather(self, columns: Floats) -> Floats:
        return columns

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        assert rows is not None
        return rows
