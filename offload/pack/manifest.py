"""The format of a pack's manifest: what the pack was made from, and where every block lies.

Knows the types and ranges of the fields; `pack` checks whether they agree with the file and with each other. Imports
nothing that computes, so that listing packs is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from shoal.models.regular_files import read_regular
from shoal.offload.errors import PackCorrupt, PackError
from shoal.partition.slicing import Shard
from shoal.partition.spec import BlockId

PACK_FORMAT: Literal[1] = 1
KERNEL_LAYOUT: Literal[1] = 1  # of the bytes of a matrix: bands of sixteen rows (`kernels.band_layout`)
PAGE_BYTES = 4096
MATRIX_ALIGN_BYTES = 64
MANIFEST = "manifest.json"
BLOCKS = "blocks.bin"
DAMAGED = "damaged"  # this file exists once blocks were found altered
PARTIAL = ".partial"  # the name of an unfinished pack's directory ends so
DRAFT = "draft.json"  # the manifest of an unfinished pack, without checksums
MANIFEST_BYTES = 32 << 20  # no manifest is larger: enough for 100,000 experts
VECTORS_BYTES = 1 << 30  # no model has more bytes of norms and biases

Quant = Literal["keep", "q8", "q4"]

_Size = Annotated[int, Meta(ge=0, le=1 << 60)]
_Length = Annotated[int, Meta(ge=1, le=1 << 40)]
_Checksum = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]


class PackedTensor(NamedTuple):
    """One matrix. `offset` counts from the beginning of its block."""

    type: str
    rows: _Length
    cols: _Length
    offset: _Size


class PackedBlock(Struct, frozen=True):
    """Where one block lies: `nbytes` from byte `offset` of blocks.bin, both multiples of 4096; xxh3_64 of them."""

    block: BlockId
    offset: _Size
    nbytes: _Size
    checksum: _Checksum
    tensors: dict[str, PackedTensor]


class PackedVectors(Struct, frozen=True):
    """Where the vectors lie. For each block that has any: role → (first byte in the extent, length)."""

    offset: _Size
    nbytes: Annotated[int, Meta(ge=0, le=VECTORS_BYTES)]
    checksum: _Checksum
    blocks: list[tuple[BlockId, dict[str, tuple[_Size, _Length]]]]


class SourceFile(Struct, frozen=True):
    """One file. `ctime_ns` also tells of a write that has set `mtime_ns` back; `target` is where links lead. A file of
    the store, whose content is known, has neither, and no file has them in packs of older versions."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int = 0
    target: str = ""

    def is_still(self, now: SourceFile) -> bool:
        mine, its = ((it.name, it.size, it.mtime_ns, it.ctime_ns, it.target) for it in (self, now))
        return mine == its if self.ctime_ns else mine[:3] == its[:3]


class Source(Struct, frozen=True):
    """What a pack was made from: a path, or a model's name in the store with the sha256 of its manifest there."""

    model: str
    files: list[SourceFile]
    store: str = ""

    def is_still(self, now: Source) -> bool:
        """Whether these are the files that `now` describes."""
        if (self.model, self.store, len(self.files)) != (now.model, now.store, len(now.files)):
            return False
        return all(then.is_still(file) for then, file in zip(self.files, now.files, strict=True))


class Manifest(Struct, frozen=True):
    """Everything about a pack. `shard` says which part of the model it has, and for which ranks it was made. `model`
    has facts for people."""

    format: Literal[1]
    kernel_layout: Literal[1]
    source: Source
    quant: Quant
    shard: Literal["whole"] | Shard
    model: dict[str, str | int]
    vectors: PackedVectors
    blocks: Annotated[list[PackedBlock], Meta(max_length=1 << 22)]

    @property
    def nbytes(self) -> int:
        """Size of blocks.bin."""
        ends = (item.offset + item.nbytes for item in self.blocks)
        return max(self.vectors.offset + self.vectors.nbytes, *ends, 0)

    def is_of(self, shard: Literal["whole"] | Shard) -> bool:
        """Whether the pack has exactly the weights of this shard, or of the whole model."""
        mine = self.shard
        return mine == shard if mine == "whole" or shard == "whole" else mine.same_bytes(shard)


def read_manifest(directory: Path, name: str = MANIFEST) -> Manifest:
    """Reads a manifest. Its types and ranges are checked, but not yet against the file. Raises PackError."""
    path = directory / name
    try:
        text = read_regular(path, MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise PackError(f"{directory}: is no pack: it has no {name}") from error
    except OSError as error:
        raise PackError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PackCorrupt(f"{path}: is not the manifest of a pack of this version: {error}") from error
