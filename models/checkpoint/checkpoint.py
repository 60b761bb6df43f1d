"""A checkpoint: the user's files, read block by block.

Knows how blocks are put together from tensors: fused tensors are read apart by rows, one expert is read
out of a stack, vectors become f32. `gguf_file` and `hf_dir` know the containers, `families` the names of tensors and
the facts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from shoal.kernels import Matrix, WeightType, dequantize, from_stored, interleave
from shoal.kernels.arrays import Bytes, Floats
from shoal.kernels.huge_pages import Arena
from shoal.models.errors import CorruptCheckpoint, TokenizerError, UnsupportedCheckpoint, one_line
from shoal.models.families import Recipe, bias_shapes, recipe_from_gguf, recipe_from_hf, shapes
from shoal.models.families.tensors import NORMS
from shoal.models.texts import Texts
from shoal.models.tokenizer.file_costs import TokenizerMemory, tokenizer_memory, vocabulary_memory
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.models.weights import Weights
from shoal.partition.slicing import Range, Shard
from shoal.partition.spec import BlockId, BlockKind

from .foreign import check_directory, check_file, check_gguf
from .gguf_file import open_gguf
from .hf_dir import open_hf, read_advised
from .identity import Stamps, companions, replaced
from .tensor_files import StoredTensor, TensorFiles
from .weight_source import Piece, read_in_turn, read_whole

_SAMPLING = "general.sampling."
_LONG_LISTS = (
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
)

_PART_BYTES = 8 << 20  # how much of a quantised matrix is read at a time


class Place(NamedTuple):
    """Where a role of a block is stored. Several roles may be one below the other in one tensor."""

    tensor: StoredTensor
    first: int  # the role's first row in the tensor, or its first element in a vector
    shape: tuple[int, ...]  # of the role: (rows, columns), or (n,) for a vector


class SamplingAdvice(NamedTuple):
    """As it stands in a file, unchecked: `values` by key, without the keys' prefix."""

    origin: str
    prefix: str
    values: Mapping[str, Any]


class Checkpoint:
    """An open checkpoint; close it (or use `with`) when all blocks are read. Made by `open_checkpoint`.

    spec: the architecture.  path, name: where it is, what to call it.  kind: "gguf" or "hf".
    nbytes, parameters: stored bytes and number of the weights that the spec uses.
    types: stored type → number of tensors.  metadata: GGUF metadata or config.json.
    advice: what the model's makers advise for sampling.
    warnings: what is odd about the files, each in one line that names one of them.
    shard: always "whole"; `CheckpointShard` has what one rank holds.
    After `close` everything but reading still works, except that `metadata` loses its lists of tokens.
    Where the head is tied to the embedding (`spec.tied`), block `head` has no matrix: use that of `embed`.
    """

    shard: Literal["whole"] | Shard = "whole"

    def __init__(self, path: Path, kind: Literal["gguf", "hf"], files: TensorFiles, recipe: Recipe) -> None:
        self.path = path
        self.kind = kind
        self.spec = recipe.spec
        self.warnings = [one_line(said, 500) for said in recipe.warnings]
        self.metadata: Mapping[str, Any] = files.metadata
        self._tokenizer_memory: TokenizerMemory | None = None
        if kind == "gguf":  # now, since `metadata` may lose what it follows from
            tokens, merges = (self.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
            count, joins = (len(it) if isinstance(it, (list, Texts)) else 0 for it in (tokens, merges))
            text_bytes = tokens.nbytes if isinstance(tokens, Texts) else 0
            self._tokenizer_memory = vocabulary_memory(count, joins, text_bytes)
        self._files = files
        self._memory = Arena()
        self._recipe = recipe
        self._shapes: dict[BlockKind, dict[str, tuple[int, ...]]] = {
            kind: bias_shapes(self.spec, kind) | shapes(self.spec, kind) for kind in recipe.names
        }
        used = {
            tensor.name: tensor
            for block in self.spec.blocks()
            for tensor, _, _ in self._places(block).values()
        }
        if kind == "gguf":
            self._refuse_unknown(files.tensors.keys() - used.keys())
        self.nbytes = sum(tensor.nbytes for tensor in used.values())
        self.parameters = sum(tensor.weights for tensor in used.values())
        self.types: Mapping[str, int] = Counter(tensor.type.name for tensor in used.values())
        self.advice = self._advised_sampling()

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

    def _advised_sampling(self) -> SamplingAdvice:
        if self.kind == "gguf":
            keys = (key for key in self.metadata if key.startswith(_SAMPLING))
            given = {key.removeprefix(_SAMPLING): self.metadata[key] for key in keys}
            return SamplingAdvice(str(self.path), _SAMPLING, given)
        path = self.path / "generation_config.json"
        given, odd = read_advised(path)
        self._warn(odd)
        return SamplingAdvice(str(path), "", given)

    def block_bytes(self, block: BlockId) -> int:
        """What `read_block(block).nbytes` will be, without reading."""
        return sum(
            tensor.type.matrix_bytes(*shape) if len(shape) == 2 else 4 * shape[0]
            for tensor, _, shape in self._places(block).values()
        )

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Files are read when they are asked for."""

    def reserve(self, nbytes: int) -> None:
        """The matrices that are read next, of so many bytes together, all stay: they get one piece of memory."""
        self._memory.reserve(nbytes)

    def read_block(self, block: BlockId) -> Weights:
        """Reads the tensors of a block, quantised ones into bands. Raises CheckpointError."""
        return read_whole(self, block)

    def read_blocks(self, blocks: Iterable[BlockId]) -> Generator[tuple[BlockId, Weights], None, None]:
        """Each of the blocks with its weights; a tied head shares the embedding's bytes, so the embedding has to come
        before it. Raises CheckpointError."""
        return read_in_turn(self, blocks)

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        """Role → stored type, rows and columns of each matrix that `read_block` gives, without reading."""
        return {
            role: (tensor.type, *shape)
            for role, (tensor, _, shape) in self._places(block).items()
            if len(shape) == 2
        }

    def vector_lengths(self, block: BlockId) -> dict[str, int]:
        """Role → length of each vector that `read_block` gives, without reading."""
        places = self._places(block).items()
        return {role: place.shape[0] for role, place in places if len(place.shape) == 1}

    def read_rows(
        self,
        block: BlockId,
        role: str,
        start: int,
        stop: int,
        into: Bytes | None = None,
        columns: Range | None = None,
    ) -> Matrix:
        """Rows [start, stop) of one matrix of a block, as kernels want them. Raises CheckpointError.

        into: uint8 (matrix_bytes,) to read them into, by default new memory. columns: read only these, which have to be
        whole blocks of the matrix's type. Rows that cannot be read into their place are read in parts and moved there.
        """
        tensor, first, (rows, cols) = self._places(block)[role]
        assert 0 <= start <= stop <= rows
        kind, rows, first = tensor.type, stop - start, first + start
        columns = columns or Range(0, cols)
        memory = self._memory.take(kind.matrix_bytes(rows, columns.size)) if into is None else into
        matrix = Matrix(kind, memory, rows, columns.size)
        if not kind.quantised and columns.size == cols:
            self._files.read(tensor, first, rows, memory)
            return matrix
        mine = slice(*(kind.bytes_before(column) for column in columns))
        step = max(1, _PART_BYTES // kind.band_rows // tensor.row_bytes) * kind.band_rows
        part = Arena().take(min(step, rows) * tensor.row_bytes)  # malloc would keep what is freed
        for done in range(0, rows, step):
            count = min(step, rows - done)
            stored = part[: count * tensor.row_bytes]
            self._files.read(tensor, first + done, count, stored)
            bands = memory[
                kind.matrix_bytes(done, columns.size) : kind.matrix_bytes(done + count, columns.size)
            ]
            interleave(kind, np.ascontiguousarray(stored.reshape(count, -1)[:, mine]), bands)
        return matrix

    def read_vectors(self, block: BlockId) -> dict[str, Floats]:
        """The norms and biases of a block, f32 (n,), by role. Raises CheckpointError."""
        vectors: dict[str, Floats] = {}
        for role, (tensor, first, shape) in self._places(block).items():
            if len(shape) == 1:
                stored = from_stored(tensor.type, 1, tensor.weights, self._files.read(tensor))
                vector = dequantize(stored).reshape(-1)[first : first + shape[0]]
                shift = self._recipe.norm_shift if role in NORMS else 0.0
                vectors[role] = vector + shift if shift else vector
        return vectors

    def bypass_cache(self) -> None:
        """From now on what was read does not stay in the system's page cache."""
        self._files.drops_pages = True

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self._files.paths

    @property
    def cut_short(self) -> list[tuple[Path, int, int]]:
        """Files that end before their tensors do: their bytes, and those that they should have."""
        return self._files.cut_short()

    @property
    def stamps(self) -> Stamps:
        """All files that say something about the model, as they were before they were read."""
        return self._files.stamps

    def replaced(self) -> Path | None:
        """One of its files in whose place is another now; None if they are the same."""
        return replaced(self._files.stamps, companions(self.path) if self.kind == "hf" else ())

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; what is odd about it is added to `warnings`. Raises TokenizerError, which names a
        file."""
        try:
            gguf = self.kind == "gguf"
            made = Tokenizer.from_gguf(self.metadata) if gguf else Tokenizer.from_hf(self.path)
        except TokenizerError as error:
            raise TokenizerError(self._with_path(str(error))) from error
        odd = [*map(self._with_path, made.warnings)]
        if made.vocab_size > (rows := self.spec.vocab):
            odd.append(
                f"{self.path}: the tokenizer has {made.vocab_size} tokens, the embedding {rows} rows; texts that need "
                "others are refused"
            )
        self._warn(odd)
        return made

    def _warn(self, odd: Iterable[str]) -> None:
        self.warnings += [said for said in odd if said not in self.warnings]

    def tokenizer_memory(self) -> TokenizerMemory:
        """What `tokenizer` takes of memory, as far as its file tells."""
        if self._tokenizer_memory is None:
            self._tokenizer_memory = tokenizer_memory(self.path, self.spec.vocab)
        return self._tokenizer_memory

    def _with_path(self, message: str) -> str:
        return message if str(self.path) in message else f"{self.path}: {message}"

    def forget_tokens(self) -> None:
        """Frees the lists of tokens in `metadata`, tens of megabytes for a large vocabulary. `tokenizer` needs them, so
        it cannot be called afterwards."""
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

    def _places(self, block: BlockId) -> dict[str, Place]:
        """Role → where it is stored, for each role of a block; the shapes of tensors are checked against the spec."""
        shapes = self._shapes[block.kind]
        places: dict[str, Place] = {}
        for joined, template in self._recipe.names[block.kind].items():
            name = template.format(layer=block.layer, expert=block.expert)
            roles = joined.split("+")
            rows = sum(shapes[role][0] for role in roles)
            stacked = block.expert >= 0 and "{expert}" not in template
            tensor = self._tensor(name, (rows, *shapes[roles[0]][1:]), stacked)
            first = rows * block.expert if stacked else 0
            for role in roles:
                places[role] = Place(tensor, first, shapes[role])
                first += shapes[role][0]
        return places

    def _tensor(self, name: str, shape: tuple[int, ...], stacked: bool) -> StoredTensor:
        """The tensor with this name and shape; if `stacked`, with this shape for each expert."""
        single = name.replace("_exps.weight", ".0.weight")
        if stacked and name not in self._files.tensors and single in self._files.tensors:
            raise UnsupportedCheckpoint(
                f"{self.path}: has each expert in a tensor of its own ({single}), an old form of GGUF; "
                "convert the model again"
            )
        tensor = self._files.find(name)
        expected = shape
        if stacked:
            assert self.spec.moe is not None
            expected = (self.spec.moe.experts, *shape)
        # Some writers store a matrix of one row as a vector.
        if tensor.shape != expected and not (shape[0] == 1 and tensor.shape == shape[1:]):
            raise CorruptCheckpoint(
                f"{self._files.paths[tensor.file]}: tensor {tensor.name} has shape {tensor.shape}, "
                f"the configuration asks for {expected}"
            )
        return tensor

    def _refuse_unknown(self, unused: set[str]) -> None:
        """A model computes with everything that its GGUF holds, so its results are wrong if a tensor is left out."""
        unknown = sorted(name for name in unused if "rope_" not in name and "rot_embd" not in name)
        if unknown:
            raise UnsupportedCheckpoint(
                f"{self.path}: tensor {unknown[0]} has no place in the family {self.spec.family!r} as Shoal computes "
                f"it ({len(unknown)} such); its results would be wrong"
            )


def open_checkpoint(path: str | Path, *, whole: bool = True) -> Checkpoint:
    """Opens a Hugging Face directory or a GGUF file and checks that every tensor of the model is there. If it need not
    be `whole`, headers are enough, without the data behind them, of which nothing can be read then.

    Raises MissingCheckpoint, CorruptCheckpoint or UnsupportedCheckpoint, each with one line that says what and where.
    """
    path = Path(path)
    if is_directory := path.is_dir():
        check_directory(path)
        files = open_hf(path, whole=whole)
    else:
        check_file(path)
        files = open_gguf(path, whole=whole)
    try:
        if is_directory:
            recipe = recipe_from_hf(files.metadata, str(path / "config.json"), files.names, files.same)
            return Checkpoint(path, "hf", files, recipe)
        check_gguf(path, files.metadata, files.tensors)
        return Checkpoint(path, "gguf", files, recipe_from_gguf(files))
    except BaseException:
        files.close()
        raise
