"""Rows of an embedding that stays on disk.

A prompt needs few rows of a large matrix. Only the bands that hold them are read, several reads at a time, through a
small memory of their own. This module knows one matrix and where it lies; `readers` do the reading.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import xxhash

from shoal.kernels import Matrix, OperandError, gather_rows
from shoal.kernels.arrays import Floats, Ids
from shoal.offload.pack.pack import Pack, PackedBlock, altered, tensor_type

from .fetcher import Fetcher
from .pinned import EMBED
from .readers import READERS, Readers
from .row_reads import batches, runs
from .window import Passage

ROWS_BYTES = 4 << 20  # are read at a time
NEAR_BYTES = 32 << 10  # rows this close to each other are read together


class Embedding:
    """The matrix of block `embed`, on disk."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._packed = pack.blocks[EMBED]
        self._fetcher = Fetcher(ROWS_BYTES, whole=False)
        self.region = self._fetcher.region

    def rows(self, readers: Readers, ids: Ids) -> Floats:
        """Rows `ids` (T,) as (T, cols). Raises OffloadError; OperandError if there is no such row."""
        tensor = self._packed.tensors["embed"]
        kind = tensor_type(tensor)
        where = np.argsort(ids, kind="stable")
        ordered = ids[where]
        if len(ids) and not 0 <= int(ordered[0]) <= int(ordered[-1]) < tensor.rows:
            raise OperandError(f"row ids must be within [0, {tensor.rows})")
        height = kind.band_rows
        reads = runs(
            np.unique(ordered // height).tolist(),
            kind.matrix_bytes(height, tensor.cols),
            self._packed.offset + tensor.offset,
            near_bytes=NEAR_BYTES,
            most_bytes=ROWS_BYTES // READERS,
        )
        ends = np.array([(run.last + 1) * height for run in reads], np.int64)
        upto = iter(np.searchsorted(ordered, ends).tolist())  # how many ids lie before the end of each run
        out = np.empty((len(ids), tensor.cols), np.float32)
        done = 0
        for batch in batches(reads, ROWS_BYTES):
            memory = self.region.memory
            passages = [Passage(EMBED, run.offset, position, run.nbytes) for position, run in batch]
            self._fetcher.fetch(readers, passages)
            for position, run in batch:
                start, rows = position + run.skip, (run.last + 1 - run.first) * height
                read = memory[start : start + kind.matrix_bytes(rows, tensor.cols)]
                matrix, end = Matrix(kind, read, rows, tensor.cols), next(upto)
                out[where[done:end]] = gather_rows(matrix, ordered[done:end] - run.first * height)
                done = end
        return out

    def check(self, readers: Readers) -> None:
        """Reads and checks all of the matrix once, because later only parts are read. A tied one is checked as the
        head's slices. Raises PackCorrupt if it was altered."""
        slices = [item for block, item in self._pack.blocks.items() if block.kind == "head"]
        for item in slices if self._pack.tied else [self._packed]:
            readers.once(item.block, partial(self._check, readers, item))

    def _check(self, readers: Readers, item: PackedBlock) -> None:
        digest = xxhash.xxh3_64()
        part_bytes = ROWS_BYTES // READERS
        for start in range(0, item.nbytes, ROWS_BYTES):
            end = min(start + ROWS_BYTES, item.nbytes)
            parts = [
                Passage(item.block, item.offset + at, at - start, min(part_bytes, end - at))
                for at in range(start, end, part_bytes)
            ]
            self._fetcher.fetch(readers, parts)
            digest.update(self.region.memory[: end - start].data)
        if digest.hexdigest() != item.checksum:
            self._pack.condemn()
            raise altered(self._pack.path, item.block)
