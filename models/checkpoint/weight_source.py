"""What the weights of a model, or of a rank's shard of one, are read from: files, or a machine that has the files.

Packs are made from it and stores are loaded from it. So both work on a machine that has no files of the model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from shoal.kernels import Matrix, WeightType
from shoal.kernels.arrays import Bytes, Floats
from shoal.models.weights import Weights
from shoal.partition.slicing import Shard
from shoal.partition.spec import BlockId, ModelSpec

from .identity import Stamps


class Piece(NamedTuple):
    """Rows [start, stop) of one matrix of a block, or elements [start, stop) of one of its vectors."""

    block: BlockId
    role: str
    start: int
    stop: int


class Described(Protocol):
    """What is known of a model before anything of it is read. See `Checkpoint` for what the attributes are."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def shard(self) -> Literal["whole"] | Shard: ...

    @property
    def name(self) -> str: ...

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        """Role → type, rows and columns of each matrix of a block."""
        ...

    def vector_lengths(self, block: BlockId) -> dict[str, int]:
        """Role → length of each vector of a block."""
        ...


class WeightSource(Described, Protocol):
    """A machine without files has no `files` and no `stamps`."""

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> Literal["gguf", "hf"]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def stamps(self) -> Stamps: ...

    def bypass_cache(self) -> None:
        """From now on what was read does not stay in the system's page cache."""
        ...

    def expect(self, pieces: Iterable[Piece]) -> None:
        """The caller will read these next, in this order. Who has to fetch them from elsewhere begins to."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Matrices of so many bytes will be read that all stay in memory: they get one piece of it."""
        ...

    def read_rows(
        self, block: BlockId, role: str, start: int, stop: int, into: Bytes | None = None
    ) -> Matrix:
        """Rows [start, stop) of one matrix of a block, as kernels want them; into: uint8 (matrix_bytes,)."""
        ...

    def read_vectors(self, block: BlockId) -> dict[str, Floats]:
        """The norms and biases of a block, f32 (n,), by role."""
        ...

    def read_block(self, block: BlockId) -> Weights: ...

    def read_blocks(self, blocks: Iterable[BlockId]) -> Generator[tuple[BlockId, Weights], None, None]: ...


def read_whole(source: WeightSource, block: BlockId) -> Weights:
    """All of one block. Raises what the source raises."""
    matrices = {
        role: source.read_rows(block, role, 0, rows) for role, (_, rows, _) in source.matrices(block).items()
    }
    return Weights(matrices, source.read_vectors(block))


def read_in_turn(
    source: WeightSource, blocks: Iterable[BlockId]
) -> Generator[tuple[BlockId, Weights], None, None]:
    """Blocks as the source reads them; a tied head gets the matrix of the embedding, which has to come before it."""
    for block in blocks:
        weights = source.read_block(block)
        if block.kind == "embed":
            table = weights.matrix["embed"]
        elif block.kind == "head" and source.spec.tied:
            weights = Weights({"head": table}, weights.vector)
        yield block, weights
