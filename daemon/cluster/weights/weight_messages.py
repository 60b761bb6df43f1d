"""What a worker asks the head for, and the answers: pieces of matrices and vectors of the worker's shard.

The bytes of a piece follow `PieceFollows` as one binary frame. Its length is not said: both sides know it from the
description of the shard (`shard_facts`). Questions name the content that they are about. So another worker can answer
them, once it was told the description (`Lacks`); what it lends is believed if it has the digest that the head says.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from msgspec import Meta, Struct

from shoal.comm.messages import ErrorCode
from shoal.kernels.arrays import Bytes
from shoal.offload.pack.manifest import Quant
from shoal.partition.slicing import Shard
from shoal.partition.spec import BlockId, ModelSpec

PIECE_BYTES = 1 << 20  # that a worker asks for at a time
MOST_PIECE_BYTES = 8 << 20  # that the head sends at a time, unless a single band of rows is larger
QUESTION_BYTES = 1 << 10
ANSWER_BYTES = 4 << 10
DESCRIPTION_BYTES = 1 << 20
HOLDS_BYTES = 1 << 20
MOST_BLOCKS = 1 << 18
MOST_FORMS = 1 << 10
MOST_HELD = 1 << 12  # kinds of rows that a worker says it has
PIECE_DIGEST_BYTES = 32
CHANNEL_IDLE_S = 30.0  # after which the head looks again whether a channel is still there
ANSWER_S = 60.0  # that a worker waits for an answer; the head's disk may have to wake up
LENT_S = 10.0  # that it waits for one of another worker

_Row = Annotated[int, Meta(ge=0, le=1 << 40)]
_Checksum = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
_Content = Annotated[str, Meta(max_length=64)]
_Role = Annotated[str, Meta(max_length=32)]
_Roles = Annotated[dict[_Role, Annotated[int, Meta(ge=0, le=1 << 16)]], Meta(max_length=32)]


class Describe(Struct, frozen=True, tag=True):
    """What is my shard? The numbers are those of the pack's format and of its kernels' layout."""

    pack_format: int
    kernel_layout: int


class WantPiece(Struct, frozen=True, tag=True):
    """Rows [start, stop) of a matrix in whole bands, or elements of a vector. Answered by `PieceFollows`."""

    content: _Content
    block: BlockId
    role: _Role
    start: _Row
    stop: _Row


class WantDigest(Struct, frozen=True, tag=True):
    """The digest of a piece, whose bytes come from another worker. Answered by `PieceDigest`."""

    content: _Content
    block: BlockId
    role: _Role
    start: _Row
    stop: _Row


class WantChecksum(Struct, frozen=True, tag=True):
    """The checksum that a packed block has, or (None) that all vectors have. Answered by `BlockChecksum`."""

    content: _Content
    block: BlockId | None


class BlockForm(Struct, frozen=True):
    """Role → GGUF id of the type of each matrix of a block, and the roles of its vectors, in the order of a pack."""

    types: _Roles
    vectors: Annotated[list[_Role], Meta(max_length=32)]


class Description(Struct, frozen=True, tag=True):
    """What a worker must know of its shard. All sizes follow from it.

    spec: of the whole model.  key: which files, 32 hex digits.  form_of: for each block of the shard, in the order of
    a step, its form in `forms`.
    """

    name: Annotated[str, Meta(max_length=200)]
    key: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    spec: ModelSpec
    shard: Shard
    quant: Quant
    forms: Annotated[list[BlockForm], Meta(max_length=MOST_FORMS)]
    form_of: Annotated[list[int], Meta(max_length=MOST_BLOCKS)]


class PieceFollows(Struct, frozen=True, tag=True):
    """checksum: xxh3_64 of the bytes of the next frame, in hex."""

    checksum: _Checksum


class PieceDigest(Struct, frozen=True, tag=True):
    """See `digest_of`."""

    digest: Annotated[bytes, Meta(min_length=PIECE_DIGEST_BYTES, max_length=PIECE_DIGEST_BYTES)]


class BlockChecksum(Struct, frozen=True, tag=True):
    checksum: _Checksum


class Refused(Struct, frozen=True, tag=True):
    """The question cannot be answered. The channel can be used further."""

    code: ErrorCode
    reason: Annotated[str, Meta(max_length=1000)]


class Lacks(Struct, frozen=True, tag=True):
    """A worker's first words to another one: the shard that it fetches. Answered by `Holds`."""

    description: Description


class HeldRows(Struct, frozen=True):
    """Rows [start, stop) of the asking worker's shard, of the matrix `role` of some of its blocks, counted in the order
    of a step."""

    role: _Role
    start: _Row
    stop: _Row
    blocks: Annotated[list[int], Meta(max_length=MOST_BLOCKS)]


class Holds(Struct, frozen=True, tag=True):
    """What a worker has of another one's shard. From now on it answers each `WantPiece` with `PieceLent`."""

    rows: Annotated[list[HeldRows], Meta(max_length=MOST_HELD)]


class PieceLent(Struct, frozen=True, tag=True):
    """The bytes follow, as for `PieceFollows`."""


WeightQuestion = Describe | WantPiece | WantDigest | WantChecksum
WeightAnswer = Description | PieceFollows | PieceDigest | BlockChecksum | Refused


def digest_of(data: Bytes) -> bytes:
    """Of a piece: nobody can make other bytes that have it, which does not hold for its checksum."""
    return hashlib.blake2b(data.data, digest_size=PIECE_DIGEST_BYTES).digest()
