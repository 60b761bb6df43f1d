"""A checkpoint, or a shard of one, whose matrices are read in the types that a pack keeps them in."""

from __future__ import annotations

import numpy as np

from shoal.kernels import Matrix, WeightType, dequantize, from_stored
from shoal.kernels.arrays import Bytes
from shoal.kernels.errors import OperandError
from shoal.kernels.quantise import quantise
from shoal.models.checkpoint.weight_source import WeightSource
from shoal.offload.errors import PackError
from shoal.partition.spec import BlockId

from .layout import kept_type
from .manifest import Quant


class KeptMatrices:
    """The matrices of `source` as `quant` keeps them. Those that get other types are rounded when they are read, block
    by block of their rows, so it does not matter which rows are read together. Any thread may read."""

    def __init__(self, source: WeightSource, quant: Quant) -> None:
        self._source = source
        self._quant = quant

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        """Role → type that is kept, rows and columns."""
        return {
            role: (kept_type(role, kind, cols, self._quant), rows, cols)
            for role, (kind, rows, cols) in self._source.matrices(block).items()
        }

    def read_rows(self, block: BlockId, role: str, start: int, stop: int, into: Bytes) -> Matrix:
        """Rows [start, stop), read into `into`, uint8 (matrix_bytes,). Raises CheckpointError and
        PackError."""
        stored, _, cols = self._source.matrices(block)[role]
        kept = kept_type(role, stored, cols, self._quant)
        if kept is stored:
            return self._source.read_rows(block, role, start, stop, into)
        memory = np.empty(stored.matrix_bytes(stop - start, cols), np.uint8)
        matrix = self._source.read_rows(block, role, start, stop, memory)
        try:
            return from_stored(kept, stop - start, cols, quantise(kept, dequantize(matrix)), into)
        except OperandError as error:  # numbers that fewer bits cannot hold
            raise PackError(f"{self._source.path}: {role} of block {block}: {error}") from error
