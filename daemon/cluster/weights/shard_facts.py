"""The facts of a shard of a model that is on another machine: its blocks, their types and sizes.

Both sides know them. So the worker believes no length that comes over the network, and the head refuses what the shard
does not have. Knows no files and no channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from shoal.daemon.errors import DaemonError
from shoal.kernels import WeightType
from shoal.kernels.errors import KernelError
from shoal.kernels.types import weight_type
from shoal.models.checkpoint.weight_source import Piece, WeightSource
from shoal.models.families import bias_shapes, shapes
from shoal.offload.pack.kept import KeptMatrices
from shoal.offload.pack.manifest import KERNEL_LAYOUT, PACK_FORMAT, VECTORS_BYTES, Quant
from shoal.partition.errors import PartitionError
from shoal.partition.slicing import Range, Shard, shard_spec
from shoal.partition.spec import BlockId, BlockKind, ModelSpec

from .weight_messages import MOST_BLOCKS, MOST_FORMS, MOST_PIECE_BYTES, PIECE_BYTES, BlockForm, Description

RowsHeld = Mapping[tuple[BlockId, str], Range]
"""Block and role → the rows of a shard's matrix that somebody has."""

_FLOAT_BYTES = 4
_MOST_RANKS = 4096
_MOST_ROWS = 1 << 40  # beyond which no range of a shard ends


class BlockFacts(NamedTuple):
    """Role → type, rows and columns of each matrix of a block, and role → length of each vector."""

    matrices: dict[str, tuple[WeightType, int, int]]
    lengths: dict[str, int]


class ShardFacts:
    """What follows from a description. Raises DaemonError `corrupt` for one that no shard can have.

    spec: of the smaller model.  content: names the bytes of the shard, as a word that a file may be called.
    nbytes: of all its weights in memory.
    """

    def __init__(self, description: Description) -> None:
        self.description = description
        self.name, self.shard, self.quant = description.name, description.shard, description.quant
        try:
            self.spec = described_spec(description)
            self._facts = dict(zip(self.spec.blocks(), self._found(description), strict=True))
        except (PartitionError, KernelError, ValueError) as error:
            raise DaemonError("corrupt", f"the head described a shard that cannot be: {error}") from error
        self.form = _digest(self.spec, self.shard, description)
        self.content = f"{self.form}.{description.key}"
        self.nbytes = sum(map(self._block_bytes, self._facts))
        if sum(sum(facts.lengths.values()) for facts in self._facts.values()) > VECTORS_BYTES // _FLOAT_BYTES:
            raise DaemonError("corrupt", "the head described a shard with more vectors than any model has")

    def _found(self, description: Description) -> Iterator[BlockFacts]:
        """The facts of each block, made once for each kind and form. Raises KernelError or ValueError."""
        made: dict[tuple[BlockKind, int], BlockFacts] = {}
        for block, at in zip(self.spec.blocks(), description.form_of, strict=True):
            if (block.kind, at) not in made:
                if not 0 <= at < len(description.forms):
                    raise ValueError(f"form {at} of {len(description.forms)}")
                made[block.kind, at] = _kind_facts(self.spec, block.kind, description.forms[at])
            yield made[block.kind, at]

    @property
    def blocks(self) -> Sequence[BlockId]:
        """In the order of a step."""
        return [*self._facts]

    def has(self, block: BlockId) -> bool:
        return block in self._facts

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        """Role → type, rows and columns."""
        return self._facts[block].matrices

    def matrix_bytes(self, block: BlockId) -> int:
        return sum(kind.matrix_bytes(rows, cols) for kind, rows, cols in self.matrices(block).values())

    def vector_lengths(self, block: BlockId) -> dict[str, int]:
        return self._facts[block].lengths

    def piece_bytes(self, piece: Piece) -> int:
        """The length of a piece. Raises DaemonError `bad_request` if the shard has no such piece."""
        matrices, lengths = self._facts.get(piece.block, _NOTHING)
        start, stop = piece.start, piece.stop
        if piece.role in lengths and 0 <= start < stop <= lengths[piece.role]:
            return _FLOAT_BYTES * (stop - start)
        if piece.role in matrices:
            kind, rows, cols = matrices[piece.role]
            whole = start % kind.band_rows == 0 and (stop % kind.band_rows == 0 or stop == rows)
            if 0 <= start < stop <= rows and whole:
                nbytes = kind.matrix_bytes(stop - start, cols)
                if nbytes <= max(MOST_PIECE_BYTES, kind.matrix_bytes(1, cols)):
                    return nbytes
        raise DaemonError(
            "bad_request", f"the shard has no piece {piece.role}[{start}:{stop}] of {piece.block}"
        )

    def cut(self, piece: Piece, bounds: Collection[int] = ()) -> Iterator[Piece]:
        """The pieces, each small enough to be asked for, that make up a larger one, which begins with a whole band.
        None goes over one of `bounds`, as far as these are between bands."""
        block, role = piece.block, piece.role
        step, unit = PIECE_BYTES // _FLOAT_BYTES, 1
        if role in self.matrices(block):
            kind, _, cols = self.matrices(block)[role]
            unit = kind.band_rows
            step = max(1, PIECE_BYTES // kind.matrix_bytes(unit, cols)) * unit
        within = {bound for bound in bounds if piece.start < bound < piece.stop and bound % unit == 0}
        for first, last in pairwise((piece.start, *sorted(within), piece.stop)):
            for start in range(first, last, step):
                yield Piece(block, role, start, min(start + step, last))

    def _block_bytes(self, block: BlockId) -> int:
        return self.matrix_bytes(block) + _FLOAT_BYTES * sum(self.vector_lengths(block).values())


_NOTHING = BlockFacts({}, {})


def described(part: WeightSource, whole: ModelSpec, shard: Shard, quant: Quant, key: str) -> Description:
    """The description of a shard that is here: `part` of the model with the spec `whole`. Raises DaemonError."""
    kept = KeptMatrices(part, quant)
    forms: dict[bytes, tuple[int, BlockForm]] = {}
    form_of = []
    for block in part.spec.blocks():
        types = {role: kind.id for role, (kind, _, _) in kept.matrices(block).items()}
        form = BlockForm(types, list(part.vector_lengths(block)))
        form_of.append(forms.setdefault(msgspec.msgpack.encode(form), (len(forms), form))[0])
    if len(form_of) > MOST_BLOCKS or len(forms) > MOST_FORMS:
        raise DaemonError(
            "unsupported",
            f"{part.name} has {len(form_of)} blocks in {len(forms)} forms, too many for a group",
        )
    name = "".join(letter for letter in part.name if letter.isprintable())[:200]
    return Description(name, key, whole, shard, quant, [form for _, form in forms.values()], form_of)


def described_spec(description: Description) -> ModelSpec:
    """The spec of the smaller model, which has a bounded number of blocks. Raises PartitionError or ValueError."""
    shard = description.shard
    if not 0 <= shard.rank < shard.ranks <= _MOST_RANKS:
        raise ValueError(f"rank {shard.rank} of {shard.ranks}")
    for name, own in vars(shard.ranges).items():
        if isinstance(own, Range) and not 0 <= own.start <= own.stop <= _MOST_ROWS:
            raise ValueError(f"{name} from {own.start} to {own.stop}")
    spec = shard_spec(description.spec, shard)
    experts = len(spec.moe.own) if spec.moe else 0
    most = 2 + sum(2 + experts if layer.moe else 2 for layer in spec.layers)
    if most > MOST_BLOCKS + 2:
        raise ValueError(f"about {most} blocks, more than {MOST_BLOCKS}")
    return spec


def _kind_facts(spec: ModelSpec, kind: BlockKind, form: BlockForm) -> BlockFacts:
    """Raises KernelError or ValueError unless the form has what such a block must have."""
    needed, biases = shapes(spec, kind), bias_shapes(spec, kind)
    if form.types.keys() != {role for role, shape in needed.items() if len(shape) == 2}:
        raise ValueError(f"a block {kind} with the matrices {', '.join(form.types)}")
    lengths = {role: shape[0] for role, shape in (needed | biases).items() if len(shape) == 1}
    required = {role for role, shape in needed.items() if len(shape) == 1}
    if not required <= set(form.vectors) <= lengths.keys() or len(set(form.vectors)) < len(form.vectors):
        raise ValueError(f"a block {kind} with the vectors {', '.join(form.vectors)}")
    matrices = {}
    for role, id in form.types.items():
        rows, cols = needed[role]
        matrices[role] = (weight_type(id), rows, cols)
        weight_type(id).matrix_bytes(rows, cols)  # raises where rows are not whole blocks
    return BlockFacts(matrices, {role: lengths[role] for role in form.vectors})


def _digest(spec: ModelSpec, shard: Shard, description: Description) -> str:
    """Of all that decides which bytes a pack of the shard has, except the model's files."""
    own = (shard.has_sum_biases, shard.ranges, description.quant, description.forms, description.form_of)
    return hashlib.sha256(msgspec.msgpack.encode((PACK_FORMAT, KERNEL_LAYOUT, spec, own))).hexdigest()[:16]
