"""Builds packs block by block through small buffers, so that packing a model of any size takes little memory.

A pack is built beside its place, as NAME.partial, and renamed when it is whole and on the disk. So nothing half made
can be taken for a pack. A journal names the blocks that are written; the next attempt checks and keeps them. This
module knows how a checkpoint's rows become a pack's bytes. `daemon.library` knows where packs are kept and who may
build one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from msgspec.structs import replace

from shoal.kernels import WeightType
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.identity import stamped
from shoal.models.checkpoint.weight_source import Piece, WeightSource
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.errors import PackError
from shoal.offload.syncing import sync, sync_directory
from shoal.partition.memory_layout import BAND_ROWS
from shoal.partition.spec import BlockId

from .journal import Journal, note, noted
from .kept import KeptMatrices
from .layout import UNKNOWN, head_origin, layout
from .manifest import (
    BLOCKS,
    DAMAGED,
    MANIFEST,
    PAGE_BYTES,
    PARTIAL,
    Manifest,
    PackedBlock,
    Quant,
    Source,
    SourceFile,
    read_manifest,
)
from .pack import Pack, joined, open_pack, tensor_bytes, tensor_type
from .writer import PackFile

PART_BYTES = 16 << 20  # of weights in a buffer, counted as float32 where they get fewer bits
SAMPLE_BYTES = 32 << 20  # of each kind of matrix are packed to estimate the speed …
REWRITTEN_BYTES = 4 << 20  # … or this many, where they get fewer bits


def source_of(checkpoint: WeightSource) -> Source:
    """What identifies the files of a checkpoint, as they were when it was opened."""
    files = []
    for path in files_of(checkpoint):
        stamp = checkpoint.stamps[path]
        assert stamp is not None  # it was read
        files.append(
            SourceFile(path.name, stamp.nbytes, stamp.written_ns, stamp.changed_ns, str(path.resolve()))
        )
    return Source(str(checkpoint.path.absolute()), files)


def files_of(checkpoint: WeightSource) -> list[Path]:
    """The files that a pack depends on."""
    return [*checkpoint.files, *([checkpoint.path / "config.json"] if checkpoint.kind == "hf" else [])]


class PackBuilder:
    """Makes the pack of a checkpoint, or of a shard of one. Its size, `nbytes`, is known before anything is read.

    `source` says what it is made from, if that has a name besides its path. `part_bytes` bounds each of the few
    buffers that weights pass through.
    """

    def __init__(
        self,
        checkpoint: WeightSource,
        quant: Quant = "keep",
        source: Source | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._checkpoint = checkpoint
        self._kept = KeptMatrices(checkpoint, quant)
        self._part_bytes = part_bytes
        self._part = np.empty(0, np.uint8)
        self.manifest = layout(checkpoint, quant, source or source_of(checkpoint))
        self.nbytes = self.manifest.nbytes
        blocks = self.manifest.blocks
        # A tied embedding is the last block, and its bytes are the head's.
        self._own = blocks[:-1] if checkpoint.spec.tied else blocks
        self._slice_rows = next((it.tensors["head"].rows for it in blocks if it.block.kind == "head"), 0)

    def build(self, directory: Path, progress: BytesDone = unheard) -> Pack:
        """Makes `directory`, which must not exist yet, and opens the pack in it.

        Raises PackError, CheckpointError, and OSError when the disk fails or is full. What was written then lies
        beside `directory` for the next attempt (see `partial_of`).
        """
        self._checkpoint.bypass_cache()
        partial = partial_of(directory)
        partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        with Journal(partial, self.manifest) as journal, PackFile(partial / BLOCKS, self.nbytes) as file:
            manifest = self._write(file, journal, progress)
            file.sync()
        if stamped(files_of(self._checkpoint)).items() - self._checkpoint.stamps.items():
            raise PackError(f"{self._checkpoint.path}: was changed while it was packed; pack it again")
        with (partial / MANIFEST).open("wb") as out:
            out.write(msgspec.json.encode(manifest))
            sync(out)
        journal.remove()
        sync_directory(partial)
        partial.rename(directory)
        sync_directory(directory.parent)
        return open_pack(directory)

    def reopen(self, directory: Path) -> bool:
        """Takes the pack in `directory`, which was found damaged, for an unfinished one. So `build` makes only what is
        wrong with it anew. False if there is none, or one of other blocks. Raises OSError."""
        try:
            found = read_manifest(directory)
        except PackError:
            return False
        draft = self.manifest
        unknown = replace(
            found,
            source=draft.source,
            vectors=replace(found.vectors, checksum=UNKNOWN),
            blocks=[replace(item, checksum=UNKNOWN) for item in found.blocks],
        )
        if unknown != draft:
            return False
        shutil.rmtree(partial_of(directory), ignore_errors=True)
        note(directory, draft, found.blocks)
        for name in (MANIFEST, DAMAGED):
            (directory / name).unlink(missing_ok=True)
        directory.rename(partial_of(directory))
        return True

    def checksum(self, block: BlockId | None) -> str:
        """The checksum that a block of the pack has, or (None) that the vectors have. Reads them and writes nothing.
        Raises CheckpointError, and PackError when the pack has no such block."""
        item = next((it for it in self._own if it.block == block), None)
        if block is not None and item is None:
            raise PackError(f"the pack has no block {block} of its own")
        nbytes = item.nbytes if item else self.manifest.vectors.nbytes
        digest = xxhash.xxh3_64()
        for part in self._matrices(item) if item else self._vectors():
            digest.update(np.ascontiguousarray(part).data)
            nbytes -= len(part)
        digest.update(bytes(nbytes))
        return digest.hexdigest()

    def left_bytes(self, directory: Path) -> int:
        """Bytes that `build` has yet to write: fewer than `nbytes` if an attempt was cut off. Raises OSError."""
        written = noted(partial_of(directory), self.manifest) or {}
        return self.nbytes - sum(item.nbytes for item in self.manifest.blocks if str(item.block) in written)

    def seconds(self, directory: Path) -> float:
        """Estimates how long `build` will take: does a little of every kind of its work, into a file beside `directory`
        that is removed again. Raises CheckpointError and OSError.
        """
        self._checkpoint.bypass_cache()
        path = directory.with_name(f".speed-{os.getpid()}")
        whole_s = 0.0
        try:
            with PackFile(path, SAMPLE_BYTES) as file:
                path.unlink()  # so that it goes however this ends
                for matrices in self._works():
                    largest, item, role = max(matrices, key=itemgetter(0))
                    kept = self._stored_type(item, role) is tensor_type(item.tensors[role])
                    most = SAMPLE_BYTES if kept else REWRITTEN_BYTES
                    sample = min(most, largest // PAGE_BYTES * PAGE_BYTES)
                    if not sample:
                        continue
                    began_s = time.monotonic()
                    file.write(0, sample, _limited(self._matrix(item, role), sample))
                    nbytes = sum(size for size, _, _ in matrices)
                    whole_s += (time.monotonic() - began_s) * nbytes / sample
        finally:
            path.unlink(missing_ok=True)
        return whole_s * self.left_bytes(directory) / self.nbytes

    def _works(self) -> Iterable[list[tuple[int, PackedBlock, str]]]:
        """The matrices that are packed in the same way, from one type to one other: bytes, block and role of each."""
        works = defaultdict[tuple[str, str], list[tuple[int, PackedBlock, str]]](list)
        for item in self._own:
            for role, tensor in item.tensors.items():
                work = self._stored_type(item, role).name, tensor.type
                works[work].append((tensor_bytes(tensor), item, role))
        return works.values()

    def _write(self, file: PackFile, journal: Journal, progress: BytesDone) -> Manifest:
        """Writes all blocks. → the manifest with their checksums"""
        missing = [item for item in self._own if not journal.has(item)]
        self._checkpoint.expect(self._expected(missing, vectors=True))
        vectors = self.manifest.vectors
        vectors = replace(vectors, checksum=file.write(vectors.offset, vectors.nbytes, self._vectors()))
        blocks: list[PackedBlock] = []
        for item in self._own:
            progress(item.offset, self.nbytes)
            found = journal.kept(item, file)
            if found is None:
                if journal.has(item):  # but it was altered since
                    later = [it for it in missing if it.offset > item.offset]
                    self._checkpoint.expect(self._expected([item, *later], vectors=False))
                parts = _told(self._matrices(item), item.offset, self.nbytes, progress)
                found = file.write(item.offset, item.nbytes, parts)
                journal.add(item, found)
            blocks.append(replace(item, checksum=found))
        if self._checkpoint.spec.tied:
            slices = [item.checksum for item in blocks if item.block.kind == "head"]
            blocks.append(replace(self.manifest.blocks[-1], checksum=joined(slices)))
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

    def _matrices(self, item: PackedBlock) -> Iterator[Bytes]:
        """The bytes of a block's matrices in order. Each part is valid until the next."""
        at = 0
        for role, tensor in item.tensors.items():
            yield np.zeros(tensor.offset - at, np.uint8)
            yield from self._matrix(item, role)
            at = tensor.offset + tensor_bytes(tensor)

    def _origin(self, item: PackedBlock, role: str) -> tuple[BlockId, str, int]:
        """Which matrix of the checkpoint a packed one is made from: block, role, and the row where it begins."""
        if item.block.kind == "head":
            return *head_origin(self._checkpoint), item.block.expert * self._slice_rows
        return item.block, role, 0

    def _stored_type(self, item: PackedBlock, role: str) -> WeightType:
        block, theirs, _ = self._origin(item, role)
        return self._checkpoint.matrices(block)[theirs][0]

    def _matrix(self, item: PackedBlock, role: str) -> Iterator[Bytes]:
        """The bytes of one matrix, whole bands of rows at a time."""
        kind, cols = tensor_type(item.tensors[role]), item.tensors[role].cols
        for block, own, start, stop in self._pieces(item, role):
            nbytes = kind.matrix_bytes(stop - start, cols)
            if nbytes > len(self._part):
                self._part = np.empty(nbytes, np.uint8)
            yield self._kept.read_rows(block, own, start, stop, self._part[:nbytes]).data

    def _pieces(self, item: PackedBlock, role: str) -> Iterator[Piece]:
        """What is read for one matrix, in order: whole bands of rows."""
        tensor, stored = item.tensors[role], self._stored_type(item, role)
        block, own, first = self._origin(item, role)
        row_bytes = stored.row_bytes(tensor.cols) if stored is tensor_type(tensor) else 4 * tensor.cols
        step = max(1, self._part_bytes // row_bytes // BAND_ROWS) * BAND_ROWS
        for start in range(0, tensor.rows, step):
            yield Piece(block, own, first + start, first + min(start + step, tensor.rows))

    def _expected(self, items: Iterable[PackedBlock], vectors: bool) -> Iterator[Piece]:
        """What is read for these blocks, in order, and before them for all vectors."""
        for block, places in self.manifest.vectors.blocks if vectors else ():
            yield from (Piece(block, role, 0, length) for role, (_, length) in places.items())
        for item in items:
            for role in item.tensors:
                yield from self._pieces(item, role)


def partial_of(directory: Path) -> Path:
    """Where the pack of `directory` lies while it is built."""
    return directory.with_name(directory.name + PARTIAL)


def _told(parts: Iterable[Bytes], start: int, total: int, progress: BytesDone) -> Iterator[Bytes]:
    """Passes the parts on and reports progress after each."""
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
