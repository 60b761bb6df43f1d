"""How the ranks of a group make sums: which way partials travel, and as what numbers. Pure data.

star       everybody sends to rank 0, which adds and sends the sum back: one round trip
exchange   everybody sends to everybody, and each adds: one way
sliced     each rank adds some of the rows and sends their sum to everybody: two ways, but few bytes. For prompts
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple, get_args

from ..errors import ChannelError
from .wire_types import INT8_GROUP, WireType

SumTopology = Literal["star", "exchange", "sliced"]

_TOPOLOGIES: tuple[SumTopology, ...] = get_args(SumTopology)
_WIRES: tuple[WireType, ...] = get_args(WireType)
_PACKED = struct.Struct("<4BI")


class Manner(NamedTuple):
    """How one sum is made."""

    topology: SumTopology = "star"
    wire: WireType = "f32"


class Manners(NamedTuple):
    """Sums of fewer than `many_rows` rows are made by `few`, others by `many`. The same on all ranks."""

    few: Manner = Manner()
    many: Manner = Manner()
    many_rows: int = 1

    def of(self, shape: tuple[int, int]) -> Manner:
        """For partials (T, n). A few numbers a row (squares of norms) are never rounded: they would save nothing."""
        rows, columns = shape
        manner = self.few if rows < self.many_rows else self.many
        return manner if columns >= INT8_GROUP else Manner(manner.topology)

    @property
    def among_all(self) -> bool:
        """Whether every rank needs a stream to every other one."""
        return not self.few.topology == self.many.topology == "star"

    @property
    def rounds(self) -> bool:
        """Whether the sums are others than those of another way."""
        return not self.few.wire == self.many.wire == "f32"

    def describe(self) -> str:
        """For people and logs."""
        few, many = (f"{it.topology} {it.wire}" for it in (self.few, self.many))
        return few if few == many else f"{few}, from {self.many_rows} rows {many}"

    def packed(self) -> bytes:
        numbers = [
            number
            for topology, wire in (self.few, self.many)
            for number in (_TOPOLOGIES.index(topology), _WIRES.index(wire))
        ]
        return _PACKED.pack(*numbers, min(self.many_rows, 0xFFFFFFFF))

    @classmethod
    def of_bytes(cls, data: bytes) -> Manners:
        """Raises ChannelError."""
        try:
            *numbers, many_rows = _PACKED.unpack(data)
            few, many = (
                Manner(_TOPOLOGIES[topology], _WIRES[wire]) for topology, wire in (numbers[:2], numbers[2:])
            )
        except (struct.error, IndexError) as error:
            raise ChannelError(f"manners of sums that are none: {error}") from error
        return cls(few, many, many_rows)


MANNERS_BYTES = _PACKED.size
