"""Open files that hold tensors, and reads of exact rows from them.

Knows names, types, shapes and places of tensors (which `gguf_header` or `hf_dir` finds) and how to read their bytes: by
`preadv` into a buffer of exactly the size that is asked for. Nothing is memory-mapped, because a mapped page that
cannot be read kills the process; a read that fails is an error of only the request that needed it. Does not know what
a tensor means.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from shoal.kernels import WeightType
from shoal.kernels.arrays import Bytes
from shoal.models.errors import CheckpointError, CorruptCheckpoint, MissingCheckpoint, UnsupportedCheckpoint
from shoal.models.regular_files import FileTooLong, NotRegular, open_regular

from .identity import FileStamp, Stamps, stamped

_FOLIO_BYTES = 2 << 20  # the system drops cached pages in whole groups, which are at most so large
# Of a path or link that leads to no file.
_ASTRAY = errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO
_READ_BYTES = 1 << 30  # Linux moves at most 2 GiB in one call
_PART_BYTES = 16 << 20  # how much to read in one call if page cache is given back after each


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in its file. `shape` has the outermost dimension first; a row goes along the innermost one."""

    name: str
    type: WeightType
    shape: tuple[int, ...]
    file: int  # index into TensorFiles.paths
    offset: int  # of its first byte in that file

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class TensorFiles:
    """The files of one checkpoint, open for reading until `close`. Reads may come from several threads.

    `metadata`: what the files say about the model (GGUF metadata, or config.json). `unsupported`: name → stored type of
    each tensor that Shoal cannot read; it is refused only if it is needed. `drops_pages`: what has been read does not
    stay in the system's page cache. `stamps`: all files that the model was made of, as they were before they were read.
    """

    drops_pages = False

    def __init__(
        self,
        paths: Sequence[Path],
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, Any],
        unsupported: Mapping[str, str] | None = None,
        stamps: Stamps | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.tensors = tensors
        self.metadata = metadata
        self.stamps = stamps or stamped(self.paths)
        self._unsupported = unsupported or {}
        self._descriptors: list[int] = []
        try:
            for path in self.paths:
                with open_regular(path) as file:
                    self._descriptors.append(os.dup(file.fileno()))
                    now, before = FileStamp.of(os.fstat(file.fileno())), self.stamps[path]
                    # Some file systems give an open file another device or inode than its path.
                    if before is None or (now.nbytes, now.written_ns) != (before.nbytes, before.written_ns):
                        raise CheckpointError(f"{path}: was changed while it was opened; try again")
        except OSError as error:
            self.close()
            raise unreadable(path, error) from error
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors, also of those that Shoal cannot read."""
        return frozenset(self.tensors.keys() | self._unsupported.keys())

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values. Reads both, up to the first difference. Raises CheckpointError."""
        a, b = self.find(one), self.find(other)
        if (a.type, a.shape) != (b.type, b.shape):
            return False
        step = max(1, _PART_BYTES // max(1, a.row_bytes))
        return all(
            np.array_equal(self.read(a, row, rows), self.read(b, row, rows))
            for row in range(0, a.rows, step)
            for rows in [min(step, a.rows - row)]
        )

    def cut_short(self) -> list[tuple[Path, int, int]]:
        """Files that end before their tensors do: their bytes, and those that they should have."""
        ends = dict.fromkeys(self.paths, 0)
        for tensor in self.tensors.values():
            path = self.paths[tensor.file]
            ends[path] = max(ends[path], tensor.offset + tensor.nbytes)
        sizes = [(path, path.stat().st_size, end) for path, end in ends.items()]
        return [it for it in sizes if it[1] < it[2]]

    def find(self, name: str) -> StoredTensor:
        """The tensor with this name. Raises CorruptCheckpoint or UnsupportedCheckpoint, which name it."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            return tensor
        if name in self._unsupported:
            raise UnsupportedCheckpoint(
                f"{self.paths[0].parent}: tensor {name} has type {self._unsupported[name]}, "
                "which Shoal does not read from safetensors (supported: F32, F16, BF16)"
            )
        raise CorruptCheckpoint(f"{self.paths[0]}: tensor {name} is missing")

    def read(
        self, tensor: StoredTensor, first_row: int = 0, rows: int | None = None, into: Bytes | None = None
    ) -> Bytes:
        """The bytes of rows [first_row, first_row + rows), by default of all, uint8 (n,): `into`, or new memory.
        Raises CheckpointError."""
        rows = tensor.rows - first_row if rows is None else rows
        assert 0 <= first_row <= first_row + rows <= tensor.rows
        buffer = np.empty(rows * tensor.row_bytes, np.uint8) if into is None else into
        assert buffer.shape == (rows * tensor.row_bytes,)
        self._fill(buffer.data, tensor, tensor.offset + first_row * tensor.row_bytes)
        return buffer

    def close(self) -> None:
        """Closes the files. Buffers that were read stay valid."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            if self.drops_pages:
                _drop(descriptor, 0, 0)
            os.close(descriptor)

    def _fill(self, view: memoryview, tensor: StoredTensor, offset: int) -> None:
        path, descriptor = self.paths[tensor.file], self._descriptor(tensor)
        done = 0
        step = _PART_BYTES if self.drops_pages else _READ_BYTES
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done : done + step]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{path}: reading tensor {tensor.name} at byte {offset + done} failed: {error.strerror}"
                ) from error
            if not got:
                self._descriptor(tensor)
                raise CorruptCheckpoint(
                    f"{path}: ends at byte {offset + done} within tensor {tensor.name}, which needs bytes up to "
                    f"{offset + len(view)}; the file was cut short"
                )
            done += got
            if self.drops_pages:
                start = max(0, offset + done - got - _FOLIO_BYTES)
                _drop(descriptor, start, offset + done)
        self._descriptor(tensor)  # if it was closed meanwhile, its number may have been another file's

    def _descriptor(self, tensor: StoredTensor) -> int:
        """Of the tensor's file. CheckpointError if that was closed, perhaps by another thread."""
        descriptors = self._descriptors
        if not descriptors:
            raise CheckpointError(
                f"{self.paths[tensor.file]}: tensor {tensor.name} was asked for after the checkpoint was closed"
            )
        return descriptors[tensor.file]


def _drop(descriptor: int, start: int, stop: int) -> None:
    """Asks the system to drop bytes [start, stop) of a file from its page cache; stop 0 is the end of the file."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, max(0, stop - start), os.POSIX_FADV_DONTNEED)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system refuses to open."""
    if isinstance(error, FileNotFoundError):
        return MissingCheckpoint(f"{path}: no such file")
    if isinstance(error, FileTooLong):
        return CorruptCheckpoint(f"{path}: is refused: {error.strerror}")
    if isinstance(error, NotRegular):
        return CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}")
    if isinstance(error, PermissionError) or error.errno in _ASTRAY:
        return MissingCheckpoint(f"{path}: cannot be read: {error.strerror}")
    return CheckpointError(f"{path}: cannot be read: {error.strerror}")
