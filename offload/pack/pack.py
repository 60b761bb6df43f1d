"""A pack: the blocks of one model as kernels want them, so that a block is ready after a single read.

A pack is a directory of two files. `manifest.json` says what the pack was made from and where every block lies;
`blocks.bin` has the blocks. A block is one extent; it begins at a multiple of 4 KiB, and its size is one. It has the
block's matrices exactly as `kernels.Matrix` holds them, each at a multiple of 64 bytes. The vectors of all blocks are
one extent of their own, which `open_pack` reads and keeps. The head is cut into slices of rows, the blocks head.0,
head.1 …; if the head is tied to the embedding, the slices follow each other without a gap, and all of them together
are the embedding's extent.

This module knows the format and trusts nothing in it. It does not know how a pack is made (`builder`) or where packs
are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from shoal.kernels import WEIGHT_TYPES, KernelError, Matrix, WeightType
from shoal.kernels.arrays import Bytes, Floats
from shoal.models.families import bias_shapes, shapes
from shoal.models.regular_files import open_regular
from shoal.models.weights import Weights
from shoal.offload.errors import PackCorrupt, PackError
from shoal.partition.spec import BlockId, ModelSpec

from .manifest import (
    BLOCKS,
    DAMAGED,
    MATRIX_ALIGN_BYTES,
    PAGE_BYTES,
    Manifest,
    PackedBlock,
    PackedTensor,
    read_manifest,
)

__all__ = ["Pack", "PackedBlock", "PackedTensor", "open_pack"]

_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}


class Pack:
    """An open pack: where its blocks lie, and its vectors. It keeps no file open. `open_pack` makes one.

    path: of blocks.bin.  blocks: all of them; a tied embedding shares its extent with the head's slices.
    vectors: role → f32 (n,), in memory, of every block that has any.  tied: the embedding is the head's slices.
    damaged: bytes were found altered or missing.  inode: of blocks.bin when it was opened, because another pack may
    have taken its place since.  claim: what keeps others from removing the pack as long as it is used, if they would.
    """

    def __init__(
        self, path: Path, manifest: Manifest, vectors: Mapping[BlockId, Mapping[str, Floats]], inode: int
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.damaged = False
        self.claim: object = None
        self._inode = inode
        self.blocks: Mapping[BlockId, PackedBlock] = {item.block: item for item in manifest.blocks}
        self.vectors = vectors
        self._slices = [item for item in manifest.blocks if item.block.kind == "head"]
        embed = self.blocks.get(BlockId("embed"))
        self.tied = bool(embed and self._slices and embed.offset == self._slices[0].offset)

    def require(self, spec: ModelSpec) -> None:
        """Raises PackCorrupt unless the pack has the blocks of `spec` and all their tensors in the right shapes."""
        expected = {block for block in spec.blocks() if block.kind != "head"} | {
            BlockId("head", -1, number) for number in range(len(self._slices))
        }
        if bool(self._slices) != bool(spec.vocab) or self.blocks.keys() != expected or self.tied != spec.tied:
            raise _wrong(self.path, "does not have the blocks of its model")
        if self.vectors.keys() - self.blocks.keys() - {BlockId("head")}:
            raise _wrong(self.path, "has vectors of blocks that are not there")
        rows = 0
        for block, item in self.blocks.items():
            found = {role: (tensor.rows, tensor.cols) for role, tensor in item.tensors.items()}
            needed = shapes(spec, block.kind)
            if block.kind == "head":
                slice_rows = found.get("head", (0, 0))[0]
                needed = {"head": (slice_rows, spec.hidden)}
                rows += slice_rows
            if found != {role: shape for role, shape in needed.items() if len(shape) == 2}:
                raise _wrong(self.path, f"block {block} does not have the matrices of its model")
        if rows != spec.vocab:
            raise _wrong(self.path, f"the head has {rows} rows, the model {spec.vocab}")
        for block in spec.blocks():
            lengths = {role: (len(vector),) for role, vector in self.vectors.get(block, {}).items()}
            needed = {role: shape for role, shape in shapes(spec, block.kind).items() if len(shape) == 1}
            if not needed.items() <= lengths.items() <= (needed | bias_shapes(spec, block.kind)).items():
                raise _wrong(self.path, f"block {block} does not have the vectors of its model")

    def weights(self, block: BlockId, memory: Bytes) -> Weights:
        """The weights of a block whose bytes are in `memory`, (nbytes,): views of them, and the block's vectors."""
        item = self.blocks[block]
        assert memory.shape == (item.nbytes,), f"{block}: {memory.shape}, not {item.nbytes}"
        matrices = {
            role: Matrix(tensor_type(it), memory[it.offset : it.offset + tensor_bytes(it)], it.rows, it.cols)
            for role, it in item.tensors.items()
        }
        owner = BlockId("head") if block.kind == "head" else block
        return Weights(matrices, self.vectors.get(owner, {}))

    def whole_head(self, memory: Bytes) -> Weights:
        """The head as one block, of which `memory` has all slices, one behind the other."""
        first = self._slices[0].tensors["head"]
        rows = sum(item.tensors["head"].rows for item in self._slices)
        kind = tensor_type(first)
        matrix = Matrix(kind, memory[: kind.matrix_bytes(rows, first.cols)], rows, first.cols)
        return Weights({"head": matrix}, self.vectors.get(BlockId("head"), {}))

    def check(self, block: BlockId, memory: Bytes) -> None:
        """Raises PackCorrupt unless `memory`, as for `weights`, has the bytes that were written."""
        item = self.blocks[block]
        if self.tied and block.kind == "embed":
            slices = ((part.offset - item.offset, part.nbytes) for part in self._slices)
            found = joined([checksum(memory[start : start + nbytes]) for start, nbytes in slices])
        else:
            found = checksum(memory)
        if found != item.checksum:
            raise altered(self.path, block)

    def condemn(self) -> None:
        """Mark the pack as damaged on the disk, so that it is made again before it is next used."""
        self.damaged = True
        self.claim = None
        # The pack may have been removed, be read-only, or have made room for another, whose inode differs.
        with suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                (self.path.parent / DAMAGED).touch()


def tensor_type(tensor: PackedTensor) -> WeightType:
    return _TYPES[tensor.type]


def tensor_bytes(tensor: PackedTensor) -> int:
    """Bytes that the matrix takes in its block."""
    return tensor_type(tensor).matrix_bytes(tensor.rows, tensor.cols)


def checksum(memory: Bytes) -> str:
    """xxh3_64 of (n,), in hex."""
    return xxhash.xxh3_64_hexdigest(memory.data)


def joined(checksums: Sequence[str]) -> str:
    """The checksum of an embedding whose slices have these checksums."""
    return xxhash.xxh3_64_hexdigest("".join(checksums).encode())


def open_pack(directory: Path) -> Pack:
    """Opens a pack, checks its manifest against the file, and reads the vectors.

    Raises PackError when there is none or it is of another version, and PackCorrupt; each names the file.
    """
    manifest = read_manifest(directory)
    path = directory / BLOCKS
    try:
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
            _check_places(path, manifest, stat.st_size)
            stored = np.empty(manifest.vectors.nbytes, np.uint8)
            got = os.preadv(file.fileno(), [stored.data], manifest.vectors.offset) if len(stored) else 0
    except OSError as error:
        raise PackError(f"{path}: cannot be read: {error.strerror}") from error
    if got != len(stored) or checksum(stored) != manifest.vectors.checksum:
        raise PackCorrupt(
            f"{path}: the norms and biases were altered: their checksum is wrong; pack the model again"
        )
    vectors = {
        block: {role: stored[at : at + 4 * length].view(np.float32) for role, (at, length) in places.items()}
        for block, places in manifest.vectors.blocks
    }
    return Pack(path, manifest, vectors, stat.st_ino)


def _check_places(path: Path, manifest: Manifest, size: int) -> None:
    """Checks that every extent and tensor lies where it may and that none overlap. Raises PackCorrupt."""
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
            if at % MATRIX_ALIGN_BYTES or at + 4 * length > manifest.vectors.nbytes:
                raise _wrong(path, f"vector {role} of {block} lies outside of its extent")


def _check_tensors(path: Path, item: PackedBlock) -> None:
    end = 0
    for role, tensor in sorted(item.tensors.items(), key=lambda pair: pair[1].offset):
        what = f"{role} of block {item.block}"
        if tensor.type not in _TYPES:
            raise _wrong(path, f"{what} has the unknown type {tensor.type!r}")
        if tensor.offset % MATRIX_ALIGN_BYTES or tensor.offset < end:
            raise _wrong(path, f"{what} lies at {tensor.offset}: not aligned, or over what is before it")
        try:
            end = tensor.offset + tensor_bytes(tensor)
        except KernelError as error:
            raise _wrong(path, f"{what}: {error}") from error
    if end > item.nbytes:
        raise _wrong(path, f"block {item.block} has {item.nbytes} bytes and needs {end}")


def altered(path: Path, block: BlockId) -> PackCorrupt:
    return PackCorrupt(
        f"{path}: block {block} was altered: its checksum is wrong; the model is packed anew when it is loaded next"
    )


def _wrong(path: Path, what: str) -> PackCorrupt:
    return PackCorrupt(f"{path}: {what}; pack the model again")
