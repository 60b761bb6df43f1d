"""Collectives: what the ranks of a group do together in the middle of a step.

Every rank calls the same ones in the same order. Their results are the same bits on every rank that gets one, and the
caller may write to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Bytes, Floats, Hidden

PendingSum = Callable[[], Hidden]
"""A sum that was started: waits for it and returns it, or raises what became of it."""


class Collective(Protocol):
    """One rank's side of them."""

    def allreduce(self, home: ComputeHome, partial: Hidden) -> Hidden:
        """The sum of the partials (T, n) of all ranks, added in the order of ranks. Each is in its own rank's home."""
        ...

    def start(self, home: ComputeHome, partial: Hidden) -> PendingSum:
        """Begin the same, and go on. It takes its turn among all sums. Until it has arrived, nobody may write to the
        partial. `settle` ends it."""
        ...

    def settle(self) -> None:
        """The step is over, whatever became of it: from now on nothing is under way. Sums that nobody has waited for
        are dropped. Never raises."""
        ...

    def gather(self, columns: Floats) -> Floats:
        """The columns (R, n) of all ranks side by side, in the order of ranks, on rank 0; elsewhere none, (R, 0). No
        sum is under way."""
        ...

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        """The rows of rank 0, f32 of this shape, on every rank. The other ranks bring none. No sum is under way."""
        ...

    def deal(self, parts: Sequence[Bytes], into: Bytes | None) -> None:
        """Rank 0 has bytes for ranks 1, 2, …, each of which gets its own `into` an array. No sum is under way."""
        ...

    def collect(self, own: Bytes | None, into: Sequence[Bytes]) -> None:
        """Ranks 1, 2, … each have bytes of their `own`, which rank 0 gets `into` an array for each. No sum is under
        way."""
        ...


class Alone:
    """The collective of one rank: the identity."""

    def allreduce(self, home: ComputeHome, partial: Hidden) -> Hidden:
        return partial

    def start(self, home: ComputeHome, partial: Hidden) -> PendingSum:
        return lambda: partial

    def settle(self) -> None: ...

    def gather(self, columns: Floats) -> Floats:
        return columns

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        assert rows is not None
        return rows

    def deal(self, parts: Sequence[Bytes], into: Bytes | None) -> None: ...

    def collect(self, own: Bytes | None, into: Sequence[Bytes]) -> None: ...
