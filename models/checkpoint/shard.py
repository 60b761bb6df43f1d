"""A rank's shard of a checkpoint: it reads like a checkpoint of a smaller model of the same hidden size.

Knows which rows and columns of each role a shard's ranges are. Rows are read as they are. Of columns, whole blocks of
the stored rows are taken, so that no weight is rounded anew. `partition.slicing` decides which rank holds what.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Literal

from shoal.kernels import Matrix, WeightType
from shoal.kernels.arrays import Bytes, Floats
from shoal.models.weights import Weights
from shoal.partition.slicing import Range, Shard, shard_spec
from shoal.partition.spec import BlockId, BlockKind, ModelSpec

from .checkpoint import Checkpoint
from .weight_source import Piece, read_in_turn, read_whole

# These biases are added to a sum over ranks, so only one rank may add them.
_SUMMED = frozenset({"o_bias", "down_bias"})


class CheckpointShard:
    """What one rank holds of an open checkpoint, whose files and description it shares. `spec`: of the smaller model.

    Its methods are those of `Checkpoint`; rows and columns are counted from the first that the shard holds.
    """

    def __init__(self, whole: Checkpoint, shard: Shard) -> None:
        self._whole = whole
        self.shard: Literal["whole"] | Shard = shard
        self.spec = shard_spec(whole.spec, shard)
        self.path, self.kind = whole.path, whole.kind
        self.name, self.files, self.stamps = whole.name, whole.files, whole.stamps
        self._rows = rows_held(shard, whole.spec)
        self._columns = columns_held(shard)
        self._without = frozenset() if shard.has_sum_biases else _SUMMED

    def bypass_cache(self) -> None:
        self._whole.bypass_cache()

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        found = {}
        for role, (kind, rows, cols) in self._whole.matrices(block).items():
            own_rows = self._rows.get((block.kind, role), Range(0, rows))
            own_columns = self._columns.get((block.kind, role), Range(0, cols))
            found[role] = (kind, own_rows.size, own_columns.size)
        return found

    def vector_lengths(self, block: BlockId) -> dict[str, int]:
        return {
            role: self._rows.get((block.kind, role), Range(0, length)).size
            for role, length in self._whole.vector_lengths(block).items()
            if role not in self._without
        }

    def block_bytes(self, block: BlockId) -> int:
        """What `read_block(block).nbytes` will be, without reading."""
        matrices = sum(kind.matrix_bytes(rows, cols) for kind, rows, cols in self.matrices(block).values())
        return matrices + 4 * sum(self.vector_lengths(block).values())

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Files are read when they are asked for."""

    def reserve(self, nbytes: int) -> None:
        self._whole.reserve(nbytes)

    def read_block(self, block: BlockId) -> Weights:
        """Raises CheckpointError."""
        return read_whole(self, block)

    def read_blocks(self, blocks: Iterable[BlockId]) -> Generator[tuple[BlockId, Weights], None, None]:
        """Raises CheckpointError."""
        return read_in_turn(self, blocks)

    def read_rows(
        self, block: BlockId, role: str, start: int, stop: int, into: Bytes | None = None
    ) -> Matrix:
        """Raises CheckpointError."""
        first = self._rows.get((block.kind, role), Range(0, stop)).start
        columns = self._columns.get((block.kind, role))
        return self._whole.read_rows(block, role, first + start, first + stop, into, columns)

    def read_vectors(self, block: BlockId) -> dict[str, Floats]:
        """Raises CheckpointError."""
        return {
            role: vector[slice(*self._rows.get((block.kind, role), Range(0, len(vector))))]
            for role, vector in self._whole.read_vectors(block).items()
            if role not in self._without
        }


AnyCheckpoint = Checkpoint | CheckpointShard


def rows_held(shard: Shard, spec: ModelSpec) -> dict[tuple[BlockKind, str], Range]:
    """(kind of block, role) → what the shard has of matrices that are cut by rows, and of vectors that are cut."""
    own = shard.ranges
    q, kv = own.heads.times(spec.head_dim), own.kv_heads.times(spec.head_dim)
    cut: dict[tuple[BlockKind, str], Range] = {
        ("embed", "embed"): own.vocab,
        ("attn", "q"): q,
        ("attn", "k"): kv,
        ("attn", "v"): kv,
        ("ffn", "gate"): own.ffn,
        ("ffn", "up"): own.ffn,
        ("expert", "gate"): own.expert_ffn,
        ("expert", "up"): own.expert_ffn,
        ("router", "shared_gate"): own.shared_ffn,
        ("router", "shared_up"): own.shared_ffn,
        ("head", "head"): own.vocab,
    }
    cut |= {(kind, f"{role}_bias"): rows for (kind, role), rows in cut.items()}
    if spec.qk_norm == "full":
        cut |= {("attn", "q_norm"): q, ("attn", "k_norm"): kv}
    return cut


def columns_held(shard: Shard) -> dict[tuple[BlockKind, str], Range]:
    """(kind of block, role) → what the shard has of the matrices that are cut by columns."""
    own = shard.ranges
    return {
        ("attn", "o"): own.o_columns,
        ("ffn", "down"): own.ffn,
        ("expert", "down"): own.expert_ffn,
        ("router", "shared_down"): own.shared_ffn,
    }
