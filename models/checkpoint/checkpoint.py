"""A checkpoint: the user's files, read block by block.

Knows how blocks are put together from tensors: fused tensors are read apart by rows, one expert is read
out of a stack, vectors become f32. Container formats are `gguf_file` and `hf_dir`, names and facts `families`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from shoal.kernels import Matrix, WeightType, dequantize, from_stored, interleave
from shoal.kernels.arrays import Bytes, Floats
from shoal.kernels.huge_pages import Arena
from shoal.models.errors import CorruptCheckpoint, MissingCheckpoint, UnsupportedCheckpoint
from shoal.models.families import Recipe, bias_shapes, recipe_from_gguf, recipe_from_hf, shapes
from shoal.models.families.tensors import NORMS
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.models.weights import Weights
from shoal.partition.slicing import Range, Shard
from shoal.partition.spec import BlockId, BlockKind

from .gguf_file import MAGIC, open_gguf
from .hf_dir import open_hf, read_json
from .tensor_files import StoredTensor, TensorFiles, unreadable

_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
}
_LONG_LISTS = (
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
)

_PART_BYTES = 8 << 20  # of quantised weights read at a time


class Piece(NamedTuple):
    """Rows [first_row, first_row + rows) of a tensor, which hold these roles one below the other."""

    tensor: StoredTensor
    first_row: int
    rows: int
    roles: tuple[str, ...]


class Checkpoint:
    """An open checkpoint; close it (or use `with`) when all blocks are read. Made by `open_checkpoint`.

    spec: the architecture.  path, name: where it is, what to call it.  kind: "gguf" or "hf".
    nbytes, parameters: stored bytes and number of the weights that the spec uses.
    types: stored type → number of tensors.  metadata: GGUF metadata or config.json.
    defaults: temperature, top_k and top_p as far as the model's makers advise them.
    All but reading goes on working after `close`, except that the lists of tokens leave `metadata`.
    Where the head is tied to the embedding (`spec.tied`), block `head` has no matrix: use that of `embed`.
    shard: what of the model it is (`checkpoint_shard` has the others).
    """

    shard: Literal["whole"] | Shard = "whole"

    def __init__(self, path: Path, kind: Literal["gguf", "hf"], files: TensorFiles, recipe: Recipe) -> None:
        self.path = path
        self.kind = kind
        self.spec = recipe.spec
        self.metadata: Mapping[str, Any] = files.metadata
        self._files = files
        self._memory = Arena()
        self._recipe = recipe
        self._shapes: dict[BlockKind, dict[str, tuple[int, ...]]] = {
            kind: bias_shapes(self.spec, kind) | shapes(self.spec, kind) for kind in recipe.names
        }
        used = {
            piece.tensor.name: piece.tensor for block in self.spec.blocks() for piece in self._pieces(block)
        }
        if kind == "gguf":
            self._refuse_unknown(files.tensors.keys() - used.keys())
        self.nbytes = sum(tensor.nbytes for tensor in used.values())
        self.parameters = sum(tensor.weights for tensor in used.values())
        self.types: Mapping[str, int] = Counter(tensor.type.name for tensor in used.values())
        self.defaults = self._advised_sampling()

    @property
    def name(self) -> str:
        """What the files call the model, else the name of the file or directory."""
        given = self.metadata.get("general.name")
        if isinstance(given, str) and given.strip():
            return given.strip()
        if self.kind == "gguf":
            return self.path.stem
        hub = re.fullmatch(r"models--(.+)", self.path.absolute().parent.parent.name)
        return hub[1].replace("--", "/") if hub else self.path.absolute().name

    def _advised_sampling(self) -> dict[str, Any]:
        if self.kind == "gguf":
            given = {ours: self.metadata.get(theirs) for ours, theirs in _SAMPLING.items()}
        else:
            path = self.path / "generation_config.json"
            config = read_json(path) if path.is_file() else {}
            given = {key: config.get(key) for key in _SAMPLING} if config.get("do_sample") is True else {}
        return {k: v for k, v in given.items() if isinstance(v, int | float) and not isinstance(v, bool)}

    def block_bytes(self, block: BlockId) -> int:
        """What `read_block(block).nbytes` will be, without reading."""
        shapes = self._shapes[block.kind]
        total = 0
        for tensor, _, _, roles in self._pieces(block):
            if len(shapes[roles[0]]) == 1:
                total += 4 * tensor.weights
            else:
                total += sum(tensor.type.matrix_bytes(*shapes[role]) for role in roles)
        return total

    def read_block(self, block: BlockId) -> Weights:
        """Reads the tensors of a block, quantised ones into bands. Raises CheckpointError."""
        matrices = {
            role: self._matrix(tensor, first_row, rows)
            for role, (tensor, first_row, rows) in self._matrices(block).items()
        }
        return Weights(matrices, self.read_vectors(block))

    def read_blocks(self, blocks: Iterable[BlockId]) -> Generator[tuple[BlockId, Weights], None, None]:
        """Each of the blocks with its weights; a tied head shares the bytes of the embedding, which comes before it.
        Raises CheckpointError."""
        return read_in_turn(self.read_block, blocks, self.spec.tied)

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        """Role → stored type, rows and columns of each matrix that `read_block` gives, without reading."""
        return {
            role: (tensor.type, rows, tensor.shape[-1])
            for role, (tensor, _, rows) in self._matrices(block).items()
        }

    def vector_lengths(self, block: BlockId) -> dict[str, int]:
        """Role → length of each vector that `read_block` gives, without reading."""
        shapes = self._shapes[block.kind]
        roles = (role for piece in self._pieces(block) for role in piece.roles)
        return {role: shapes[role][0] for role in roles if len(shapes[role]) == 1}

    def read_rows(
        self,
        block: BlockId,
        role: str,
        start: int,
        stop: int,
        into: Bytes | None = None,
        columns: Range | None = None,
    ) -> Matrix:
        """Rows [start, stop) of one matrix of a block, of their columns only those that are asked for, which have to be
        whole blocks of its type; `into` is memory for them (`matrix_bytes`), by default new. Raises
        CheckpointError.
        """
        tensor, first_row, rows = self._matrices(block)[role]
        assert 0 <= start <= stop <= rows
        return self._matrix(tensor, first_row + start, stop - start, into, columns)

    def read_vectors(self, block: BlockId) -> dict[str, Floats]:
        """The norms and biases of a block, f32 (n,), by role. Raises CheckpointError."""
        shapes = self._shapes[block.kind]
        vectors: dict[str, Floats] = {}
        for tensor, first_row, rows, roles in self._pieces(block):
            if len(shapes[roles[0]]) == 1:
                stored = self._files.read(tensor, first_row, rows)
                row = self._vector(roles[0], from_stored(tensor.type, rows, tensor.shape[-1], stored))
                ends = np.cumsum([shapes[role][0] for role in roles])
                vectors.update(zip(roles, np.split(row, ends[:-1]), strict=True))
        return vectors

    def bypass_cache(self) -> None:
        """From now on what was read does not stay in the system's page cache."""
        self._files.drops_pages = True

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self._files.paths

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises TokenizerError."""
        return Tokenizer.from_gguf(self.metadata) if self.kind == "gguf" else Tokenizer.from_hf(self.path)

    def forget_tokens(self) -> None:
        """Frees the lists of tokens in `metadata`, tens of megabytes of a large vocabulary: no `tokenizer` after."""
        self.metadata = {key: value for key, value in self.metadata.items() if key not in _LONG_LISTS}
        self._files.metadata = self.metadata

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
        self.forget_tokens()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _matrices(self, block: BlockId) -> dict[str, tuple[StoredTensor, int, int]]:
        """Role → tensor, its first row and number of rows of each matrix of a block."""
        shapes = self._shapes[block.kind]
        found = {}
        for tensor, first_row, _, roles in self._pieces(block):
            if len(shapes[roles[0]]) == 1:
                continue
            for role in roles:
                found[role] = (tensor, first_row, shapes[role][0])
                first_row += shapes[role][0]
        return found

    def _matrix(
        self,
        tensor: StoredTensor,
        first_row: int,
        rows: int,
        memory: Bytes | None = None,
        columns: Range | None = None,
    ) -> Matrix:
        """Rows [first_row, first_row + rows) as kernels want them; those that have to move are read in parts."""
        kind, columns = tensor.type, columns or Range(0, tensor.shape[-1])
        cols = columns.size
        if memory is None:
            memory = self._memory.take(kind.matrix_bytes(rows, cols))
        if not kind.quantised and cols == tensor.shape[-1]:
            self._files.read(tensor, first_row, rows, memory)
            return Matrix(kind, memory, rows, cols)
        mine = slice(*(kind.bytes_before(column) for column in columns))
        step = max(1, _PART_BYTES // kind.band_rows // tensor.row_bytes) * kind.band_rows
        part = Arena().take(min(step, rows) * tensor.row_bytes)  # malloc would keep what is freed
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            stored = part[: (stop - start) * tensor.row_bytes]
            self._files.read(tensor, first_row + start, stop - start, stored)
            into = memory[kind.matrix_bytes(start, cols) : kind.matrix_bytes(stop, cols)]
            interleave(kind, np.ascontiguousarray(stored.reshape(stop - start, -1)[:, mine]), into)
        return Matrix(kind, memory, rows, cols)

    def _vector(self, role: str, matrix: Matrix) -> Floats:
        """→ (n,) f32"""
        values = dequantize(matrix).reshape(-1)
        return values + self._recipe.norm_shift if role in NORMS and self._recipe.norm_shift else values

    def _pieces(self, block: BlockId) -> list[Piece]:
        """The rows of tensors that make a block, their shapes checked against the spec."""
        pieces = []
        for joined, template in self._recipe.names[block.kind].items():
            name = template.format(layer=block.layer, expert=block.expert)
            stacked = block.expert >= 0 and "{expert}" not in template
            tensor = self._find(name, block, stacked)
            roles = tuple(joined.split("+"))
            pieces.append(self._piece(tensor, block, roles, stacked))
        return pieces

    def _piece(self, tensor: StoredTensor, block: BlockId, roles: tuple[str, ...], stacked: bool) -> Piece:
        parts = [self._shapes[block.kind][role] for role in roles]
        shape: tuple[int, ...] = (sum(part[0] for part in parts), *parts[0][1:])
        rows = shape[0] if len(shape) == 2 else 1
        expected = shape
        if stacked:
            assert self.spec.moe is not None
            expected = (self.spec.moe.experts, *shape)
        # a matrix of one row is stored as a vector by some writers
        if tensor.shape != expected and not (shape[0] == 1 and tensor.shape == shape[1:]):
            raise CorruptCheckpoint(
                f"{self._files.paths[tensor.file]}: tensor {tensor.name} has shape {tensor.shape}, "
                f"the configuration asks for {expected}"
            )
        return Piece(tensor, rows * block.expert if stacked else 0, rows, roles)

    def _refuse_unknown(self, unused: set[str]) -> None:
        """A GGUF holds what its model computes with, so a tensor without a place would be a silent error."""
        unknown = sorted(name for name in unused if "rope_" not in name and "rot_embd" not in name)
        if unknown:
            raise UnsupportedCheckpoint(
                f"{self.path}: tensor {unknown[0]} has no place in the family {self.spec.family!r} as Shoal computes "
                f"it ({len(unknown)} such); its results would be wrong"
            )

    def _find(self, name: str, block: BlockId, stacked: bool) -> StoredTensor:
        try:
            return self._files.find(name)
        except MissingCheckpoint:
            single = name.replace("_exps.weight", ".0.weight")
            if stacked and single in self._files.tensors:
                raise UnsupportedCheckpoint(
                    f"{self.path}: has each expert in a tensor of its own ({single}), an old form of GGUF; "
                    "convert the model again"
                ) from None
            raise


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face directory or a GGUF file and checks that every tensor of the model is there.

    Raises MissingCheckpoint, CorruptCheckpoint or UnsupportedCheckpoint, each with one line that says what and where.
    """
    path = Path(path)
    if path.is_dir():
        _check_directory(path)
        files = open_hf(path)
    else:
        _check_magic(path)
        files = open_gguf(path)
    try:
        if path.is_dir():
            recipe = recipe_from_hf(files.metadata, str(path / "config.json"), files.tensors)
            return Checkpoint(path, "hf", files, recipe)
        return Checkpoint(path, "gguf", files, recipe_from_gguf(files))
    except BaseException:
        files.close()
        raise


def _check_directory(path: Path) -> None:
    """Raises MissingCheckpoint, naming what the user may have meant."""
    if os.path.lexists(path / "config.json"):
        return
    inside = sorted(path.glob("*.gguf"))
    instead = f"; give the GGUF file itself: {inside[0]}" if inside else ""
    raise MissingCheckpoint(f"{path}: is not a model directory: it has no config.json{instead}")


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except FileNotFoundError as error:
        raise MissingCheckpoint(f"{path}: there is no such file or directory") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if start != MAGIC:
        raise UnsupportedCheckpoint(
            f"{path}: is neither a GGUF file nor a directory with config.json and safetensors"
        )


def read_in_turn(
    read: Callable[[BlockId], Weights], blocks: Iterable[BlockId], tied: bool
) -> Generator[tuple[BlockId, Weights], None, None]:
    """Blocks as `read` gives them; a tied head is the embedding, which has to come before it."""
    for block in blocks:
        weights = read(block)
        if block.kind == "embed":
            table = weights.matrix["embed"]
        elif block.kind == "head" and tied:
            weights = Weights({"head": table}, weights.vector)
        yield block, weights
