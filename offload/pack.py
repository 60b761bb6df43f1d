"""A pack: the blocks of one model as kernels want them, so that reading a block is one read and no work.

A directory of two files. `manifest.json` says what the pack was made from and where every block lies; `blocks.bin` has
the blocks. A block is one extent, its beginning and size multiples of 4 KiB, of its matrices exactly as
`kernels.Matrix` holds them, each at a multiple of 64 bytes. Vectors of all blocks are one extent of their own, which
`open_pack` reads and keeps. The head is cut into slices of rows, blocks head.0, head.1 …; if it is tied to the
embedding, the slices follow each other without a gap and the embedding's extent is all of them.

Knows the format and trusts nothing in it. Does not know how a pack is made (`pack_build`) nor where packs are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
import xxhash
from msgspec import Meta, Struct
from torch import Tensor

from shoal.kernels import WEIGHT_TYPES, KernelError, Matrix, WeightType
from shoal.models.weights import Weights
from shoal.partition.spec import BlockId

from .errors import PackCorrupt, PackError

FORMAT: Literal[1] = 1
KERNEL_LAYOUT: Literal[1] = 1  # of the bytes of a matrix: bands of sixteen rows (`kernels.bands`)
PAGE_BYTES = 4096
ALIGN_BYTES = 64
MANIFEST = "manifest.json"
BLOCKS = "blocks.bin"
MANIFEST_BYTES = 256 << 20  # no model's manifest is larger
VECTORS_BYTES = 1 << 30  # nor the norms and biases of one

Quant = Literal["keep", "q8", "q4"]

_Size = Annotated[int, Meta(ge=0, le=1 << 60)]
_Count = Annotated[int, Meta(ge=1, le=1 << 40)]
_Checksum = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}


class PackedTensor(NamedTuple):
    """One matrix; `offset` counts from the beginning of its block."""

    type: str
    rows: _Count
    cols: _Count
    offset: _Size

    @property
    def kind(self) -> WeightType:
        return _TYPES[self.type]

    @property
    def nbytes(self) -> int:
        return self.kind.matrix_bytes(self.rows, self.cols)


class PackedBlock(Struct, frozen=True):
    """Where one block lies: `nbytes` from byte `offset` of blocks.bin, both multiples of 4096; xxh3_64 of them."""

    block: BlockId
    offset: _Size
    nbytes: _Size
    checksum: _Checksum
    tensors: dict[str, PackedTensor]


class PackedVectors(Struct, frozen=True):
    """Where the vectors lie: role → (first byte in the extent, length) of each block that has any."""

    offset: _Size
    nbytes: Annotated[int, Meta(ge=0, le=VECTORS_BYTES)]
    checksum: _Checksum
    blocks: list[tuple[BlockId, dict[str, tuple[_Size, _Count]]]]


class SourceFile(Struct, frozen=True):
    path: str
    size: int
    mtime_ns: int


class Source(Struct, frozen=True):
    """What a pack was made from. `store`: sha256 of the manifest of a model in the store, else empty."""

    path: str
    files: list[SourceFile]
    store: str = ""


class Manifest(Struct, frozen=True):
    """All that is known of a pack. `model`: facts for people."""

    format: Literal[1]
    kernel_layout: Literal[1]
    source: Source
    quant: Quant
    shard: Literal["whole"]
    model: dict[str, str | int]
    vectors: PackedVectors
    blocks: Annotated[list[PackedBlock], Meta(max_length=1 << 22)]

    @property
    def nbytes(self) -> int:
        """Size of blocks.bin."""
        ends = (item.offset + item.nbytes for item in self.blocks)
        return max(self.vectors.offset + self.vectors.nbytes, *ends, 0)


class Pack:
    """An open pack: where its blocks lie, and its vectors. Holds no file open. Made by `open_pack`.

    path: of blocks.bin.  blocks: incl. embed (its extent is shared with the head's slices if these are tied).
    vectors: role → f32 (n,) of every block that has any, resident.
    """

    def __init__(
        self, path: Path, manifest: Manifest, vectors: Mapping[BlockId, Mapping[str, Tensor]]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.blocks: Mapping[BlockId, PackedBlock] = {item.block: item for item in manifest.blocks}
        self.vectors = vectors
        self._slices = [item for item in manifest.blocks if item.block.kind == "head"]

    def weights(self, block: BlockId, memory: Tensor) -> Weights:
        """A block whose bytes are in `memory`, uint8 (nbytes,): views of it, and the block's vectors."""
        item = self.blocks[block]
        assert memory.shape == (item.nbytes,), f"{block}: {tuple(memory.shape)}, not {item.nbytes}"
        matrices = {
            role: Matrix(it.kind, memory[it.offset : it.offset + it.nbytes], it.rows, it.cols)
            for role, it in item.tensors.items()
        }
        owner = BlockId("head") if block.kind == "head" else block
        return Weights(matrices, self.vectors.get(owner, {}))

    def check(self, block: BlockId, memory: Tensor) -> None:
        """Raises PackCorrupt unless `memory` (as for `weights`) has the bytes that were written."""
        item = self.blocks[block]
        slices = self._slices if item.offset == self._slices[0].offset and block.kind == "embed" else []
        starts = [part.offset - item.offset for part in slices]
        found = [
            checksum(memory[start : start + part.nbytes]) for start, part in zip(starts, slices, strict=True)
        ]
        if (joined(found) if slices else checksum(memory)) != item.checksum:
            raise PackCorrupt(
                f"{self.path}: block {block} was altered: its checksum is wrong; pack the model again"
            )


def checksum(memory: Tensor) -> str:
    """xxh3_64 of uint8 (n,), in hex."""
    return xxhash.xxh3_64_hexdigest(memory.numpy().data)


def joined(checksums: Sequence[str]) -> str:
    """The checksum of an embedding whose bytes are slices with these."""
    return xxhash.xxh3_64_hexdigest("".join(checksums).encode())


def open_pack(directory: Path) -> Pack:
    """Opens a pack, checks its manifest against the file, and reads the vectors.

    Raises PackError (there is none, or it is of another version) or PackCorrupt, each naming the file.
    """
    manifest = read_manifest(directory)
    path = directory / BLOCKS
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            _check_places(path, manifest, size)
            stored = torch.empty(manifest.vectors.nbytes, dtype=torch.uint8)
            got = (
                os.preadv(file.fileno(), [stored.numpy().data], manifest.vectors.offset) if len(stored) else 0
            )
    except OSError as error:
        raise PackError(f"{path}: cannot be read: {error.strerror}") from error
    if got != len(stored) or checksum(stored) != manifest.vectors.checksum:
        raise PackCorrupt(
            f"{path}: the norms and biases were altered: their checksum is wrong; pack the model again"
        )
    vectors = {
        block: {
            role: stored[at : at + 4 * length].view(torch.float32) for role, (at, length) in places.items()
        }
        for block, places in manifest.vectors.blocks
    }
    return Pack(path, manifest, vectors)


def read_manifest(directory: Path) -> Manifest:
    """The manifest, its types and ranges checked, but not yet against the file. Raises PackError."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            text = file.read(MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise PackError(f"{directory}: is no pack: it has no {MANIFEST}") from error
    except OSError as error:
        raise PackError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PackCorrupt(f"{path}: is not the manifest of a pack of this version: {error}") from error


def _check_places(path: Path, manifest: Manifest, size: int) -> None:
    """Every extent and tensor lies where it may, and none over another. Raises PackCorrupt."""
    if manifest.nbytes != size:
        raise _wrong(path, f"has {size} bytes, the manifest asks for {manifest.nbytes}")
    extents = [(manifest.vectors.offset, manifest.vectors.nbytes, "vectors")]
    blocks: dict[BlockId, PackedBlock] = {}
    for item in manifest.blocks:
        if item.block in blocks:
            raise _wrong(path, f"block {item.block} is there twice")
        blocks[item.block] = item
        _check_tensors(path, item)
        extents.append((item.offset, item.nbytes, str(item.block)))
    embed = blocks.get(BlockId("embed"))
    head = [item for item in manifest.blocks if item.block.kind == "head"]
    if embed and head and embed.offset == head[0].offset:  # tied: the same bytes
        if embed.nbytes != sum(item.nbytes for item in head):
            raise _wrong(path, f"embed has {embed.nbytes} bytes, not those of the head's slices")
        extents.remove((embed.offset, embed.nbytes, "embed"))
    end = 0
    for offset, nbytes, name in sorted(extents):
        if offset % PAGE_BYTES or nbytes % PAGE_BYTES:
            raise _wrong(path, f"{name} lies at {offset}, {nbytes} long: must be multiples of {PAGE_BYTES}")
        if offset < end:
            raise _wrong(path, f"{name} lies over what is before it")
        end = offset + nbytes
    for block, places in manifest.vectors.blocks:
        for role, (at, length) in places.items():
            if at % ALIGN_BYTES or at + 4 * length > manifest.vectors.nbytes:
                raise _wrong(path, f"vector {role} of {block} lies outside of its extent")


def _check_tensors(path: Path, item: PackedBlock) -> None:
    end = 0
    for role, tensor in sorted(item.tensors.items(), key=lambda pair: pair[1].offset):
        what = f"{role} of block {item.block}"
        if tensor.type not in _TYPES:
            raise _wrong(path, f"{what} has the unknown type {tensor.type!r}")
        if tensor.offset % ALIGN_BYTES or tensor.offset < end:
            raise _wrong(path, f"{what} lies at {tensor.offset}: not aligned, or over what is before it")
        try:
            end = tensor.offset + tensor.nbytes
        except KernelError as error:
            raise _wrong(path, f"{what}: {error}") from error
    if end > item.nbytes:
        raise _wrong(path, f"block {item.block} has {item.nbytes} bytes and needs {end}")


def _wrong(path: Path, what: str) -> PackCorrupt:
    return PackCorrupt(f"{path}: {what}; pack the model again")
