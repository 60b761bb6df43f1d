"""Building a pack: block by block through a small buffer, so that a model of any size is packed in little memory.

A pack is built beside its place, as `NAME.partial`, and renamed when it is whole and on the disk, so nothing that is
half made can be taken for a pack. What a cut-off attempt wrote is checked and kept. Knows how a checkpoint's rows
become a pack's bytes; not where packs are kept and who may build one (`daemon.packs`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import Tensor

from shoal.kernels.types import WEIGHT_TYPES
from shoal.models.checkpoint import Checkpoint
from shoal.partition.spec import BlockId

from .errors import PackError
from .pack import (
    BLOCKS,
    MANIFEST,
    Manifest,
    Pack,
    PackedBlock,
    Quant,
    Source,
    SourceFile,
    open_pack,
)
from .pack_layout import head_origin, layout

PART_BYTES = 16 << 20
_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """For callers that do not show any."""


def source_of(checkpoint: Checkpoint, store: str = "") -> Source:
    """What identifies the files of a checkpoint. `store`: sha256 of its manifest in the model store."""
    files = list(checkpoint.files)
    if checkpoint.kind == "hf":
        files.append(checkpoint.path / "config.json")
    return Source(str(checkpoint.path.absolute()), [_source_file(path) for path in files], store)


def _source_file(path: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(path.name, stat.st_size, stat.st_mtime_ns)


def build_pack(
    checkpoint: Checkpoint,
    directory: Path,
    quant: Quant = "keep",
    *,
    source: Source | None = None,
    progress: Progress = no_progress,
    part_bytes: int = PART_BYTES,
) -> Pack:
    """Packs a checkpoint into `directory`, which must not exist. `progress(bytes done, bytes in all)`.

    Raises PackError, CheckpointError, or OSError when the disk fails or is full.
    """
    checkpoint.bypass_cache()
    manifest = layout(checkpoint, quant, source or source_of(checkpoint))
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    descriptor = os.open(partial / BLOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        manifest = _Writer(checkpoint, manifest, descriptor, part_bytes, progress).write()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if source is None and source_of(checkpoint) != manifest.source:
        raise PackError(f"{checkpoint.path}: was changed while it was packed")
    with (partial / MANIFEST).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory)
    return open_pack(directory)


class _Writer:
    def __init__(
        self, checkpoint: Checkpoint, manifest: Manifest, descriptor: int, part_bytes: int, progress: Progress
    ) -> None:
        self._checkpoint = checkpoint
        self._manifest = manifest
        self._descriptor = descriptor
        self._part_bytes = part_bytes
        self._progress = progress
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def write(self) -> Manifest:
        """Writes everything. → the manifest with its checksums"""
        manifest = self._manifest
        vectors = manifest.vectors
        vectors = msgspec.structs.replace(
            vectors, checksum=self._write(vectors.offset, vectors.nbytes, self._vectors(), [])
        )
        embedding = xxhash.xxh3_64()
        blocks = []
        first_row = 0
        for item in manifest.blocks:
            if item.block == BlockId("embed") and self._checkpoint.spec.tied:
                blocks.append(msgspec.structs.replace(item, checksum=embedding.hexdigest()))
                continue
            also = [embedding] if item.block.kind == "head" else []
            found = self._write(item.offset, item.nbytes, self._matrices(item, first_row), also)
            first_row += item.tensors["head"].rows if item.block.kind == "head" else 0
            blocks.append(msgspec.structs.replace(item, checksum=found))
        return msgspec.structs.replace(manifest, vectors=vectors, blocks=blocks)

    def _write(
        self, offset: int, nbytes: int, parts: Iterator[Tensor], also: Sequence[xxhash.xxh3_64]
    ) -> str:
        """Writes the parts of one extent and fills it up with zeros. → its checksum"""
        digests = [xxhash.xxh3_64(), *also]
        done = 0
        for part in self._filled(parts, nbytes):
            view = part.numpy().data
            for digest in digests:
                digest.update(view)
            written = 0
            while written < len(view):
                written += os.pwrite(self._descriptor, view[written:], offset + done + written)
            done += len(view)
            self._progress(offset + done, self._manifest.nbytes)
        assert done == nbytes, (done, nbytes)
        return digests[0].hexdigest()

    def _filled(self, parts: Iterator[Tensor], nbytes: int) -> Iterator[Tensor]:
        left = nbytes
        for part in parts:
            left -= len(part)
            yield part
        yield torch.zeros(left, dtype=torch.uint8)

    def _vectors(self) -> Iterator[Tensor]:
        at = 0
        for block, places in self._manifest.vectors.blocks:
            values = self._checkpoint.read_vectors(block)
            for role, (offset, length) in places.items():
                yield torch.zeros(offset - at, dtype=torch.uint8)
                yield values[role].contiguous().view(torch.uint8)
                at = offset + 4 * length

    def _matrices(self, item: PackedBlock, first_row: int) -> Iterator[Tensor]:
        """The bytes of a block's matrices, one after the other, in parts of about `part_bytes`."""
        at = 0
        for role, tensor in item.tensors.items():
            yield torch.zeros(tensor.offset - at, dtype=torch.uint8)
            at = tensor.offset + tensor.nbytes
            block, origin = (item.block, role) if item.block.kind != "head" else head_origin(self._checkpoint)
            kind = _TYPES[tensor.type]
            band_bytes = kind.matrix_bytes(kind.band_rows, tensor.cols)
            step = max(1, self._part_bytes // band_bytes) * kind.band_rows
            for start in range(0, tensor.rows, step):
                stop = min(start + step, tensor.rows)
                memory = self._memory(kind.matrix_bytes(stop - start, tensor.cols))
                first = first_row if item.block.kind == "head" else 0
                self._checkpoint.read_rows(block, origin, first + start, first + stop, memory)
                yield memory

    def _memory(self, nbytes: int) -> Tensor:
        if nbytes > len(self._buffer):
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffer[:nbytes]
