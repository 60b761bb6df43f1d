"""Building a pack: block by block through small buffers, so that a model of any size is packed in little memory.

A pack is built beside its place, as NAME.partial, and renamed when it is whole and on the disk, so nothing half made
can be taken for a pack. A journal names the blocks that are written; the next attempt checks and keeps them. Knows how
a checkpoint's rows become a pack's bytes; not where packs are kept, nor who may build one (`daemon.packs`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from shoal.kernels import WeightType, dequantize, from_stored
from shoal.kernels.arrays import Bytes
from shoal.kernels.quantise import quantise
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.errors import PackError
from shoal.partition.memory_layout import BAND_ROWS
from shoal.partition.spec import BlockId

from .journal import Journal, noted
from .layout import head_origin, layout
from .manifest import BLOCKS, MANIFEST, PAGE_BYTES, PARTIAL, Manifest, PackedBlock, Quant, Source, SourceFile
from .pack import Pack, joined, open_pack, tensor_bytes, tensor_type
from .writer import PackFile

PART_BYTES = 16 << 20  # of weights in hand, as float32 where they are transcoded
SAMPLE_BYTES = 32 << 20  # of each kind of matrix are packed to find out how fast it goes …
REWRITTEN_BYTES = 4 << 20  # … or so many where they get fewer bits


def source_of(checkpoint: AnyCheckpoint) -> Source:
    """What identifies the files of a checkpoint. Raises PackError."""
    paths = list(checkpoint.files)
    if checkpoint.kind == "hf":
        paths.append(checkpoint.path / "config.json")
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise PackError(f"{checkpoint.path}: cannot be looked at: {error.strerror}") from error
    files = [
        SourceFile(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)
    ]
    return Source(str(checkpoint.path.absolute()), files)


def build_pack(
    checkpoint: AnyCheckpoint, directory: Path, quant: Quant = "keep", progress: BytesDone = unheard
) -> Pack:
    """Packs a checkpoint into `directory`, which must not exist yet: see `PackBuilder`."""
    return PackBuilder(checkpoint, quant).build(directory, progress)


class PackBuilder:
    """The pack of one checkpoint, or of a shard of it, to be. `nbytes` of its blocks are known before anything is read.

    `source`: what it is made from, if that has a name besides its path. `part_bytes` bounds each of the few buffers
    that weights pass through.
    """

    def __init__(
        self,
        checkpoint: AnyCheckpoint,
        quant: Quant = "keep",
        source: Source | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._checkpoint = checkpoint
        self._part_bytes = part_bytes
        self._stored = np.empty(0, np.uint8)
        self.manifest = layout(checkpoint, quant, source or source_of(checkpoint))

    @property
    def nbytes(self) -> int:
        return self.manifest.nbytes

    def build(self, directory: Path, progress: BytesDone = unheard) -> Pack:
        """Makes `directory`, which must not exist yet, and opens it; `progress(bytes done, bytes in all)`.

        Raises PackError, CheckpointError, and OSError when the disk fails or is full; what was written then lies
        beside `directory` for the next attempt (see `partial_of`).
        """
        self._checkpoint.bypass_cache()
        partial = partial_of(directory)
        partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        with Journal(partial, self.manifest) as journal, PackFile(partial / BLOCKS, self.nbytes) as file:
            manifest = self._write(file, journal, progress)
            file.sync()
        if source_of(self._checkpoint).files != manifest.source.files:
            raise PackError(f"{self._checkpoint.path}: was changed while it was packed; pack it again")
        with (partial / MANIFEST).open("wb") as out:
            out.write(msgspec.json.encode(manifest))
            out.flush()
            os.fsync(out.fileno())
        journal.remove()
        _sync(partial)
        partial.rename(directory)
        _sync(directory.parent)
        return open_pack(directory)

    def left_bytes(self, directory: Path) -> int:
        """What `build` will have to write: less than `nbytes` where an attempt was cut off. Raises OSError."""
        written = noted(partial_of(directory), self.manifest) or {}
        return self.nbytes - sum(item.nbytes for item in self.manifest.blocks if str(item.block) in written)

    def seconds(self, directory: Path) -> float:
        """How long `build` will take, from doing a little of every kind of work in it, into a file beside `directory`
        that goes again. Raises CheckpointError and OSError.
        """
        self._checkpoint.bypass_cache()
        path = directory.with_name(f".speed-{os.getpid()}")
        whole_s = 0.0
        try:
            with PackFile(path, SAMPLE_BYTES) as file:
                path.unlink()  # nothing stays, however this ends
                for nbytes, item, role in self._works().values():
                    kept = self._stored_type(item, role) is tensor_type(item.tensors[role])
                    most = SAMPLE_BYTES if kept else REWRITTEN_BYTES
                    sample = min(most, tensor_bytes(item.tensors[role]) // PAGE_BYTES * PAGE_BYTES)
                    if not sample:
                        continue
                    began_s = time.monotonic()
                    file.write(0, sample, _limited(self._matrix(item, role, 0), sample))
                    whole_s += (time.monotonic() - began_s) * nbytes / sample
        finally:
            path.unlink(missing_ok=True)
        return whole_s * self.left_bytes(directory) / self.nbytes

    def _works(self) -> dict[tuple[str, str], tuple[int, PackedBlock, str]]:
        """(stored type, packed type) → bytes that are packed so, the block and role of the largest such matrix."""
        works: dict[tuple[str, str], tuple[int, PackedBlock, str]] = {}
        for item in self.manifest.blocks:
            if item.block.kind == "embed" and self._checkpoint.spec.tied:  # its bytes are the head's
                continue
            for role, tensor in item.tensors.items():
                work = (self._stored_type(item, role).name, tensor.type)
                nbytes, largest, its_role = works.get(work, (0, item, role))
                if tensor_bytes(tensor) > tensor_bytes(largest.tensors[its_role]):
                    largest, its_role = item, role
                works[work] = (nbytes + tensor_bytes(tensor), largest, its_role)
        return works

    def _write(self, file: PackFile, journal: Journal, progress: BytesDone) -> Manifest:
        """Writes all blocks. → the manifest with their checksums"""
        vectors = self.manifest.vectors
        vectors = replace(vectors, checksum=file.write(vectors.offset, vectors.nbytes, self._vectors()))
        blocks: list[PackedBlock] = []
        first_row = 0  # of the next slice of the head
        for item in self.manifest.blocks:
            head = item.block.kind == "head"
            if item.block.kind == "embed" and self._checkpoint.spec.tied:  # its bytes are the head's
                slices = [block.checksum for block in blocks if block.block.kind == "head"]
                blocks.append(replace(item, checksum=joined(slices)))
                continue
            progress(item.offset, self.nbytes)
            found = journal.kept(item, file)
            if found is None:
                matrices = self._matrices(item, first_row if head else 0)
                parts = _told(matrices, item.offset, self.nbytes, progress)
                found = file.write(item.offset, item.nbytes, parts)
                journal.add(item, found)
            if head:
                first_row += item.tensors["head"].rows
            blocks.append(replace(item, checksum=found))
        progress(self.nbytes, self.nbytes)
        return replace(self.manifest, vectors=vectors, blocks=blocks)

    def _vectors(self) -> Iterator[Bytes]:
        at = 0
        for block, places in self.manifest.vectors.blocks:
            values = self._checkpoint.read_vectors(block)
            for role, (offset, length) in places.items():
                yield np.zeros(offset - at, np.uint8)
                yield values[role].view(np.uint8)
                at = offset + 4 * length

    def _matrices(self, item: PackedBlock, first_row: int) -> Iterator[Bytes]:
        """The bytes of a block's matrices, one after the other, each part valid until the next."""
        at = 0
        for role, tensor in item.tensors.items():
            yield np.zeros(tensor.offset - at, np.uint8)
            yield from self._matrix(item, role, first_row)
            at = tensor.offset + tensor_bytes(tensor)

    def _origin(self, item: PackedBlock, role: str) -> tuple[BlockId, str]:
        """The block and role of the checkpoint that a matrix is made from."""
        return head_origin(self._checkpoint) if item.block.kind == "head" else (item.block, role)

    def _stored_type(self, item: PackedBlock, role: str) -> WeightType:
        block, theirs = self._origin(item, role)
        return self._checkpoint.matrices(block)[theirs][0]

    def _matrix(self, item: PackedBlock, role: str, first_row: int) -> Iterator[Bytes]:
        """The bytes of one matrix from a row on, whole bands of rows at a time."""
        tensor, stored = item.tensors[role], self._stored_type(item, role)
        kind, cols = tensor_type(tensor), tensor.cols
        block, role = self._origin(item, role)
        row_bytes = stored.row_bytes(cols) if stored is kind else 4 * cols
        step = max(1, self._part_bytes // row_bytes // BAND_ROWS) * BAND_ROWS
        for start in range(0, tensor.rows, step):
            rows = min(step, tensor.rows - start)
            memory = self._memory(stored.matrix_bytes(rows, cols))
            first = first_row + start
            matrix = self._checkpoint.read_rows(block, role, first, first + rows, memory)
            if stored is not kind:
                encoded = quantise(kind, dequantize(matrix))
                matrix = from_stored(kind, rows, cols, encoded)
            yield matrix.data

    def _memory(self, nbytes: int) -> Bytes:
        if nbytes > len(self._stored):
            self._stored = np.empty(nbytes, np.uint8)
        return self._stored[:nbytes]


def partial_of(directory: Path) -> Path:
    """Where the pack `directory` lies while it is built."""
    return directory.with_name(directory.name + PARTIAL)


def _told(parts: Iterable[Bytes], start: int, total: int, progress: BytesDone) -> Iterator[Bytes]:
    """The same parts; `progress` is told of each."""
    done = start
    for part in parts:
        yield part
        done += len(part)
        progress(done, total)


def _limited(parts: Iterable[Bytes], nbytes: int) -> Iterator[Bytes]:
    """The first `nbytes` of all parts together."""
    for part in parts:
        yield part[:nbytes]
        nbytes -= len(part)
        if nbytes <= 0:
            return


def _sync(directory: Path) -> None:
    """Wait until the disk has the names in a directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
