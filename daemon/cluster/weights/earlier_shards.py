"""What a machine has of a shard in packs of other shards of the same model: a model that is cut anew leaves each rank
with much of what it had, and others with some of that, too.

Rows and columns that both shards have are copied as they are: bands of rows are the same bytes in every shard, and
so are whole blocks of columns within a band. Where they lie follows from the pack's manifest, which is believed only
if the place of the pack in the cache is named after what it says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from msgspec.structs import replace

from shoal.daemon.errors import DaemonError
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.shard import columns_held, rows_held
from shoal.models.checkpoint.weight_source import Piece
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.pack.pack import Pack, PackedBlock, tensor_type
from shoal.partition.errors import PartitionError
from shoal.partition.slicing import NONE, Range, Shard
from shoal.partition.spec import BlockId, BlockKind

from .shard_facts import RowsHeld, ShardFacts, described_spec
from .weight_messages import BlockForm, Description

SHARD_READ_BYTES = 4 << 20  # at a time


class _Place(NamedTuple):
    """Where a piece is: `bands` of `band_bytes` from a byte of the file on; of each, the bytes `start` to `stop`."""

    offset: int
    bands: int
    band_bytes: int
    start: int
    stop: int


class EarlierShard:
    """An open pack of the model of `facts`, which has some of that shard. held: which rows of it."""

    def __init__(self, pack: Pack, facts: ShardFacts) -> None:
        """Raises DaemonError `corrupt` if the pack is not what its place in the cache is called, PackError."""
        assert isinstance(pack.manifest.shard, Shard)
        theirs = _facts(pack, pack.manifest.shard, facts.description)
        if not pack.path.parent.name.endswith(f".{theirs.content}"):
            raise DaemonError("corrupt", f"{pack.path.parent}: has another shard than its name says")
        pack.require(theirs.spec)
        self._pack, self._facts = pack, facts
        self._old = rows_held(pack.manifest.shard, facts.spec), columns_held(pack.manifest.shard)
        self._new = rows_held(facts.shard, facts.spec), columns_held(facts.shard)
        self.held: RowsHeld = {
            (item.block, role): rows
            for item in pack.manifest.blocks
            if facts.has(item.block)
            and item.block.kind not in ("embed", "head")  # these are cut in other pieces
            for role in item.tensors
            if (rows := self._rows(item, role)).size
        }

    def check(self, beyond: Sequence[EarlierShard] = (), progress: BytesDone = unheard) -> None:
        """Reads the blocks that have more than those of `beyond`, and from now on has what is as it was written. Raises
        OSError."""
        sound = set()
        for item in self._pack.manifest.blocks:
            roles = [role for role in item.tensors if (item.block, role) in self.held]
            more = any(not _within(self.held[item.block, role], item.block, role, beyond) for role in roles)
            if more and self._sound(item, progress):
                sound.add(item.block)
        self.held = {key: rows for key, rows in self.held.items() if key[0] in sound}

    def has(self, piece: Piece) -> bool:
        held = self.held.get((piece.block, piece.role))
        if held is None or not held.start <= piece.start < piece.stop <= held.stop:
            return False
        unit = self._facts.matrices(piece.block)[piece.role][0].band_rows
        return piece.start % unit == piece.stop % unit == 0

    def read(self, piece: Piece, into: Bytes) -> None:
        """A piece that it has, into uint8 (n,). Raises OSError."""
        place = self._place(piece)
        # They may be far wider than the piece.
        together = min(place.bands, max(1, SHARD_READ_BYTES // place.band_bytes))
        memory = np.empty((together, place.band_bytes), np.uint8)
        wanted = into.reshape(place.bands, -1)
        with self._pack.path.open("rb", buffering=0) as file:
            for first in range(0, place.bands, together):
                bands = memory[: min(together, place.bands - first)]
                got = os.preadv(file.fileno(), [bands.data], place.offset + first * place.band_bytes)
                if got != bands.nbytes:
                    raise OSError(f"{self._pack.path}: ends too early")
                wanted[first : first + together] = bands[:, place.start : place.stop]

    def _rows(self, item: PackedBlock, role: str) -> Range:
        """Which rows of the new shard's matrix it has, with all their columns, in whole bands."""
        tensor, key = item.tensors[role], (item.block.kind, role)
        kind, rows, cols = self._facts.matrices(item.block).get(role, (None, 0, 0))
        before, left = self._shift(0, key), self._shift(1, key)
        if kind is None or tensor_type(tensor) is not kind or before % kind.band_rows:
            return NONE
        if left < 0 or left + cols > tensor.cols or left % kind.block_weights:
            return NONE
        start, stop = max(0, -before), min(rows, tensor.rows - before)
        stop -= stop % kind.band_rows
        return Range(start, stop) if start < stop else NONE

    def _place(self, piece: Piece) -> _Place:
        item = self._pack.blocks[piece.block]
        tensor, key = item.tensors[piece.role], (piece.block.kind, piece.role)
        kind, _, cols = self._facts.matrices(piece.block)[piece.role]
        unit = kind.band_rows
        band_bytes = unit * kind.row_bytes(tensor.cols)
        start = unit * kind.bytes_before(self._shift(1, key))
        at = item.offset + tensor.offset + (piece.start + self._shift(0, key)) // unit * band_bytes
        bands = (piece.stop - piece.start) // unit
        return _Place(at, bands, band_bytes, start, start + unit * kind.row_bytes(cols))

    def _shift(self, way: int, key: tuple[BlockKind, str]) -> int:
        """How many rows (0) or columns (1) of a matrix the earlier shard has before the first of the new one."""
        return self._new[way][key].start - self._old[way][key].start if key in self._new[way] else 0

    def _sound(self, item: PackedBlock, progress: BytesDone) -> bool:
        """Whether a block has its checksum. Raises OSError."""
        digest, memory = xxhash.xxh3_64(), memoryview(bytearray(min(item.nbytes, SHARD_READ_BYTES)))
        with self._pack.path.open("rb", buffering=0) as file:
            for at in range(0, item.nbytes, SHARD_READ_BYTES):
                part = memory[: min(SHARD_READ_BYTES, item.nbytes - at)]
                if os.preadv(file.fileno(), [part], item.offset + at) != len(part):
                    return False
                digest.update(part)
                progress(item.offset + at, self._pack.manifest.nbytes)
        return digest.hexdigest() == item.checksum


def _within(rows: Range, block: BlockId, role: str, others: Sequence[EarlierShard]) -> bool:
    """Whether one of the others has these rows."""
    held = (other.held.get((block, role), NONE) for other in others)
    return any(it.start <= rows.start and rows.stop <= it.stop for it in held)


def _facts(pack: Pack, shard: Shard, like: Description) -> ShardFacts:
    """The facts of a pack's shard, if it is one of the model that `like` is about. Raises DaemonError."""
    theirs = replace(like, shard=shard)
    try:
        blocks = described_spec(theirs).blocks()
    except (PartitionError, ValueError) as error:
        raise DaemonError("corrupt", f"{pack.path.parent}: has a shard that cannot be: {error}") from error
    forms: list[BlockForm] = []
    form_of = []
    for block in blocks:
        item = pack.blocks.get(BlockId("head", -1, 0) if block.kind == "head" else block)
        tensors = {} if item is None or (block.kind == "head" and like.spec.tied) else item.tensors
        types = {role: tensor_type(tensor).id for role, tensor in tensors.items()}
        form = BlockForm(types, [*pack.vectors.get(block, {})])
        if form not in forms:
            forms.append(form)
        form_of.append(forms.index(form))
    return ShardFacts(replace(theirs, forms=forms, form_of=form_of))
