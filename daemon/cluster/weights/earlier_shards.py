"""What a worker need not be sent, because it has it in packs of other shards of the same model: a model that is cut
anew leaves each rank with much of what it had.

Rows and columns that both shards have are copied as they are: bands of rows are the same bytes in every shard, and
so are whole blocks of columns within a band. A block of an earlier pack is only used if all of it is as it was written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import xxhash

from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.shard import columns_held, rows_held
from shoal.models.checkpoint.weight_source import Piece
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.pack.pack import Pack, PackedBlock, tensor_type
from shoal.partition.slicing import Range, Shard
from shoal.partition.spec import BlockKind

from .shard_facts import ShardFacts

CHECKED_BYTES = 4 << 20  # that are read at a time

_Held = Mapping[tuple[BlockKind, str], Range]


class _Place(NamedTuple):
    """Where a piece is: `bands` of `band_bytes` from a byte of the file on; of each, the bytes `start` to `stop`."""

    offset: int
    bands: int
    band_bytes: int
    start: int
    stop: int


class EarlierShard:
    """An open pack of another shard of the model of `facts`. Its blocks are read when it is made."""

    def __init__(self, pack: Pack, facts: ShardFacts, progress: BytesDone = unheard) -> None:
        """Raises OSError."""
        assert isinstance(pack.manifest.shard, Shard)
        self._pack, self._facts = pack, facts
        self._old = rows_held(pack.manifest.shard, facts.spec), columns_held(pack.manifest.shard)
        self._new = rows_held(facts.shard, facts.spec), columns_held(facts.shard)
        self._sound = {
            item.block for item in pack.manifest.blocks if self._shares(item) and self._check(item)
        }

    def has(self, piece: Piece) -> bool:
        return self._place(piece) is not None

    def read(self, piece: Piece, into: Bytes) -> None:
        """A piece that it has, into uint8 (n,). Raises OSError."""
        place = self._place(piece)
        assert place is not None
        memory = np.empty((place.bands, place.band_bytes), np.uint8)
        with self._pack.path.open("rb", buffering=0) as file:
            got = os.preadv(file.fileno(), [memory.data], place.offset)
        if got != memory.nbytes:
            raise OSError(f"{self._pack.path}: ends too early")
        into[:] = memory[:, place.start : place.stop].reshape(-1)

    def _place(self, piece: Piece) -> _Place | None:
        item = self._pack.blocks.get(piece.block)
        if item is None or piece.block not in self._sound or piece.role not in item.tensors:
            return None
        tensor, key = item.tensors[piece.role], (piece.block.kind, piece.role)
        kind, _, cols = self._facts.matrices(piece.block)[piece.role]
        before = self._shift(0, key)
        left = self._shift(1, key)
        first, last = piece.start + before, piece.stop + before
        whole = first % kind.band_rows == 0 and (piece.stop - piece.start) % kind.band_rows == 0
        if tensor_type(tensor) is not kind or not whole or not 0 <= first < last <= tensor.rows:
            return None
        if left < 0 or left + cols > tensor.cols or left % kind.block_weights:
            return None
        unit = kind.band_rows
        band_bytes = unit * kind.row_bytes(tensor.cols)
        start = unit * kind.bytes_before(left)
        at = item.offset + tensor.offset + first // unit * band_bytes
        return _Place(at, (last - first) // unit, band_bytes, start, start + unit * kind.row_bytes(cols))

    def _shift(self, way: int, key: tuple[BlockKind, str]) -> int:
        """How many rows (0) or columns (1) of a matrix the earlier shard has before the first of the new one."""
        return self._new[way][key].start - self._old[way][key].start if key in self._new[way] else 0

    def _shares(self, item: PackedBlock) -> bool:
        """Whether both have some of a block that is cut. Head and embedding come in other pieces."""
        block = item.block
        if not self._facts.has(block) or block.kind in ("embed", "head"):
            return False
        pairs = ((self._old[0][key], own) for key, own in self._new[0].items() if key[0] == block.kind)
        return any(max(old.start, own.start) < min(old.stop, own.stop) for old, own in pairs)

    def _check(self, item: PackedBlock) -> bool:
        """Whether a block has its checksum. Raises OSError."""
        digest, memory = xxhash.xxh3_64(), memoryview(bytearray(min(item.nbytes, CHECKED_BYTES)))
        with self._pack.path.open("rb", buffering=0) as file:
            for at in range(0, item.nbytes, CHECKED_BYTES):
                part = memory[: min(CHECKED_BYTES, item.nbytes - at)]
                if os.preadv(file.fileno(), [part], item.offset + at) != len(part):
                    return False
                digest.update(part)
        return digest.hexdigest() == item.checksum
